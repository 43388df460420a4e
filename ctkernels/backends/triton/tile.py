"""What all Triton kernels share: lanes of a tile, two-piece head dimensions, logits. `mask.py` says who sees what.

A tile of logits is [BLOCK_M lanes, BLOCK_N keys], or [BLOCK_N, BLOCK_M] in the kernels that own keys (KEYS_FIRST),
whose products take it from registers. Logits are kept in units of log 2, so that exp2 needs no factor.

A head dimension D is read as D0 + D1, powers of two with zeros after D: 80 as 64 + 16, 96 as 64 + 32, where padding
to 128 would cost 1.6 and 1.3 times the work. D1 = 0 where one piece will do; the second one is then an unused [.., 1].
Values have a head dimension VD of their own (Dv elsewhere, where no gradient is called DV), read as VD0 + VD1.
"""

import triton
import triton.language as tl

from ctkernels.backends.triton import tables

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
OWN_ROW: tl.constexpr = tl.constexpr(tables.OWN_ROW)
OWN_BLOCK: tl.constexpr = tl.constexpr(tables.OWN_BLOCK)
OWN_TOKEN: tl.constexpr = tl.constexpr(tables.OWN_TOKEN)
OWN_KEYS: tl.constexpr = tl.constexpr(tables.OWN_KEYS)


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
def finite(x):
    """Zeros for NaN and infinities, so that a probability of 0 hides them."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def only(good, x0, x1):
    """x0 | x1 with zeros for the rows that are not good [rows]."""
    return tl.where(good[:, None], x0, 0.0), tl.where(good[:, None], x1, 0.0)


@triton.jit
def all_finite(x0, x1, D1: tl.constexpr):
    """Which rows [rows] of x0 | x1 hold nothing but finite numbers. Others must not meet p = 0 in a product."""
    bad = tl.max((~(tl.abs(x0.to(tl.float32)) < float("inf"))).to(tl.int32), 1)
    if D1 > 0:
        bad |= tl.max((~(tl.abs(x1.to(tl.float32)) < float("inf"))).to(tl.int32), 1)
    return bad == 0


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
def capped(s, factor, cap, SOFTCAP: tl.constexpr, PLAIN: tl.constexpr):
    """Logits in units of log 2 from products q k, and d logit / d (factor * product) up to the constant `cap`.

    Without softcap, factor = scale * log2(e). With it, factor = scale / c and cap = c * log2(e). PLAIN: nothing but
    the factor makes logits out of products, and it is positive; `exponent` applies it, together with a subtraction.
    """
    slope = 1.0
    if SOFTCAP:
        t = tanh(s * factor)
        s = t * cap
        slope = 1.0 - t * t
    elif not PLAIN:
        s = s * factor
    return s, slope


@triton.jit
def exponent(s, base, factor, PLAIN: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """logit - base of a tile, from what `capped` returned; base [BLOCK_M], all in units of log 2."""
    if PLAIN:
        return tl.fma(s, factor, -along(base, KEYS_FIRST))
    return s - along(base, KEYS_FIRST)


@triton.jit
def probabilities(s, high, low, factor, PLAIN: tl.constexpr, PAIR: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Probabilities of a tile, from what `capped` returned, and lse2 = high [BLOCK_M] (+ low, if it is a PAIR)."""
    x = exponent(s, high, factor, PLAIN, KEYS_FIRST)
    if PAIR:
        x -= along(low, KEYS_FIRST)
    return tl.exp2(x)


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
def lane_block(ROWS, n_rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Lanes of a program that takes BLOCK_M of them whatever their tile, and which exist."""
    used = tl.load(ROWS + ROW_FIRST * n_rows + n_rows - 1) + tl.load(ROWS + ROW_QUERIES * n_rows + n_rows - 1)
    lane = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    return lane, lane < used * GROUP


@triton.jit
def idle_lanes(ROWS, n_rows, SLOTS, n_slots, tile, kv, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Lanes of tokens that belong to no row, BLOCK_M for each tile: whether one is, batch index, head, token; and
    whether any is. Their results are zeros."""
    used = tl.load(ROWS + ROW_FIRST * n_rows + n_rows - 1) + tl.load(ROWS + ROW_QUERIES * n_rows + n_rows - 1)
    lane = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    idle = (lane >= used * GROUP) & (lane < n_slots * GROUP)
    at = SLOTS + lane // GROUP
    batch = tl.load(at + SLOT_BATCH * n_slots, mask=idle, other=0)
    token = tl.load(at + SLOT_TOKEN * n_slots, mask=idle, other=0)
    return idle, batch, kv * GROUP + lane % GROUP, token, (tile + 1) * BLOCK_M > used * GROUP


@triton.jit
def store_zeros(base, offset, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Zeros for whole rows at base + offset[row]."""
    d = tl.arange(0, D0)
    zeros = tl.zeros([offset.shape[0], D0], base.dtype.element_ty)
    for start in tl.static_range(0, D0 + D1, D0):
        tl.store(base + offset[:, None] + start + d[None, :], zeros, mask=mask[:, None] & (start + d < D)[None, :])


@triton.jit
def result_lanes(TILES, n_tiles, tile, kv, SLOTS, n_slots, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Lane, whether it is one, batch index, head and token of each lane, to store results by: [BLOCK_M].

    Read again, so that they are not kept in registers: a kernel that carried them through its loops, in the layout of
    its stores, would spill. `volatile`, since Triton would otherwise use what it has read before.
    """
    lane0 = tl.load(TILES + TILE_LANE * n_tiles + tile, volatile=True)
    lane = lane0 + tl.arange(0, BLOCK_M)
    ok = lane < lane0 + tile_value(TILES, n_tiles, tile, TILE_LANES)
    at = SLOTS + lane // GROUP
    batch = tl.load(at + SLOT_BATCH * n_slots, mask=ok, other=0)
    token = tl.load(at + SLOT_TOKEN * n_slots, mask=ok, other=0)
    return lane, ok, batch, kv * GROUP + lane % GROUP, token


@triton.jit
def offsets(batch, head, token, stride_b, stride_h, stride_t):
    """64-bit element offsets of [batch, head, token]."""
    return batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t


@triton.jit
def split_lse(lse, alive):
    """lse in units of log 2 as the sum of two fp32 numbers, (inf, 0) for lanes that see nothing: there p = 0.

    A single fp32 number would carry a rounding of the size of lse into every probability, which fp32 rows would notice.
    """
    high = lse * LOG2E_HIGH
    low = tl.fma(lse, LOG2E_HIGH, -high) + lse * LOG2E_LOW
    return tl.where(alive, high, float("inf")), tl.where(alive, low, 0.0)


@triton.jit
def hidden_from_all(ROWS, n_rows, row, ok):
    """Range of context positions that all lanes' rows hide, empty if it does not end after its start; row [BLOCK_M]."""
    start = tl.load(ROWS + ROW_HIDE_START * n_rows + row, mask=ok, other=0)
    end = tl.load(ROWS + ROW_HIDE_END * n_rows + row, mask=ok, other=INT_MAX)
    return tl.max(start, 0), tl.min(end, 0)


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
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Logits (units of log 2) of prefix keys n [BLOCK_N] from products q k, and the softcap's derivative.

    bias: pointers [BLOCK_M] to a lane's bias of prefix key 0; slope2: ALiBi slopes times log2(e).
    """
    s, derivative = capped(s, factor, cap, SOFTCAP, PLAIN)
    if BIAS:
        here = along(ok, KEYS_FIRST) & across(n < prefix_len, KEYS_FIRST)
        s += tl.load(along(bias, KEYS_FIRST) + across(n, KEYS_FIRST), mask=here, other=0.0).to(tl.float32) * LOG2E
    if ALIBI:
        distance = along(prefix_len + position, KEYS_FIRST) - across(n, KEYS_FIRST)
        s -= along(slope2, KEYS_FIRST) * distance.to(tl.float32)
    return s, derivative


@triton.jit
def own_logits(
    s, t, position, slope2, factor, cap,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, PLAIN: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Logits (units of log 2) of own keys t [BLOCK_N], and the softcap's derivative."""
    s, derivative = capped(s, factor, cap, SOFTCAP, PLAIN)
    if ALIBI:
        distance = along(position, KEYS_FIRST) - across(t, KEYS_FIRST)
        s -= along(slope2, KEYS_FIRST) * distance.to(tl.float32)
    return s, derivative


@triton.jit
def lane_state(STATE, lane, ok, kv, n_kv, n_lanes, PAIR: tl.constexpr):
    """What `lane_delta` left for the lanes: lse2 (low only of a PAIR), delta, and whether the lane saw any key."""
    plane = n_kv.to(tl.int64) * n_lanes
    at = STATE + kv.to(tl.int64) * n_lanes + lane
    high = tl.load(at, mask=ok, other=float("inf"))
    delta = tl.load(at + plane, mask=ok, other=0.0)
    low = 0.0
    if PAIR:
        low = tl.load(at + 2 * plane, mask=ok, other=0.0)
    return high, low, delta, high != float("inf")
