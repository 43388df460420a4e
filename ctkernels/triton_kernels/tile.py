"""What all Triton kernels share: the context rule, lanes of a tile, two-piece head dimensions, logits.

The context rule is stated once here for Triton; `ctkernels/mask.py` and `csrc/mask.h` state it for Python and C++, and
the tests hold them against each other bit for bit.

A tile of logits is [BLOCK_M lanes, BLOCK_N keys], or [BLOCK_N, BLOCK_M] in the kernels that own keys (KEYS_FIRST),
whose products take it from registers. Logits are kept in units of log 2, so that exp2 needs no factor.

A head dimension D is read as D0 + D1, powers of two with zeros behind D: 80 as 64 + 16, 96 as 64 + 32, where padding
to 128 would cost 1.6 and 1.3 times the work. D1 = 0 where one piece will do; the second one is then an unused [.., 1].
"""

import triton
import triton.language as tl

from ctkernels.triton_kernels import tables

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# log2(e) as the sum of two fp32 numbers
LOG2E_HIGH: tl.constexpr = tl.constexpr(1.4426950216293335)
LOG2E_LOW: tl.constexpr = tl.constexpr(1.925963033500011e-08)
INT_MAX: tl.constexpr = tl.constexpr(2**31 - 1)

ROW_FIRST: tl.constexpr = tl.constexpr(tables.ROW_FIRST)
ROW_QUERIES: tl.constexpr = tl.constexpr(tables.ROW_QUERIES)
ROW_BATCH: tl.constexpr = tl.constexpr(tables.ROW_BATCH)
ROW_TOKEN: tl.constexpr = tl.constexpr(tables.ROW_TOKEN)
ROW_KEYS: tl.constexpr = tl.constexpr(tables.ROW_KEYS)
ROW_OFFSET: tl.constexpr = tl.constexpr(tables.ROW_OFFSET)
ROW_HIDE_START: tl.constexpr = tl.constexpr(tables.ROW_HIDE_START)
ROW_HIDE_END: tl.constexpr = tl.constexpr(tables.ROW_HIDE_END)
ROW_ID: tl.constexpr = tl.constexpr(tables.ROW_ID)
ROW_INDEX: tl.constexpr = tl.constexpr(tables.ROW_INDEX)
ROW_PREFIX_LEN: tl.constexpr = tl.constexpr(tables.ROW_PREFIX_LEN)
SLOT_ROW: tl.constexpr = tl.constexpr(tables.SLOT_ROW)
SLOT_BATCH: tl.constexpr = tl.constexpr(tables.SLOT_BATCH)
SLOT_TOKEN: tl.constexpr = tl.constexpr(tables.SLOT_TOKEN)
SLOT_POSITION: tl.constexpr = tl.constexpr(tables.SLOT_POSITION)
TILE_PREFIX: tl.constexpr = tl.constexpr(tables.TILE_PREFIX)
TILE_ROW: tl.constexpr = tl.constexpr(tables.TILE_ROW)
TILE_ROWS: tl.constexpr = tl.constexpr(tables.TILE_ROWS)
TILE_LANE: tl.constexpr = tl.constexpr(tables.TILE_LANE)
TILE_LANES: tl.constexpr = tl.constexpr(tables.TILE_LANES)
TILE_PREFIX_LEN: tl.constexpr = tl.constexpr(tables.TILE_PREFIX_LEN)
TILE_SKIP_START: tl.constexpr = tl.constexpr(tables.TILE_SKIP_START)
TILE_SKIP_END: tl.constexpr = tl.constexpr(tables.TILE_SKIP_END)
TILE_HULL_START: tl.constexpr = tl.constexpr(tables.TILE_HULL_START)
TILE_HULL_END: tl.constexpr = tl.constexpr(tables.TILE_HULL_END)


@triton.jit
def along(lane, KEYS_FIRST: tl.constexpr):
    """A vector over lanes, broadcast over the keys of a tile."""
    return lane[None, :] if KEYS_FIRST else lane[:, None]


@triton.jit
def across(key, KEYS_FIRST: tl.constexpr):
    """A vector over keys, broadcast over the lanes of a tile."""
    return key[:, None] if KEYS_FIRST else key[None, :]


@triton.jit
def load_pieces(base, offset, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows at base + offset[row], zero where not mask[row]: [rows, D0] and [rows, D1 or 1]."""
    d0 = tl.arange(0, D0)
    at = base + offset[:, None]
    if D0 > D:
        x0 = tl.load(at + d0[None, :], mask=mask[:, None] & (d0 < D)[None, :], other=0.0)
    else:
        x0 = tl.load(at + d0[None, :], mask=mask[:, None], other=0.0)
    if D1 == 0:
        x1 = tl.zeros([offset.shape[0], 1], x0.dtype)
    else:
        d1 = D0 + tl.arange(0, D1)
        x1 = tl.load(at + d1[None, :], mask=mask[:, None] & (d1 < D)[None, :], other=0.0)
    return x0, x1


@triton.jit
def store_pieces(base, offset, x0, x1, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    d0 = tl.arange(0, D0)
    at = base + offset[:, None]
    tl.store(at + d0[None, :], x0.to(base.dtype.element_ty), mask=mask[:, None] & (d0 < D)[None, :])
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        tl.store(at + d1[None, :], x1.to(base.dtype.element_ty), mask=mask[:, None] & (d1 < D)[None, :])


@triton.jit
def inner(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the head dimension: [rows of a, rows of b], fp32."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), acc=s, input_precision=PRECISION)
    return s


@triton.jit
def accumulate(acc0, acc1, p, x0, x1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p x, with p rounded to the type of x."""
    p = p.to(x0.dtype)
    acc0 = tl.dot(p, x0, acc=acc0, input_precision=PRECISION)
    if D1 > 0:
        acc1 = tl.dot(p, x1, acc=acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def kept_words(quad, row_id, seed_low, seed_high, drop_below):
    """Token dropout of four positions at once: bits 0..3, set where position 4 * quad + bit of the row is kept."""
    below = drop_below.to(tl.uint32, bitcast=True)
    c0, c1 = tl.broadcast(quad.to(tl.uint32), row_id.to(tl.uint32, bitcast=True))
    zero = tl.zeros_like(c0)
    low, high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, zero, zero, low, high, 10)
    bits = (w0 >= below).to(tl.int32) | ((w1 >= below).to(tl.int32) << 1)
    return bits | ((w2 >= below).to(tl.int32) << 2) | ((w3 >= below).to(tl.int32) << 3)


@triton.jit
def low_bits(count):
    """int64 with the lowest `count` bits set, count clamped to [0, 64]."""
    one = tl.full(count.shape, 1, tl.int64)
    short = (one << tl.minimum(tl.maximum(count, 0), 63).to(tl.int64)) - 1
    return tl.where(count > 63, -1, short)


@triton.jit
def context_words(
    row_id, hide_start, hide_end, keep, present, k0, prefix_len, length, drop_below, seed_low, seed_high,
    DROP: tl.constexpr, KEPT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Prefix keys k0 .. k0 + BLOCK_N - 1 that each row of a tile sees: bit j of an int64 per row.

    One evaluation of the random stream serves four keys of a row, whatever the number of lanes the row has.
    row_id, hide_start, hide_end, present [ROWS]; keep: pointers [ROWS] to the rows' patterns; k0: a multiple of 4.
    """
    words = tl.full(row_id.shape, -1, tl.int64)
    if DROP:
        quad = tl.arange(0, BLOCK_N // 4)
        kept = kept_words((k0 // 4 + quad)[None, :], row_id[:, None], seed_low, seed_high, drop_below)
        words = tl.sum(kept.to(tl.int64) << (4 * quad)[None, :].to(tl.int64), 1)  # disjoint bits
    if KEPT:
        n = tl.arange(0, BLOCK_N)
        kept = tl.load(keep[:, None] + (k0 + n)[None, :], mask=(k0 + n < length)[None, :], other=1)
        words = words & tl.sum((kept != 0).to(tl.int64) << n[None, :].to(tl.int64), 1)
    words = words & (low_bits(hide_start - k0) | ~low_bits(hide_end - k0))
    none = tl.zeros_like(row_id)
    words = words | ~low_bits(length - k0 + none)  # keys from `length` on are not context
    return tl.where(present, words & low_bits(prefix_len - k0 + none), 0)


@triton.jit
def seen_by_any(words, BLOCK_N: tl.constexpr):
    """Keys that some row sees, bool [BLOCK_N]. Others are loaded as zeros: nothing in them must reach a product."""
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    return tl.max(((words[:, None] >> n[None, :]) & 1).to(tl.int32), 0) != 0


@triton.jit
def seen_by_lanes(words, slot, KEYS_FIRST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which lane sees which key, bool tile; slot [BLOCK_M] is the lane's row within the tile."""
    word = tl.gather(words, slot, 0)  # [BLOCK_M]
    n = across(tl.arange(0, BLOCK_N), KEYS_FIRST)
    bits = along(word.to(tl.int32), KEYS_FIRST)
    if BLOCK_N > 32:
        bits = tl.where(n < 32, bits, along((word >> 32).to(tl.int32), KEYS_FIRST))
    return ((bits >> (n & 31)) & 1) != 0


@triton.jit
def own_context(
    c, row_id, hide_start, hide_end, keep, length, drop_below, seed_low, seed_high,
    DROP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The context rule for positions c [BLOCK_N] of one row, bool [BLOCK_N]: contexts that reach into own keys."""
    seen = (c < hide_start) | (c >= hide_end)
    if DROP:
        kept = kept_words(c // 4, row_id + tl.zeros_like(c), seed_low, seed_high, drop_below)
        seen = seen & (((kept >> (c & 3)) & 1) != 0)
    if KEPT:
        seen = seen & (tl.load(keep + c, mask=c < length, other=1) != 0)
    return seen | (c >= length)


@triton.jit
def tanh(x):
    """Within two units in the last place: a polynomial around zero, where 1 - 2 / (e^2x + 1) would cancel."""
    z = x * x
    p = -0.005509968847036362 * z + 0.02046389691531658
    p = p * z - 0.05368597432971001
    p = p * z + 0.13330799341201782
    p = p * z - 0.3333325982093811
    a = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(a * (2 * LOG2E)) + 1.0)
    return tl.where(a < 0.65, x + x * z * p, tl.where(x < 0, -far, far))


@triton.jit
def capped(s, factor, cap, SOFTCAP: tl.constexpr):
    """Logits in units of log 2 from products q k, and d logit / d (factor * product) up to the constant `cap`.

    Without softcap, factor = scale * log2(e). With it, factor = scale / c and cap = c * log2(e).
    """
    if SOFTCAP:
        t = tanh(s * factor)
        s = t * cap
        slope = 1.0 - t * t
    else:
        s = s * factor
        slope = 1.0
    return s, slope


@triton.jit
def tile_value(TILES, n_tiles, tile, COLUMN: tl.constexpr):
    return tl.load(TILES + COLUMN * n_tiles + tile)


@triton.jit
def lane_slots(lane, ok, SLOTS, n_slots, GROUP: tl.constexpr):
    """Row, batch index, token and own position of each lane's query, int32 [BLOCK_M]."""
    at = SLOTS + lane // GROUP
    row = tl.load(at + SLOT_ROW * n_slots, mask=ok, other=0)
    batch = tl.load(at + SLOT_BATCH * n_slots, mask=ok, other=0)
    token = tl.load(at + SLOT_TOKEN * n_slots, mask=ok, other=0)
    position = tl.load(at + SLOT_POSITION * n_slots, mask=ok, other=0)
    return row, batch, token, position


@triton.jit
def lane_spans(ROWS, n_rows, row, ok, HIDDEN: tl.constexpr):
    """Hidden span of each lane's row, int32 [BLOCK_M]; row [BLOCK_M] is its index in the rows table."""
    start, end = row, row  # empty
    if HIDDEN:
        start = tl.load(ROWS + ROW_HIDE_START * n_rows + row, mask=ok, other=0)
        end = tl.load(ROWS + ROW_HIDE_END * n_rows + row, mask=ok, other=0)
    return start, end


@triton.jit
def offsets(batch, head, token, stride_b, stride_h, stride_t):
    """64-bit element offsets of [batch, head, token]."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t


@triton.jit
def tile_rows(ROWS, n_rows, row0, count, KEEP, length, LIMIT: tl.constexpr):
    """row_id, hide_start, hide_end, pointers to the patterns of the rows of a tile, and whether it has so many rows."""
    r = tl.arange(0, LIMIT)
    at = ROWS + row0 + r
    ok = r < count
    row_id = tl.load(at + ROW_ID * n_rows, mask=ok, other=0)
    hide_start = tl.load(at + ROW_HIDE_START * n_rows, mask=ok, other=0)
    hide_end = tl.load(at + ROW_HIDE_END * n_rows, mask=ok, other=0)
    index = tl.load(at + ROW_INDEX * n_rows, mask=ok, other=0)
    return row_id, hide_start, hide_end, KEEP + index.to(tl.int64) * length, ok


@triton.jit
def split_lse(lse, alive):
    """lse in units of log 2 as the sum of two fp32 numbers, (inf, 0) for lanes that see nothing: there p = 0.

    A single fp32 number would carry a rounding of the size of lse into every probability.
    """
    high = lse * LOG2E_HIGH
    low = tl.fma(lse, LOG2E_HIGH, -high) + lse * LOG2E_LOW
    return tl.where(alive, high, float("inf")), tl.where(alive, low, 0.0)


@triton.jit
def prefix_blocks(
    begin, end, skip_start, skip_end, prefix_len, lowest, window, BLOCK_N: tl.constexpr, NEAR: tl.constexpr
):
    """Which of the key blocks begin .. end - 1 a tile visits: first block, number of blocks, where the blocks hidden
    from all of its rows begin, and how many those are. `lowest`: position of the tile's first query; NEAR: a window
    that includes the prefix."""
    end = tl.minimum(end, tl.cdiv(prefix_len, BLOCK_N))
    if NEAR:
        begin = tl.maximum(begin, tl.maximum(prefix_len + lowest - window + 1, 0) // BLOCK_N)
    end = tl.maximum(begin, end)
    skip = tl.minimum(tl.maximum(tl.cdiv(skip_start, BLOCK_N), begin), end)
    skipped = tl.minimum(tl.maximum(skip_end // BLOCK_N, skip), end) - skip
    return begin, end - begin - skipped, skip, skipped


@triton.jit
def own_blocks(
    ROWS, n_rows, row, lane0, lanes, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Own keys of one row that its queries in a tile may see: first and last-plus-one key, the former a multiple of
    BLOCK_N; then the row's number of keys."""
    first = tl.load(ROWS + ROW_FIRST * n_rows + row)
    queries = tl.load(ROWS + ROW_QUERIES * n_rows + row)
    keys = tl.load(ROWS + ROW_KEYS * n_rows + row)
    shift = tl.load(ROWS + ROW_OFFSET * n_rows + row) - first
    lane_begin = tl.maximum(lane0, first * GROUP)
    lane_end = tl.minimum(lane0 + lanes, (first + queries) * GROUP)
    begin = 0
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (lane_end - 1) // GROUP + shift + 1)
    if WINDOW:
        begin = tl.maximum(lane_begin // GROUP + shift - window + 1, 0) // BLOCK_N * BLOCK_N
    end = tl.where(lane_begin < lane_end, end, begin)
    return begin, end, keys


@triton.jit
def prefix_logits(
    s, n, position, prefix_len, bias, slope2, ok, factor, cap,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Logits (units of log 2) of prefix keys n [BLOCK_N] from products q k, and the softcap's derivative.

    bias: pointers [BLOCK_M] to a lane's bias of prefix key 0; slope2: ALiBi slopes times log2(e).
    """
    s, derivative = capped(s, factor, cap, SOFTCAP)
    if BIAS:
        here = along(ok, KEYS_FIRST) & across(n < prefix_len, KEYS_FIRST)
        s += tl.load(along(bias, KEYS_FIRST) + across(n, KEYS_FIRST), mask=here, other=0.0) * LOG2E
    if ALIBI:
        distance = along(prefix_len + position, KEYS_FIRST) - across(n, KEYS_FIRST)
        s -= along(slope2, KEYS_FIRST) * distance.to(tl.float32)
    return s, derivative


@triton.jit
def own_logits(
    s, t, position, slope2, factor, cap, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Logits (units of log 2) of own keys t [BLOCK_N], and the softcap's derivative."""
    s, derivative = capped(s, factor, cap, SOFTCAP)
    if ALIBI:
        distance = along(position, KEYS_FIRST) - across(t, KEYS_FIRST)
        s -= along(slope2, KEYS_FIRST) * distance.to(tl.float32)
    return s, derivative


@triton.jit
def prefix_masked(
    s, words, slot, hide_start, hide_end, hull_start, hull_end, k0, position, highest, prefix_len, window,
    WORDS: tl.constexpr, HIDDEN: tl.constexpr, NEAR: tl.constexpr, KEYS_FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of prefix keys k0 .. k0 + BLOCK_N - 1 with -inf where a lane does not see a key.

    From the rows' words (WORDS), or from the lanes' spans [BLOCK_M]; then a full tile, which has no hidden pair, is
    returned as it is. No row hides anything outside of hull_start .. hull_end; highest: last position of the lanes.
    """
    if WORDS:
        visible = seen_by_lanes(words, slot, KEYS_FIRST, BLOCK_N)
        if NEAR:
            key = across(k0 + tl.arange(0, BLOCK_N), KEYS_FIRST)
            visible = visible & (along(prefix_len + position, KEYS_FIRST) - key < window)
        s = tl.where(visible, s, -float("inf"))
    else:
        partial = k0 + BLOCK_N > prefix_len
        if HIDDEN:
            partial = partial | ((k0 < hull_end) & (k0 + BLOCK_N > hull_start))
        if NEAR:
            partial = partial | (prefix_len + highest - k0 >= window)
        if partial:
            key = across(k0 + tl.arange(0, BLOCK_N), KEYS_FIRST)
            visible = key < prefix_len
            if HIDDEN:
                visible = visible & ((key < along(hide_start, KEYS_FIRST)) | (key >= along(hide_end, KEYS_FIRST)))
            if NEAR:
                visible = visible & (along(prefix_len + position, KEYS_FIRST) - key < window)
            s = tl.where(visible, s, -float("inf"))
    return s


@triton.jit
def own_visible(t, seen, position, mine, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which lane sees which own key t of one row, bool tile; seen [BLOCK_N], mine [BLOCK_M]: the lane's row is it."""
    visible = along(mine, KEYS_FIRST) & across(seen, KEYS_FIRST)
    distance = along(position, KEYS_FIRST) - across(t, KEYS_FIRST)
    if CAUSAL:
        visible = visible & (distance >= 0)
    if WINDOW:
        visible = visible & (distance < window)
    return visible


@triton.jit
def own_seen(
    ROWS, KEEP, n_rows, row, t, keys, P, length, drop_below, seed_low, seed_high,
    OWN_CONTEXT: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Own keys t [BLOCK_N] of a row that are valid and not hidden by a context that reaches into them."""
    seen = t < keys
    if OWN_CONTEXT:
        row_id = tl.load(ROWS + ROW_ID * n_rows + row)
        hide_start = tl.load(ROWS + ROW_HIDE_START * n_rows + row)
        hide_end = tl.load(ROWS + ROW_HIDE_END * n_rows + row)
        keep = KEEP + tl.load(ROWS + ROW_INDEX * n_rows + row).to(tl.int64) * length
        seen = seen & own_context(
            P + t, row_id, hide_start, hide_end, keep, length, drop_below, seed_low, seed_high, DROP, KEPT
        )
    return seen


@triton.jit
def lane_state(STATE, lane, ok, kv, n_kv, n_lanes):
    """What `delta_kernel` left for the lanes: lse2 in two parts, delta, and whether the lane saw any key."""
    plane = n_kv.to(tl.int64) * n_lanes
    at = STATE + kv.to(tl.int64) * n_lanes + lane
    high = tl.load(at, mask=ok, other=float("inf"))
    low = tl.load(at + plane, mask=ok, other=0.0)
    delta = tl.load(at + 2 * plane, mask=ok, other=0.0)
    return high, low, delta, high != float("inf")
