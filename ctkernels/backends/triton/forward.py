"""Forward: out and lse of a tile of lanes, one online softmax over the prefix and then the rows' own keys.

    for each block of prefix keys that some row of the tile sees:       # [BLOCK_M lanes, BLOCK_N keys]
        s <- logits(q k^T), -inf where the lane's row does not see the key (nothing to do in a full block)
        m' <- max(m, max s);  p <- 2^(s - m');  total <- 2^(m - m') total + sum p;  acc <- 2^(m - m') acc + p v
    for each row of the tile, for each block of its own keys up to its last query: the same, for the lanes of that row
    out <- acc / total;  lse <- ln 2 (m + log2 total)

A lane's result does not depend on which rows share its tile: key blocks are visited in the order of the keys, a block
that hides everything from a lane leaves (m, total, acc) as they are to the last bit, and own keys of one row enter the
sums of no other, not even as 0 * NaN. So permuting rows permutes results exactly.

Where tiles are too few to fill the device, the prefix is cut into SPLITS ranges with a program each, the last of which
also takes the own keys; `merge_kernel` adds up their (m, total, acc) in a fixed order.
"""

import triton
import triton.language as tl

from ctkernels.backends.triton.mask import (
    own_seen,
    own_visible,
    prefix_masked,
    seen_by_tile,
)
from ctkernels.backends.triton.tile import (
    LN2,
    LOG2E,
    ROW_BATCH,
    ROW_TOKEN,
    TILE_LANE,
    TILE_LANES,
    TILE_PREFIX,
    TILE_PREFIX_LEN,
    TILE_ROW,
    TILE_ROWS,
    accumulate,
    all_finite,
    exponent,
    hidden_from_all,
    idle_lanes,
    inner,
    lane_block,
    lane_slots,
    load_pieces,
    offsets,
    only,
    own_blocks,
    own_logits,
    prefix_blocks,
    prefix_logits,
    result_lanes,
    store_pieces,
    store_zeros,
    tile_value,
)


@triton.jit
def softmax_step(s, m, factor, PLAIN: tl.constexpr):
    """Probabilities relative to the new maximum, that maximum, and the factor of what was summed before.

    s: what `capped` made of the products; m [BLOCK_M] in units of log 2."""
    highest = tl.max(s, 1)
    if PLAIN:
        highest *= factor
    top = tl.maximum(m, highest)
    base = tl.where(top == -float("inf"), 0.0, top)  # -inf - -inf would be NaN
    return tl.exp2(exponent(s, base, factor, PLAIN, False)), top, tl.exp2(m - base)


@triton.jit
def finish(
    OUT, LSE, m, total, acc0, acc1, offset, lse_offset, ok, VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr
):
    """out and lse of the lanes; 0 and -inf where no key was seen, or only keys of probability 0."""
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    store_pieces(OUT, offset, acc0 / total[:, None], acc1 / total[:, None], ok, VD, VD0, VD1)
    # in fp64, once per lane: the backward pass multiplies every rounding of lse by its size
    lse = (m.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2
    tl.store(LSE + lse_offset, tl.where(empty, -float("inf"), lse.to(tl.float32)), mask=ok)


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high", "window"])
def forward_kernel(
    Q, K, V, PREFIX_K, PREFIX_V, BIAS, SLOPES, KEEP, ROWS, SLOTS, TILES, WORDS, TILE_WORDS, OUT, LSE, PART, STATS,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, out_b, out_h, out_t, lse_b, lse_h,
    bias_g, bias_h, n_rows, n_slots, n_tiles, n_words, P, length, drop_below, seed_low, seed_high, factor, cap, window,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, VW1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN_N: tl.constexpr, SPLITS: tl.constexpr,
    IDLE: tl.constexpr, MASKED: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr, OWN_CONTEXT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PREFIX: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, Hk, SPLITS). If SPLITS > 1, PART and STATS are scratch, fp32 [SPLITS, Hk, lanes, VD] and
    [2, SPLITS, Hk, lanes]. IDLE: there may be tokens of no row."""
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IDLE:
        idle, batch, head, token, any_idle = idle_lanes(ROWS, n_rows, SLOTS, n_slots, tile, kv, GROUP, BLOCK_M)
        if any_idle & (split == 0):
            store_zeros(OUT, offsets(batch, head, token, out_b, out_h, out_t), idle, VD, VD0, VD1)
            nothing = tl.full([BLOCK_M], -float("inf"), tl.float32)
            tl.store(LSE + offsets(batch, head, token, lse_b, lse_h, 1), nothing, mask=idle)
    lanes = tile_value(TILES, n_tiles, tile, TILE_LANES)
    if lanes == 0:
        return
    prefix = tile_value(TILES, n_tiles, tile, TILE_PREFIX).to(tl.int64)
    prefix_len = tile_value(TILES, n_tiles, tile, TILE_PREFIX_LEN)
    row0 = tile_value(TILES, n_tiles, tile, TILE_ROW)
    rows = tile_value(TILES, n_tiles, tile, TILE_ROWS)
    lane0 = tile_value(TILES, n_tiles, tile, TILE_LANE)
    BRANCH: tl.constexpr = not (DROP or KEPT)
    NEAR: tl.constexpr = WINDOW and WINDOW_PREFIX

    lane = lane0 + tl.arange(0, BLOCK_M)
    ok = lane < lane0 + lanes
    head = kv * GROUP + lane % GROUP
    row, batch, token, position = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    q0, q1 = load_pieces(Q, offsets(batch, head, token, q_b, q_h, q_t), ok, D, D0, D1)  # [BLOCK_M, D0 | D1]
    lowest = tl.min(tl.where(ok, position, 2147483647), 0)
    highest = tl.max(tl.where(ok, position, -2147483647), 0)
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
    bias = BIAS + prefix * bias_g + head.to(tl.int64) * bias_h
    skip_start, skip_end = hidden_from_all(ROWS, n_rows, row, ok)

    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, VD0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, VW1], tl.float32)

    share = tl.cdiv(tl.cdiv(P, BLOCK_N), SPLITS)
    first, count, skip, skipped = prefix_blocks(
        split * share, split * share + share, skip_start, skip_end, prefix_len, lowest, window, BLOCK_N, NEAR
    )
    prefix_k, prefix_v = (
        PREFIX_K + prefix * pk_g + kv.to(tl.int64) * pk_h,
        PREFIX_V + prefix * pv_g + kv.to(tl.int64) * pv_h,
    )
    for block in range(first, first + count):
        first_key = (block + tl.where(block >= skip, skipped, 0)) * BLOCK_N
        n = first_key + tl.arange(0, BLOCK_N)
        seen = seen_by_tile(TILE_WORDS, n_tiles, tile, n) if MASKED else n < prefix_len
        if NEAR:
            seen = seen & (prefix_len + lowest - n < window)
        at = n.to(tl.int64)
        k0, k1 = load_pieces(prefix_k, at * pk_t, seen, D, D0, D1)
        s = inner(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_M, BLOCK_N]
        s, _derivative = prefix_logits(
            s, n, position, prefix_len, bias, slope2, ok, factor, cap, SOFTCAP, HAS_BIAS, ALIBI, PLAIN, False
        )
        s = prefix_masked(
            s, WORDS, TILE_WORDS, n_rows, n_words, n_tiles, tile, row, first_key, position, highest, prefix_len, window,
            MASKED, BRANCH, NEAR, False, BLOCK_N,
        )  # fmt: skip
        p, m, alpha = softmax_step(s, m, factor, PLAIN)
        total = total * alpha + tl.sum(p, 1)
        v0, v1 = load_pieces(prefix_v, at * pv_t, seen, VD, VD0, VD1)
        acc0, acc1 = accumulate(acc0 * alpha[:, None], acc1 * alpha[:, None], p, v0, v1, VD1, PRECISION)

    if split == SPLITS - 1:
        for r in range(row0, row0 + rows):
            begin, end, keys = own_blocks(ROWS, n_rows, r, lane0, lanes, window, CAUSAL, WINDOW, GROUP, OWN_N)
            mine = ok & (row == r)
            own_batch = tl.load(ROWS + ROW_BATCH * n_rows + r)
            own_token = tl.load(ROWS + ROW_TOKEN * n_rows + r)
            for first_t in tl.range(begin, end, OWN_N, num_stages=1):  # short: prefetching costs registers
                t = first_t + tl.arange(0, OWN_N)
                seen = own_seen(
                    ROWS, KEEP, n_rows, r, t, keys, P, length, drop_below, seed_low, seed_high, OWN_CONTEXT, DROP, KEPT
                )
                k0, k1 = load_pieces(K, offsets(own_batch, kv, own_token + t, k_b, k_h, k_t), seen, D, D0, D1)
                s = inner(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_M, OWN_N]
                s, _derivative = own_logits(s, t, position, slope2, factor, cap, SOFTCAP, ALIBI, PLAIN, False)
                visible = own_visible(t, seen, position, mine, window, CAUSAL, WINDOW, False)
                p, m, alpha = softmax_step(tl.where(visible, s, -float("inf")), m, factor, PLAIN)
                total = total * alpha + tl.sum(p, 1)
                v0, v1 = load_pieces(V, offsets(own_batch, kv, own_token + t, v_b, v_h, v_t), seen, VD, VD0, VD1)
                # other rows have p = 0, which must not meet a NaN; the lanes that see one get it as a factor
                good = all_finite(v0, v1, VD1)
                spoilt = tl.max((visible & ~good[None, :]).to(tl.int32), 1) != 0
                alpha = tl.where(spoilt, float("nan"), alpha)
                v0, v1 = only(good, v0, v1)
                acc0, acc1 = accumulate(acc0 * alpha[:, None], acc1 * alpha[:, None], p, v0, v1, VD1, PRECISION)

    lane, ok, batch, head, token = result_lanes(TILES, n_tiles, tile, kv, SLOTS, n_slots, GROUP, BLOCK_M)
    if SPLITS == 1:
        offset = offsets(batch, head, token, out_b, out_h, out_t)
        lse_offset = offsets(batch, head, token, lse_b, lse_h, 1)
        finish(OUT, LSE, m, total, acc0, acc1, offset, lse_offset, ok, VD, VD0, VD1)
    else:
        n_lanes = n_slots * GROUP
        at = (split * tl.num_programs(1) + kv).to(tl.int64) * n_lanes + lane
        store_pieces(PART, at * VD, acc0, acc1, ok, VD, VD0, VD1)
        tl.store(STATS + at, m, mask=ok)
        tl.store(STATS + SPLITS * tl.num_programs(1).to(tl.int64) * n_lanes + at, total, mask=ok)


@triton.jit
def merge_kernel(
    PART, STATS, ROWS, SLOTS, OUT, LSE, out_b, out_h, out_t, lse_b, lse_h, n_rows, n_slots,
    GROUP: tl.constexpr, VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, VW1: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid (lane blocks, Hk): one softmax out of the SPLITS ranges of keys, added in order."""
    kv = tl.program_id(1)
    lane, ok = lane_block(ROWS, n_rows, GROUP, BLOCK_M)
    head = kv * GROUP + lane % GROUP
    _, batch, token, _ = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    n_lanes = n_slots * GROUP
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, VD0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, VW1], tl.float32)
    for split in range(SPLITS):
        at = (split * tl.num_programs(1) + kv).to(tl.int64) * n_lanes + lane
        part_m = tl.load(STATS + at, mask=ok, other=-float("inf"))
        part_total = tl.load(STATS + SPLITS * tl.num_programs(1).to(tl.int64) * n_lanes + at, mask=ok, other=0.0)
        top = tl.maximum(m, part_m)
        base = tl.where(top == -float("inf"), 0.0, top)
        old, new = tl.exp2(m - base), tl.exp2(part_m - base)
        part0, part1 = load_pieces(PART, at * VD, ok, VD, VD0, VD1)
        acc0 = acc0 * old[:, None] + part0 * new[:, None]
        acc1 = acc1 * old[:, None] + part1 * new[:, None]
        total = total * old + part_total * new
        m = top
    offset = offsets(batch, head, token, out_b, out_h, out_t)
    lse_offset = offsets(batch, head, token, lse_b, lse_h, 1)
    finish(OUT, LSE, m, total, acc0, acc1, offset, lse_offset, ok, VD, VD0, VD1)
