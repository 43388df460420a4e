"""Backward of the rows: delta, dq, and dk, dv of the rows' own keys. `backward_prefix.py` has the prefix's gradients.

With p = 2^(s - lse2) recomputed tile by tile, where s are the logits and lse2 the saved lse in units of log 2:

    delta_i = <out_i, dout_i> - dlse_i     once per lane, in dq_kernel, or in delta_kernel where no dq is asked for
    ds = p (dout v^T - delta);  ds <- ds (1 - tanh^2) with a softcap
    dq = scale ds k        dq_kernel: a tile of lanes walks its keys as in the forward pass
    dk = scale ds^T q      own_kernel: a block of one row's own keys walks the lanes of that row, in order
    dv = p^T dout

Lanes that saw no key have lse2 = inf, hence p = 0, and are read as zeros: what arrives for them reaches nothing.
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
    LOG2E,
    OWN_BLOCK,
    OWN_KEYS,
    OWN_ROW,
    OWN_TOKEN,
    ROW_BATCH,
    ROW_FIRST,
    ROW_KEYS,
    ROW_OFFSET,
    ROW_QUERIES,
    ROW_TOKEN,
    TILE_LANE,
    TILE_LANES,
    TILE_PREFIX,
    TILE_PREFIX_LEN,
    TILE_ROW,
    TILE_ROWS,
    accumulate,
    all_finite,
    hidden_from_all,
    idle_lanes,
    inner,
    lane_block,
    lane_slots,
    lane_state,
    load_pieces,
    offsets,
    only,
    own_blocks,
    own_logits,
    prefix_blocks,
    prefix_logits,
    probabilities,
    result_lanes,
    split_lse,
    store_pieces,
    store_zeros,
    tile_value,
)


@triton.jit
def lane_delta(
    DOUT, OUT, LSE, DLSE, STATE, lane, ok, kept, batch, head, token, kv, n_kv, n_lanes, dout_b, dout_h, dout_t,
    out_b, out_h, out_t, lse_b, lse_h, dlse_b, dlse_h, dlse_t,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, HAS_DLSE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """What the backward pass needs of lanes [BLOCK_M]: lse2 (high), what it was rounded by (low), delta, whether the
    lane saw any key, and its dout. STATE, fp32 [3, Hk, lanes], keeps high, delta, and of a PAIR low, of the `kept`."""
    lse = tl.load(LSE + offsets(batch, head, token, lse_b, lse_h, 1), mask=ok, other=-float("inf"))
    alive = lse != -float("inf")
    out0, out1 = load_pieces(OUT, offsets(batch, head, token, out_b, out_h, out_t), alive, VD, VD0, VD1)
    do0, do1 = load_pieces(DOUT, offsets(batch, head, token, dout_b, dout_h, dout_t), alive, VD, VD0, VD1)
    delta = tl.sum(out0.to(tl.float32) * do0.to(tl.float32), 1)
    if VD1 > 0:
        delta += tl.sum(out1.to(tl.float32) * do1.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(DLSE + offsets(batch, head, token, dlse_b, dlse_h, dlse_t), mask=alive, other=0.0)
    high, low = split_lse(tl.where(alive, lse, 0.0), alive)
    plane = n_kv.to(tl.int64) * n_lanes
    at = STATE + kv.to(tl.int64) * n_lanes + lane
    tl.store(at, high, mask=kept)
    tl.store(at + plane, delta, mask=kept)
    if PAIR:
        tl.store(at + 2 * plane, low, mask=kept)
    return high, low, delta, alive, do0, do1


@triton.jit
def delta_kernel(
    DOUT, OUT, LSE, DLSE, ROWS, SLOTS, STATE,
    dout_b, dout_h, dout_t, out_b, out_h, out_t, lse_b, lse_h, dlse_b, dlse_h, dlse_t, n_rows, n_slots,
    GROUP: tl.constexpr, VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, HAS_DLSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (lane blocks, Hk): `lane_delta` of all lanes."""
    kv = tl.program_id(1)
    lane, ok = lane_block(ROWS, n_rows, GROUP, BLOCK_M)
    _, batch, token, _ = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    PAIR: tl.constexpr = DOUT.dtype.element_ty == tl.float32
    lane_delta(
        DOUT, OUT, LSE, DLSE, STATE, lane, ok, ok, batch, kv * GROUP + lane % GROUP, token, kv, tl.num_programs(1),
        n_slots * GROUP, dout_b, dout_h, dout_t, out_b, out_h, out_t, lse_b, lse_h, dlse_b, dlse_h, dlse_t,
        VD, VD0, VD1, HAS_DLSE, PAIR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high", "window"])
def dq_kernel(
    Q, K, V, PREFIX_K, PREFIX_V, BIAS, SLOPES, KEEP, ROWS, SLOTS, TILES, WORDS, TILE_WORDS, DOUT, OUT, LSE, DLSE,
    STATE, DQ, PART_Q,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, dout_b, dout_h, dout_t,
    out_b, out_h, out_t, lse_b, lse_h, dlse_b, dlse_h, dlse_t, dq_b, dq_h, dq_t, bias_g, bias_h,
    n_rows, n_slots, n_tiles, n_words, P, length, drop_below, seed_low, seed_high, factor, cap, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OWN_N: tl.constexpr, SPLITS: tl.constexpr,
    HAS_DLSE: tl.constexpr, IDLE: tl.constexpr, MASKED: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr,
    OWN_CONTEXT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, WINDOW_PREFIX: tl.constexpr,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, Hk, SPLITS). PART_Q: scratch fp32 [SPLITS, Hk, lanes, D] if SPLITS > 1. IDLE: as `forward_kernel`.
    Also writes STATE."""
    tile, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if IDLE:
        idle, batch, head, token, any_idle = idle_lanes(ROWS, n_rows, SLOTS, n_slots, tile, kv, GROUP, BLOCK_M)
        if any_idle & (split == 0):
            store_zeros(DQ, offsets(batch, head, token, dq_b, dq_h, dq_t), idle, D, D0, D1)
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
    PAIR: tl.constexpr = Q.dtype.element_ty == tl.float32

    lane = lane0 + tl.arange(0, BLOCK_M)
    ok = lane < lane0 + lanes
    head = kv * GROUP + lane % GROUP
    row, batch, token, position = lane_slots(lane, ok, SLOTS, n_slots, GROUP)
    n_lanes = n_slots * GROUP
    kept = lane < tl.where(split == 0, lane0 + lanes, 0)
    high, low, delta, alive, do0, do1 = lane_delta(
        DOUT, OUT, LSE, DLSE, STATE, lane, ok, kept, batch, head, token, kv, tl.num_programs(1), n_lanes, dout_b,
        dout_h, dout_t, out_b, out_h, out_t, lse_b, lse_h, dlse_b, dlse_h, dlse_t, VD, VD0, VD1, HAS_DLSE, PAIR,
    )  # fmt: skip
    q0, q1 = load_pieces(Q, offsets(batch, head, token, q_b, q_h, q_t), alive, D, D0, D1)  # [BLOCK_M, D0 | D1]
    lowest = tl.min(tl.where(ok, position, 2147483647), 0)
    highest = tl.max(tl.where(ok, position, -2147483647), 0)
    slope2 = 0.0
    if ALIBI:
        slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
    bias = BIAS + prefix * bias_g + head.to(tl.int64) * bias_h
    skip_start, skip_end = hidden_from_all(ROWS, n_rows, row, ok)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_M, W1], tl.float32)

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
        v0, v1 = load_pieces(prefix_v, at * pv_t, seen, VD, VD0, VD1)
        s = inner(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_M, BLOCK_N]
        s, derivative = prefix_logits(
            s, n, position, prefix_len, bias, slope2, ok, factor, cap, SOFTCAP, HAS_BIAS, ALIBI, PLAIN, False
        )
        s = prefix_masked(
            s, WORDS, TILE_WORDS, n_rows, n_words, n_tiles, tile, row, first_key, position, highest, prefix_len, window,
            MASKED, BRANCH, NEAR, False, BLOCK_N,
        )  # fmt: skip
        p = probabilities(s, high, low, factor, PLAIN, PAIR, False)
        ds = p * (inner(do0, do1, v0, v1, VD1, PRECISION) - delta[:, None]) * derivative
        dq0, dq1 = accumulate(dq0, dq1, ds, k0, k1, D1, PRECISION)

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
                v0, v1 = load_pieces(V, offsets(own_batch, kv, own_token + t, v_b, v_h, v_t), seen, VD, VD0, VD1)
                s = inner(q0, q1, k0, k1, D1, PRECISION)  # [BLOCK_M, OWN_N]
                s, derivative = own_logits(s, t, position, slope2, factor, cap, SOFTCAP, ALIBI, PLAIN, False)
                visible = own_visible(t, seen, position, mine, window, CAUSAL, WINDOW, False)
                p = probabilities(tl.where(visible, s, -float("inf")), high, low, factor, PLAIN, PAIR, False)
                ds = p * (inner(do0, do1, v0, v1, VD1, PRECISION) - delta[:, None]) * derivative
                # other rows have p = 0, which must not meet a NaN; a lane that sees one in k has it in lse, too
                ds = tl.where(visible, ds, 0.0)
                k0, k1 = only(all_finite(k0, k1, D1), k0, k1)
                dq0, dq1 = accumulate(dq0, dq1, ds, k0, k1, D1, PRECISION)

    lane, ok, batch, head, token = result_lanes(TILES, n_tiles, tile, kv, SLOTS, n_slots, GROUP, BLOCK_M)
    if SPLITS == 1:
        store_pieces(DQ, offsets(batch, head, token, dq_b, dq_h, dq_t), dq0 * scale, dq1 * scale, ok, D, D0, D1)
    else:
        at = (split * tl.num_programs(1) + kv).to(tl.int64) * n_lanes + lane
        store_pieces(PART_Q, at * D, dq0 * scale, dq1 * scale, ok, D, D0, D1)


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high", "window"])
def own_kernel(
    Q, K, V, SLOPES, KEEP, ROWS, OWN, DOUT, STATE, DK, DV,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, dout_b, dout_h, dout_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    n_rows, n_slots, n_own, P, length, drop_below, seed_low, seed_high, factor, cap, scale, window,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, W1: tl.constexpr,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, VW1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, NEED_K: tl.constexpr, NEED_V: tl.constexpr,
    PADDED: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr, OWN_CONTEXT: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (own blocks, Hk): dk, dv of BLOCK_N own keys of one row; zeros for tokens of no row. PADDED: padding may
    follow a row's own keys."""
    kv = tl.program_id(1)
    row = tl.load(OWN + OWN_ROW * n_own + tl.program_id(0))
    first_t = tl.load(OWN + OWN_BLOCK * n_own + tl.program_id(0)) * BLOCK_N
    t = first_t + tl.arange(0, BLOCK_N)
    if row < 0:
        token = tl.load(OWN + OWN_TOKEN * n_own + tl.program_id(0)) + t
        idle = t < tl.load(OWN + OWN_KEYS * n_own + tl.program_id(0))
        if NEED_K:
            store_zeros(DK, offsets(row + 1, kv, token, dk_b, dk_h, dk_t), idle, D, D0, D1)
        if NEED_V:
            store_zeros(DV, offsets(row + 1, kv, token, dv_b, dv_h, dv_t), idle, VD, VD0, VD1)
        return
    PAIR: tl.constexpr = Q.dtype.element_ty == tl.float32
    first = tl.load(ROWS + ROW_FIRST * n_rows + row)
    queries = tl.load(ROWS + ROW_QUERIES * n_rows + row)
    keys = tl.load(ROWS + ROW_KEYS * n_rows + row)
    offset = tl.load(ROWS + ROW_OFFSET * n_rows + row)
    batch = tl.load(ROWS + ROW_BATCH * n_rows + row)
    token0 = tl.load(ROWS + ROW_TOKEN * n_rows + row)
    seen = own_seen(
        ROWS, KEEP, n_rows, row, t, keys, P, length, drop_below, seed_low, seed_high, OWN_CONTEXT, DROP, KEPT
    )
    k0, k1 = load_pieces(K, offsets(batch, kv, token0 + t, k_b, k_h, k_t), seen, D, D0, D1)  # [BLOCK_N, D0 | D1]
    v0, v1 = load_pieces(V, offsets(batch, kv, token0 + t, v_b, v_h, v_t), seen, VD, VD0, VD1)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_N, W1], tl.float32)
    dv0 = tl.zeros([BLOCK_N, VD0], tl.float32)
    dv1 = tl.zeros([BLOCK_N, VW1], tl.float32)

    begin, end = 0, queries  # queries that may see these keys
    if CAUSAL:
        begin = tl.maximum(first_t - offset, 0)
    elif PADDED:
        end = tl.where(first_t < keys, queries, 0)
    if WINDOW:
        end = tl.minimum(end, first_t + BLOCK_N - 1 + window - offset)
    n_lanes = n_slots * GROUP
    lane_end = (first + end) * GROUP
    for start in range((first + begin) * GROUP, lane_end, BLOCK_M):
        lane = start + tl.arange(0, BLOCK_M)
        ok = lane < lane_end
        head = kv * GROUP + lane % GROUP
        query = lane // GROUP - first
        position = query + offset
        high, low, delta, alive = lane_state(STATE, lane, ok, kv, tl.num_programs(1), n_lanes, PAIR)
        q0, q1 = load_pieces(Q, offsets(batch, head, token0 + query, q_b, q_h, q_t), alive, D, D0, D1)
        do0, do1 = load_pieces(DOUT, offsets(batch, head, token0 + query, dout_b, dout_h, dout_t), alive, VD, VD0, VD1)
        slope2 = 0.0
        if ALIBI:
            slope2 = tl.load(SLOPES + head, mask=ok, other=0.0) * LOG2E
        s = inner(k0, k1, q0, q1, D1, PRECISION)  # [BLOCK_N, BLOCK_M]
        s, derivative = own_logits(s, t, position, slope2, factor, cap, SOFTCAP, ALIBI, PLAIN, True)
        s = tl.where(own_visible(t, seen, position, ok, window, CAUSAL, WINDOW, True), s, -float("inf"))
        p = probabilities(s, high, low, factor, PLAIN, PAIR, True)
        if NEED_V:
            dv0, dv1 = accumulate(dv0, dv1, p, do0, do1, VD1, PRECISION)
        if NEED_K:
            ds = p * (inner(v0, v1, do0, do1, VD1, PRECISION) - delta[None, :]) * derivative
            dk0, dk1 = accumulate(dk0, dk1, ds, q0, q1, D1, PRECISION)
    valid = t < keys
    if NEED_K:
        store_pieces(DK, offsets(batch, kv, token0 + t, dk_b, dk_h, dk_t), dk0 * scale, dk1 * scale, valid, D, D0, D1)
    if NEED_V:
        store_pieces(DV, offsets(batch, kv, token0 + t, dv_b, dv_h, dv_t), dv0, dv1, valid, VD, VD0, VD1)
    if PADDED:  # zeros for padding, whatever a dout of NaN has left there
        padding = ~valid & (t < tl.load(OWN + OWN_KEYS * n_own + tl.program_id(0)))
        if NEED_K:
            store_zeros(DK, offsets(batch, kv, token0 + t, dk_b, dk_h, dk_t), padding, D, D0, D1)
        if NEED_V:
            store_zeros(DV, offsets(batch, kv, token0 + t, dv_b, dv_h, dv_t), padding, VD, VD0, VD1)
