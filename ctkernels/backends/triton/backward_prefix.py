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

from ctkernels.backends.triton.mask import (
    block_word,
    prefix_masked,
)
from ctkernels.backends.triton.tile import (
    LOG2E,
    ROW_FIRST,
    ROW_QUERIES,
    SLOT_BATCH,
    SLOT_TOKEN,
    TILE_LANE,
    TILE_LANES,
    TILE_PREFIX_LEN,
    accumulate,
    finite,
    inner,
    lane_slots,
    lane_state,
    load_pieces,
    offsets,
    prefix_logits,
    probabilities,
    store_pieces,
    tile_value,
)


@triton.jit(do_not_specialize=["window"])
def prefix_kernel(
    Q, PREFIX_K, PREFIX_V, BIAS, SLOPES, ROWS, SLOTS, TILES, RANGES, WORDS, TILE_WORDS, DOUT, STATE, DK, DV, DBIAS,
    q_b, q_h, q_t, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, dout_b, dout_h, dout_t, bias_g, bias_h,
    n_prefixes, n_rows, n_slots, n_tiles, n_words, P, factor, cap, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, VW1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    SKIP: tl.constexpr, BIAS_HEADS: tl.constexpr, BIAS_WIDTH: tl.constexpr, MASKED: tl.constexpr, DROP: tl.constexpr,
    KEPT: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, Hk, G * SPLITS). DK [SPLITS, G, Hk, P, D], DV [SPLITS, G, Hk, P, VD]; DBIAS: fp32
    [SPLITS, G, Hk * BIAS_HEADS, P].

    BIAS_HEADS: 0 no gradient of the bias, 1 one per KV head (a bias that heads share), GROUP one per head, in an
    accumulator of BIAS_WIDTH, the next power of two. SKIP: look for tiles none of whose rows sees the keys; the
    branch keeps Triton from prefetching the next tile, so that it must be worth it.
    """
    first_key, kv = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    prefix, split = tl.program_id(2) % n_prefixes, tl.program_id(2) // n_prefixes
    BRANCH: tl.constexpr = not (DROP or KEPT)
    NEAR: tl.constexpr = WINDOW and WINDOW_PREFIX
    PAIR: tl.constexpr = Q.dtype.element_ty == tl.float32
    NEED_DS: tl.constexpr = NEED_K or BIAS_HEADS > 0
    n = first_key + tl.arange(0, BLOCK_N)
    inside = n < P
    at = n.to(tl.int64)
    prefix_k = PREFIX_K + prefix.to(tl.int64) * pk_g + kv.to(tl.int64) * pk_h
    k0, k1 = load_pieces(prefix_k, at * pk_t, inside, D, D0, D1)
    prefix_v = PREFIX_V + prefix.to(tl.int64) * pv_g + kv.to(tl.int64) * pv_h
    v0, v1 = load_pieces(prefix_v, at * pv_t, inside, VD, VD0, VD1)
    # zeros for what is not finite, which p = 0 would not hide; lanes that see it have an lse or delta of that kind
    k0, k1, v0, v1 = finite(k0), finite(k1), finite(v0), finite(v1)  # [BLOCK_N, D0 | D1 | VD0 | VD1]
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, W1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, VD0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, VW1], tl.float32)
    dbias = tl.zeros([BLOCK_N, BIAS_WIDTH], tl.float32)
    bias_column = tl.arange(0, BIAS_WIDTH)
    n_lanes = n_slots * GROUP

    first, last = tl.load(RANGES + prefix), tl.load(RANGES + n_prefixes + prefix)
    prefix_len = 0
    if first < last:
        prefix_len = tile_value(TILES, n_tiles, first, TILE_PREFIX_LEN)
    if first_key >= prefix_len:
        last = first
    share = tl.cdiv(last - first, SPLITS)
    begin = first + split * share
    for tile in range(begin, tl.minimum(begin + share, last)):
        hidden = False
        if SKIP:
            hidden = block_word(TILE_WORDS, n_tiles, tile, first_key, BLOCK_N, False) == 0
        if not hidden:
            lane0 = tile_value(TILES, n_tiles, tile, TILE_LANE)
            lane = lane0 + tl.arange(0, BLOCK_M)
            ok = lane < lane0 + tile_value(TILES, n_tiles, tile, TILE_LANES)
            head = kv * GROUP + lane % GROUP
            row, batch, token, position = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
            high, low, delta, alive = lane_state(STATE, lane, ok, kv, tl.num_programs(1), n_lanes, PAIR)
            q0, q1 = load_pieces(Q, offsets(batch, head, token, q_b, q_h, q_t), alive, D, D0, D1)
            do0, do1 = load_pieces(DOUT, offsets(batch, head, token, dout_b, dout_h, dout_t), alive, VD, VD0, VD1)
            slope2 = 0.0
            if ALIBI:
                slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
            bias = BIAS + prefix.to(tl.int64) * bias_g + head.to(tl.int64) * bias_h
            s = inner(k0, k1, q0, q1, D1, PRECISION)  # [BLOCK_N, BLOCK_M]
            s, derivative = prefix_logits(
                s, n, position, prefix_len, bias, slope2, ok, factor, cap, SOFTCAP, HAS_BIAS, ALIBI, PLAIN, True
            )
            highest = tl.max(tl.where(ok, position, -2147483647), 0)
            s = prefix_masked(
                s, WORDS, TILE_WORDS, n_rows, n_words, n_tiles, tile, row, first_key, position, highest, prefix_len,
                window, MASKED, BRANCH, NEAR, True, BLOCK_N,
            )  # fmt: skip
            p = probabilities(s, high, low, factor, PLAIN, PAIR, True)
            ds = p
            if NEED_DS:
                ds = p * (inner(v0, v1, do0, do1, VD1, PRECISION) - delta[None, :])
            if NEED_V:
                dv0, dv1 = accumulate(dv0, dv1, p, do0, do1, VD1, PRECISION)
            if BIAS_HEADS == 1:
                dbias += tl.sum(ds, 1)[:, None]
            if BIAS_HEADS > 1:
                for h in tl.static_range(BIAS_HEADS):
                    of_head = tl.sum(tl.where((lane % GROUP == h)[None, :], ds, 0.0), 1)
                    dbias += tl.where((bias_column == h)[None, :], of_head[:, None], 0.0)
            if NEED_K:
                dk0, dk1 = accumulate(dk0, dk1, ds * derivative, q0, q1, D1, PRECISION)

    out = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + kv) * P + n
    if NEED_K:
        store_pieces(DK, out * D, dk0 * scale, dk1 * scale, inside, D, D0, D1)
    if NEED_V:
        store_pieces(DV, out * VD, dv0, dv1, inside, VD, VD0, VD1)
    if BIAS_HEADS > 0:
        heads = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + kv) * BIAS_HEADS + bias_column
        here = inside[:, None] & (bias_column < BIAS_HEADS)[None, :]
        tl.store(DBIAS + heads[None, :] * P + n[:, None], dbias, mask=here)


@triton.jit
def add_planes(
    mine, PART, SUM, plane, at, P, n_splits, n_prefixes, n_heads,
    W: tl.constexpr, SUM_PREFIXES: tl.constexpr, SUM_HEADS: tl.constexpr,
):  # fmt: skip
    """If it is `mine`: elements `at` [BLOCK] of one plane of SUM [G or 1, heads or 1, P, W], the sum of PART
    [splits, G, heads, P, W] over splits, and over prefixes and heads where SUM_PREFIXES, SUM_HEADS, in this order."""
    if mine:
        prefix0, head0 = plane // n_heads, plane % n_heads
        prefixes, heads = 1, 1
        if SUM_HEADS:
            prefix0, head0, heads = plane, 0, n_heads
        planes = n_prefixes
        if SUM_PREFIXES:
            planes, prefixes = 1, n_prefixes
        ok = at // W < tl.where(prefix0 < planes, P, 0)
        total = tl.zeros(at.shape, tl.float32)
        for split in range(n_splits):
            for prefix in range(prefix0, prefix0 + prefixes):
                for head in range(head0, head0 + heads):
                    part = (split * n_prefixes + prefix).to(tl.int64) * n_heads + head
                    total += tl.load(PART + part * P * W + at, mask=ok, other=0.0)
        tl.store(SUM + plane.to(tl.int64) * P * W + at, total.to(SUM.dtype.element_ty), mask=ok)


@triton.jit
def add_queries(
    mine, PART, DQ, ROWS, SLOTS, kv, n_kv, at, n_splits, dq_b, dq_h, dq_t, n_rows, n_slots,
    GROUP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """If it is `mine`: elements `at` [BLOCK] of the lanes' dq in one KV head, the sum of PART [splits, Hk, lanes, D]
    over splits."""
    if mine:
        used = tl.load(ROWS + ROW_FIRST * n_rows + n_rows - 1) + tl.load(ROWS + ROW_QUERIES * n_rows + n_rows - 1)
        lane = at // D
        ok = lane < tl.where(kv < n_kv, used * GROUP, 0)
        total = tl.zeros(at.shape, tl.float32)
        for split in range(n_splits):
            part = (split * n_kv + kv).to(tl.int64) * n_slots * (GROUP * D)
            total += tl.load(PART + part + at, mask=ok, other=0.0)
        batch = tl.load(SLOTS + SLOT_BATCH * n_slots + lane // GROUP, mask=ok, other=0)
        token = tl.load(SLOTS + SLOT_TOKEN * n_slots + lane // GROUP, mask=ok, other=0)
        to = offsets(batch, kv * GROUP + lane % GROUP, token, dq_b, dq_h, dq_t) + at % D
        tl.store(DQ + to, total.to(DQ.dtype.element_ty), mask=ok)


@triton.jit
def sum_kernel(
    PART_Q, PART_K, PART_V, PART_BIAS, DQ, DK, DV, DBIAS, ROWS, SLOTS, dq_b, dq_h, dq_t, n_rows, n_slots, n_kv,
    n_prefixes, n_heads, P, query_splits, splits,
    GROUP: tl.constexpr, D: tl.constexpr, VD: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
    SUM_V: tl.constexpr, SUM_BIAS: tl.constexpr, SUM_PREFIXES: tl.constexpr, SUM_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, planes, sums): adds up the parts of gradients whose work was cut into ranges, and those of a bias.
    SUM_Q, SUM_K, SUM_V, SUM_BIAS (0 or 1) say which; n_heads: of PART_BIAS."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    plane, which = tl.program_id(1), tl.program_id(2)
    if SUM_Q:
        add_queries(
            which == 0,
            PART_Q,
            DQ,
            ROWS,
            SLOTS,
            plane,
            n_kv,
            at,
            query_splits,
            dq_b,
            dq_h,
            dq_t,
            n_rows,
            n_slots,
            GROUP,
            D,
        )
    if SUM_K:
        add_planes(which == SUM_Q, PART_K, DK, plane, at, P, splits, n_prefixes, n_kv, D, False, False)
    if SUM_V:
        add_planes(which == SUM_Q + SUM_K, PART_V, DV, plane, at, P, splits, n_prefixes, n_kv, VD, False, False)
    if SUM_BIAS:
        mine = which == SUM_Q + SUM_K + SUM_V
        add_planes(mine, PART_BIAS, DBIAS, plane, at, P, splits, n_prefixes, n_heads, 1, SUM_PREFIXES, SUM_HEADS)
