"""Forward: out and lse of a tile of lanes, one online softmax over the prefix and then the rows' own keys.

    for each block of prefix keys that some row of the tile sees:       # [BLOCK_M lanes, BLOCK_N keys]
        s <- logits(q k^T), -inf where the lane's row does not see the key (nothing to do in a full block)
        m' <- max(m, max s);  p <- 2^(s - m');  total <- 2^(m - m') total + sum p;  acc <- 2^(m - m') acc + p v
    for each row of the tile, for each block of its own keys up to its last query: the same, for the lanes of that row
    out <- acc / total;  lse <- ln 2 (m + log2 total)

A lane's result does not depend on which rows share its tile: key blocks are visited in the order of the keys, a block
that hides everything from a lane leaves (m, total, acc) as they are to the last bit, and keys of one row never enter
the sums of another, which `where` keeps even from 0 * NaN. So permuting rows permutes results exactly.

Where tiles are too few to fill the device, the prefix is cut into SPLITS ranges with a program each, the last of which
also takes the own keys; `merge_kernel` adds up their (m, total, acc) in a fixed order.
"""

import triton
import triton.language as tl

from ctkernels.triton_kernels.tile import (
    LN2,
    LOG2E,
    ROW_BATCH,
    ROW_TOKEN,
    TILE_HULL_END,
    TILE_HULL_START,
    TILE_LANE,
    TILE_LANES,
    TILE_PREFIX,
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
    load_pieces,
    offsets,
    own_blocks,
    own_logits,
    own_seen,
    own_visible,
    prefix_blocks,
    prefix_logits,
    prefix_masked,
    seen_by_any,
    store_pieces,
    tile_rows,
    tile_value,
)


@triton.jit
def softmax_step(s, m):
    """Probabilities relative to the new maximum, that maximum, and the factor of what was summed before."""
    top = tl.maximum(m, tl.max(s, 1))
    base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    return tl.exp2(s - base[:, None]), top, tl.exp2(m - base)


@triton.jit
def finish(OUT, LSE, m, total, acc0, acc1, offset, lse_offset, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """out and lse of the lanes; 0 and -inf where no key was seen, or only keys of probability 0."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    store_pieces(OUT, offset, acc0 / total[:, None], acc1 / total[:, None], ok, D, D0, D1)
    # in fp64, once per lane: the backward pass multiplies every rounding of lse by its size
    lse = (m.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2
    tl.store(LSE + lse_offset, tl.where(empty, -float("inf"), lse.to(tl.float32)), mask=ok)


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high", "window"])
def forward_kernel(
    Q, K, V, PREFIX_K, PREFIX_V, BIAS, SLOPES, KEEP, ROWS, SLOTS, TILES, OUT, LSE, PART, STATS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, out_b, out_h, out_t, lse_b, lse_h,
    bias_g, bias_h, n_rows, n_slots, n_tiles, P, length, drop_below, seed_low, seed_high, factor, cap, window,
    GROUP: tl.constexpr, LIMIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN_N: tl.constexpr, SPLITS: tl.constexpr,
    HIDDEN: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr, OWN_CONTEXT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, WINDOW_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, Hk, SPLITS). If SPLITS > 1, PART and STATS are scratch, fp32 [SPLITS, Hk, lanes, D] and
    [2, SPLITS, Hk, lanes]."""
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes = tile_value(TILES, n_tiles, tile, TILE_LANES)
    if lanes == 0:
        return
    prefix = tile_value(TILES, n_tiles, tile, TILE_PREFIX).to(tl.int64)
    prefix_len = tile_value(TILES, n_tiles, tile, TILE_PREFIX_LEN)
    row0 = tile_value(TILES, n_tiles, tile, TILE_ROW)
    rows = tile_value(TILES, n_tiles, tile, TILE_ROWS)
    lane0 = tile_value(TILES, n_tiles, tile, TILE_LANE)
    WORDS: tl.constexpr = DROP or KEPT
    NEAR: tl.constexpr = WINDOW and WINDOW_PREFIX

    lane = lane0 + tl.arange(0, BLOCK_M)
    ok = lane < lane0 + lanes
    head = kv * GROUP + lane % GROUP
    row, batch, token, position = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    slot = tl.where(ok, row - row0, 0)
    q0, q1 = load_pieces(Q, offsets(batch, head, token, q_b, q_h, q_t), ok, D, D0, D1)  # [BLOCK_M, D0 | D1]
    lowest = tl.min(tl.where(ok, position, 2147483647), 0)
    highest = tl.max(tl.where(ok, position, -2147483647), 0)
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
    bias = BIAS + prefix * bias_g + head.to(tl.int64) * bias_h
    row_id, row_hide_start, row_hide_end, keep, present = tile_rows(ROWS, n_rows, row0, rows, KEEP, length, LIMIT)
    hide_start, hide_end = lane_spans(ROWS, n_rows, row, ok, HIDDEN)
    skip_start = tile_value(TILES, n_tiles, tile, TILE_SKIP_START)
    skip_end = tile_value(TILES, n_tiles, tile, TILE_SKIP_END)
    hull_start = tile_value(TILES, n_tiles, tile, TILE_HULL_START)
    hull_end = tile_value(TILES, n_tiles, tile, TILE_HULL_END)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, W1], tl.float32)

    share = tl.cdiv(tl.cdiv(P, BLOCK_N), SPLITS)
    first, count, skip, skipped = prefix_blocks(
        split * share, split * share + share, skip_start, skip_end, prefix_len, lowest, window, BLOCK_N, NEAR
    )
    prefix_k, prefix_v = PREFIX_K + prefix * pk_g + kv * pk_h, PREFIX_V + prefix * pv_g + kv * pv_h
    for block in range(first, first + count):
        k0 = (block + tl.where(block >= skip, skipped, 0)) * BLOCK_N
        n = k0 + tl.arange(0, BLOCK_N)
        words = tl.zeros([LIMIT], tl.int64)
        if WORDS:
            words = context_words(
                row_id, row_hide_start, row_hide_end, keep, present, k0, prefix_len, length,
                drop_below, seed_low, seed_high, DROP, KEPT, BLOCK_N,
            )  # fmt: skip
            seen = seen_by_any(words, BLOCK_N)
        else:
            seen = n < prefix_len
            if HIDDEN:
                seen = seen & ((n < skip_start) | (n >= skip_end))
        if NEAR:
            seen = seen & (prefix_len + lowest - n < window)
        at = n.to(tl.int64)
        k0_, k1_ = load_pieces(prefix_k, at * pk_t, seen, D, D0, D1)
        s = inner(q0, q1, k0_.to(q0.dtype), k1_.to(q0.dtype), D1, PRECISION)  # [BLOCK_M, BLOCK_N]
        s, _derivative = prefix_logits(
            s, n, position, prefix_len, bias, slope2, ok, factor, cap, SOFTCAP, HAS_BIAS, ALIBI, False
        )
        s = prefix_masked(
            s, words, slot, hide_start, hide_end, hull_start, hull_end, k0, position, highest, prefix_len, window,
            WORDS, HIDDEN, NEAR, False, BLOCK_N,
        )  # fmt: skip
        p, m, alpha = softmax_step(s, m)
        total = total * alpha + tl.sum(p, 1)
        v0, v1 = load_pieces(prefix_v, at * pv_t, seen, D, D0, D1)
        acc0, acc1 = accumulate(
            acc0 * alpha[:, None], acc1 * alpha[:, None], p, v0.to(q0.dtype), v1.to(q0.dtype), D1, PRECISION
        )

    if split == SPLITS - 1:
        for r in range(row0, row0 + rows):
            begin, end, keys = own_blocks(ROWS, n_rows, r, lane0, lanes, window, CAUSAL, WINDOW, GROUP, OWN_N)
            mine = ok & (row == r)
            own_batch = tl.load(ROWS + ROW_BATCH * n_rows + r)
            own_token = tl.load(ROWS + ROW_TOKEN * n_rows + r)
            for t0 in tl.range(begin, end, OWN_N, num_stages=1):  # short: prefetching costs registers
                t = t0 + tl.arange(0, OWN_N)
                seen = own_seen(
                    ROWS, KEEP, n_rows, r, t, keys, P, length, drop_below, seed_low, seed_high, OWN_CONTEXT, DROP, KEPT
                )
                k0_, k1_ = load_pieces(K, offsets(own_batch, kv, own_token + t, k_b, k_h, k_t), seen, D, D0, D1)
                s = inner(q0, q1, k0_, k1_, D1, PRECISION)  # [BLOCK_M, OWN_N]
                s, _derivative = own_logits(s, t, position, slope2, factor, cap, SOFTCAP, ALIBI, False)
                visible = own_visible(t, seen, position, mine, window, CAUSAL, WINDOW, False)
                p, m, alpha = softmax_step(tl.where(visible, s, -float("inf")), m)
                total = total * alpha + tl.sum(p, 1)
                v0, v1 = load_pieces(V, offsets(own_batch, kv, own_token + t, v_b, v_h, v_t), seen, D, D0, D1)
                new0, new1 = accumulate(acc0 * alpha[:, None], acc1 * alpha[:, None], p, v0, v1, D1, PRECISION)
                acc0 = tl.where(mine[:, None], new0, acc0)
                if D1 > 0:
                    acc1 = tl.where(mine[:, None], new1, acc1)

    if SPLITS == 1:
        offset = offsets(batch, head, token, out_b, out_h, out_t)
        finish(OUT, LSE, m, total, acc0, acc1, offset, offsets(batch, head, token, lse_b, lse_h, 1), ok, D, D0, D1)
    else:
        n_lanes = n_slots * GROUP
        at = (split * tl.num_programs(1) + kv).to(tl.int64) * n_lanes + lane
        store_pieces(PART, at * D, acc0, acc1, ok, D, D0, D1)
        tl.store(STATS + at, m, mask=ok)
        tl.store(STATS + SPLITS * tl.num_programs(1).to(tl.int64) * n_lanes + at, total, mask=ok)


@triton.jit
def merge_kernel(
    PART, STATS, SLOTS, TILES, OUT, LSE, out_b, out_h, out_t, lse_b, lse_h, n_slots, n_tiles,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, Hk): one softmax out of the SPLITS ranges of keys, added in order."""
    tile, kv = tl.program_id(0), tl.program_id(1)
    lanes = tile_value(TILES, n_tiles, tile, TILE_LANES)
    if lanes == 0:
        return
    lane0 = tile_value(TILES, n_tiles, tile, TILE_LANE)
    lane = lane0 + tl.arange(0, BLOCK_M)
    ok = lane < lane0 + lanes
    head = kv * GROUP + lane % GROUP
    _, batch, token, _ = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    n_lanes = n_slots * GROUP
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, W1], tl.float32)
    for split in range(SPLITS):
        at = (split * tl.num_programs(1) + kv).to(tl.int64) * n_lanes + lane
        part_m = tl.load(STATS + at, mask=ok, other=-float("inf"))
        part_total = tl.load(STATS + SPLITS * tl.num_programs(1).to(tl.int64) * n_lanes + at, mask=ok, other=0.0)
        top = tl.maximum(m, part_m)
        base = tl.where(top == -float("inf"), 0.0, top)
        old, new = tl.exp2(m - base), tl.exp2(part_m - base)
        part0, part1 = load_pieces(PART, at * D, ok, D, D0, D1)
        acc0 = acc0 * old[:, None] + part0 * new[:, None]
        acc1 = acc1 * old[:, None] + part1 * new[:, None]
        total = total * old + part_total * new
        m = top
    offset = offsets(batch, head, token, out_b, out_h, out_t)
    finish(OUT, LSE, m, total, acc0, acc1, offset, offsets(batch, head, token, lse_b, lse_h, 1), ok, D, D0, D1)
