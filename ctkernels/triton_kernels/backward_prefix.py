"""Backward of the prefix: a program owns a block of prefix keys of one KV head and walks the tiles of query lanes.

    for each tile of lanes of rows that read this prefix, in order:      # [BLOCK_N keys, BLOCK_M lanes]
        p <- 2^(logits(k q^T) - lse2), 0 where the lane's row does not see the key
        dv += p dout;  ds = p (v dout^T - delta);  dbias += sum ds;  dk += scale (1 - tanh^2) ds q

The sum over rows, queries and heads of the group stays in fp32 registers: no atomics, no gradient per row, and an order
that depends on nothing but the inputs. Where there are few keys and many queries, the tiles are cut into SPLITS ranges
with a program each, whose sums `sum_kernel` adds in a fixed order.
"""

import triton
import triton.language as tl

from ctkernels.triton_kernels.tile import (
    LOG2E,
    TILE_HULL_END,
    TILE_HULL_START,
    TILE_LANE,
    TILE_LANES,
    TILE_PREFIX_LEN,
    TILE_ROW,
    TILE_ROWS,
    TILE_SKIP_END,
    TILE_SKIP_START,
    accumulate,
    context_words,
    inner,
    lane_slots,
    lane_spans,
    lane_state,
    load_pieces,
    offsets,
    prefix_logits,
    prefix_masked,
    store_pieces,
    tile_rows,
    tile_value,
)


@triton.jit
def finite(v):
    """Zeros for NaN and infinities, so that p = 0 hides them. Lanes that do see them have a delta of that kind."""
    return tl.where(tl.abs(v.to(tl.float32)) < float("inf"), v, 0.0)


@triton.jit
def tile_is_hidden(TILES, n_tiles, tile, k0, BLOCK_N: tl.constexpr, SKIP: tl.constexpr):
    """Whether the keys k0 .. k0 + BLOCK_N - 1 lie in the hidden spans of all rows of the tile."""
    hidden = False
    if SKIP:
        inside = k0 + BLOCK_N <= tile_value(TILES, n_tiles, tile, TILE_SKIP_END)
        hidden = inside & (k0 >= tile_value(TILES, n_tiles, tile, TILE_SKIP_START))
    return hidden


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high", "window"])
def prefix_kernel(
    Q, PREFIX_K, PREFIX_V, BIAS, SLOPES, KEEP, ROWS, SLOTS, TILES, RANGES, DOUT, STATE, DK, DV, DBIAS,
    q_b, q_h, q_t, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, dout_b, dout_h, dout_t, bias_g, bias_h,
    n_prefixes, n_rows, n_slots, n_tiles, P, length, drop_below, seed_low, seed_high, factor, cap, scale, window,
    GROUP: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SKIP: tl.constexpr, BIAS_HEADS: tl.constexpr, BIAS_WIDTH: tl.constexpr, HIDDEN: tl.constexpr, DROP: tl.constexpr,
    KEPT: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, Hk, G * SPLITS). DK, DV: [SPLITS, G, Hk, P, D]; DBIAS: fp32 [SPLITS, G, Hk * BIAS_HEADS, P].

    BIAS_HEADS: 0 no gradient of the bias, 1 one per KV head (a bias that heads share), GROUP one per head, in an
    accumulator of BIAS_WIDTH, the next power of two. SKIP: look for tiles whose rows all hide the keys; the branch
    keeps Triton from prefetching the next tile, so that it must be worth it.
    """
    k0, kv = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    prefix, split = tl.program_id(2) % n_prefixes, tl.program_id(2) // n_prefixes
    WORDS: tl.constexpr = DROP or KEPT
    NEAR: tl.constexpr = WINDOW and WINDOW_PREFIX
    NEED_DS: tl.constexpr = NEED_K or BIAS_HEADS > 0
    n = k0 + tl.arange(0, BLOCK_N)
    inside = n < P
    at = n.to(tl.int64)
    k0_, k1_ = load_pieces(PREFIX_K + prefix.to(tl.int64) * pk_g + kv * pk_h, at * pk_t, inside, D, D0, D1)
    v0, v1 = load_pieces(PREFIX_V + prefix.to(tl.int64) * pv_g + kv * pv_h, at * pv_t, inside, D, D0, D1)
    kind = Q.dtype.element_ty
    k0_, k1_ = k0_.to(kind), k1_.to(kind)  # [BLOCK_N, D0 | D1]
    v0, v1 = finite(v0.to(kind)), finite(v1.to(kind))
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, W1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, W1], tl.float32)
    dbias = tl.zeros([BLOCK_N, BIAS_WIDTH], tl.float32)
    bias_column = tl.arange(0, BIAS_WIDTH)
    n_lanes = n_slots * GROUP

    first, last = tl.load(RANGES + prefix), tl.load(RANGES + n_prefixes + prefix)
    prefix_len = 0
    if first < last:
        prefix_len = tile_value(TILES, n_tiles, first, TILE_PREFIX_LEN)
    if k0 >= prefix_len:
        last = first
    share = tl.cdiv(last - first, SPLITS)
    begin = first + split * share
    for tile in range(begin, tl.minimum(begin + share, last)):
        if not tile_is_hidden(TILES, n_tiles, tile, k0, BLOCK_N, SKIP):
            row0 = tile_value(TILES, n_tiles, tile, TILE_ROW)
            lane0 = tile_value(TILES, n_tiles, tile, TILE_LANE)
            lane = lane0 + tl.arange(0, BLOCK_M)
            ok = lane < lane0 + tile_value(TILES, n_tiles, tile, TILE_LANES)
            head = kv * GROUP + lane % GROUP
            row, batch, token, position = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
            high, low, delta, alive = lane_state(STATE, lane, ok, kv, tl.num_programs(1), n_lanes)
            q0, q1 = load_pieces(Q, offsets(batch, head, token, q_b, q_h, q_t), alive, D, D0, D1)
            do0, do1 = load_pieces(DOUT, offsets(batch, head, token, dout_b, dout_h, dout_t), alive, D, D0, D1)
            slope2 = 0.0
            if ALIBI:
                slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
            bias = BIAS + prefix.to(tl.int64) * bias_g + head.to(tl.int64) * bias_h
            s = inner(k0_, k1_, q0, q1, D1, PRECISION)  # [BLOCK_N, BLOCK_M]
            s, derivative = prefix_logits(
                s, n, position, prefix_len, bias, slope2, ok, factor, cap, SOFTCAP, HAS_BIAS, ALIBI, True
            )
            words = tl.zeros([LIMIT], tl.int64)
            if WORDS:
                row_id, row_hide_start, row_hide_end, keep, present = tile_rows(
                    ROWS, n_rows, row0, tile_value(TILES, n_tiles, tile, TILE_ROWS), KEEP, length, LIMIT
                )
                words = context_words(
                    row_id, row_hide_start, row_hide_end, keep, present, k0, prefix_len, length,
                    drop_below, seed_low, seed_high, DROP, KEPT, BLOCK_N,
                )  # fmt: skip
            hide_start, hide_end = lane_spans(ROWS, n_rows, row, ok, HIDDEN)
            hull_start = tile_value(TILES, n_tiles, tile, TILE_HULL_START)
            hull_end = tile_value(TILES, n_tiles, tile, TILE_HULL_END)
            highest = tl.max(tl.where(ok, position, -2147483647), 0)
            s = prefix_masked(
                s, words, tl.where(ok, row - row0, 0), hide_start, hide_end, hull_start, hull_end, k0, position,
                highest, prefix_len, window, WORDS, HIDDEN, NEAR, True, BLOCK_N,
            )  # fmt: skip
            p = tl.exp2((s - high[None, :]) - low[None, :])
            ds = p
            if NEED_DS:
                ds = p * (inner(v0, v1, do0, do1, D1, PRECISION) - delta[None, :])
            if NEED_V:
                dv0, dv1 = accumulate(dv0, dv1, p, do0, do1, D1, PRECISION)
            if BIAS_HEADS == 1:
                dbias += tl.sum(ds, 1)[:, None]
            if BIAS_HEADS > 1:
                for h in tl.static_range(BIAS_HEADS):
                    of_head = tl.sum(tl.where((lane % GROUP == h)[None, :], ds, 0.0), 1)
                    dbias += tl.where((bias_column == h)[None, :], of_head[:, None], 0.0)
            if NEED_K:
                dk0, dk1 = accumulate(dk0, dk1, ds * derivative, q0, q1, D1, PRECISION)

    out = ((tl.program_id(2).to(tl.int64) * tl.num_programs(1) + kv) * P + n) * D
    if NEED_K:
        store_pieces(DK, out, dk0 * scale, dk1 * scale, inside, D, D0, D1)
    if NEED_V:
        store_pieces(DV, out, dv0, dv1, inside, D, D0, D1)
    if BIAS_HEADS > 0:
        heads = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + kv) * BIAS_HEADS + bias_column
        here = inside[:, None] & (bias_column < BIAS_HEADS)[None, :]
        tl.store(DBIAS + heads[None, :] * P + n[:, None], dbias, mask=here)


@triton.jit
def sum_kernel(
    PART, SUM, n_splits, n_prefixes, n_heads, size, SUM_PREFIXES: tl.constexpr, SUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """SUM [G or 1, heads or 1, size] = sum of PART [splits, G, heads, size] over splits, and over prefixes and heads
    where SUM_PREFIXES, SUM_HEADS, in this order. Grid (blocks of size, heads or 1, G or 1)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < size
    prefix0, head0 = tl.program_id(2), tl.program_id(1)
    prefixes, heads = 1, 1
    if SUM_PREFIXES:
        prefixes = n_prefixes
    if SUM_HEADS:
        heads = n_heads
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(n_splits):
        for prefix in range(prefix0, prefix0 + prefixes):
            for head in range(head0, head0 + heads):
                plane = (split * n_prefixes + prefix).to(tl.int64) * n_heads + head
                total += tl.load(PART + plane * size + at, mask=ok, other=0.0)
    plane = prefix0.to(tl.int64) * tl.num_programs(1) + head0
    tl.store(SUM + plane * size + at, total.to(SUM.dtype.element_ty), mask=ok)
