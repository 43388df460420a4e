"""Who sees what. `visible_positions` is the one function that states the context rule for Triton; a change of the rule
is a change there. `ctkernels/mask.py` states it for Python, `csrc/mask.h` for C++; tests compare them bit for bit.

`words_kernel` applies the rule to the prefix once per pass: a bit for each (row, prefix key). Whatever the mask, a tile
then loads one word per lane and 32 keys. `tile_words_kernel` joins the rows of a tile: which keys some row sees (others
are loaded as zeros, and a block without any is skipped), and which keys all rows see (a block of these needs no mask
arithmetic). Both run in the forward pass and again in the backward pass; nothing is kept in between.
"""

import triton
import triton.language as tl

from ctkernels.backends.triton.tile import (
    ROW_HIDE_END,
    ROW_HIDE_START,
    ROW_ID,
    ROW_INDEX,
    ROW_PREFIX_LEN,
    ROW_QUERIES,
    TILE_ROW,
    TILE_ROWS,
    across,
    along,
    tile_value,
)

WORD: tl.constexpr = tl.constexpr(32)  # keys


@triton.jit
def seed_word(word):
    """Half of the seed as uint32, given as it is, or as where it lies in memory."""
    return tl.load(word).to(tl.uint32, bitcast=True) if word.dtype.is_ptr() else word.to(tl.uint32, bitcast=True)


@triton.jit
def kept_words(quad, row_id, seed_low, seed_high, drop_below):
    """Token dropout of four positions at once: bits 0..3, set where position 4 * quad + bit of the row is kept."""
    below = drop_below.to(tl.uint32, bitcast=True)
    c0, c1 = tl.broadcast(quad.to(tl.uint32), row_id.to(tl.uint32, bitcast=True))
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, zero, zero, seed_word(seed_low), seed_word(seed_high), 10)
    bits = (w0 >= below).to(tl.int32) | ((w1 >= below).to(tl.int32) << 1)
    return bits | ((w2 >= below).to(tl.int32) << 2) | ((w3 >= below).to(tl.int32) << 3)


@triton.jit
def low_bits(count):
    """int32 with the lowest `count` bits set, count clamped to [0, 32]."""
    one = tl.full(count.shape, 1, tl.int32)
    short = (one << tl.minimum(tl.maximum(count, 0), 31)) - 1
    return tl.where(count > 31, -1, short)


@triton.jit
def visible_positions(
    first, ok, row_id, hide_start, hide_end, keep, length, drop_below, seed_low, seed_high,
    N: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """THE context rule. int32 [X], of which bit i < N is set where a row sees its context position first + i: outside
    of the row's hidden span, kept by its pattern, and not dropped. Positions from `length` on are not context, and
    visible.

    first [X]: multiples of 4; N: 4 to 32. row_id, hide_start, hide_end [X] and keep [X], pointers to the row's pattern,
    which is read where `ok` [X]. One evaluation of the random stream serves four positions.
    """
    seen = low_bits(hide_start - first) | ~low_bits(hide_end - first)
    if DROP:
        quad = tl.arange(0, N // 4)
        kept = kept_words((first // 4)[:, None] + quad[None, :], row_id[:, None], seed_low, seed_high, drop_below)
        seen = seen & tl.sum(kept << (4 * quad)[None, :], 1)  # disjoint bits
    if KEPT:
        n = tl.arange(0, N)
        c = first[:, None] + n[None, :]
        kept = tl.load(keep[:, None] + c, mask=ok[:, None] & (c < length), other=1)
        seen = seen & tl.sum((kept != 0).to(tl.int32) << n[None, :], 1)
    return seen | ~low_bits(length - first)


@triton.jit(do_not_specialize=["length", "drop_below", "seed_low", "seed_high"])
def words_kernel(
    KEEP, ROWS, WORDS, n_rows, length, drop_below, seed_low, seed_high,
    DROP: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (words, blocks of rows). WORDS int32 [words, rows]: bit j of word w is set where the row sees prefix key
    32 w + j."""
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) * WORD + tl.zeros_like(row)
    ok = row < n_rows
    at = ROWS + row
    row_id = tl.load(at + ROW_ID * n_rows, mask=ok, other=0)
    hide_start = tl.load(at + ROW_HIDE_START * n_rows, mask=ok, other=0)
    hide_end = tl.load(at + ROW_HIDE_END * n_rows, mask=ok, other=0)
    keep = KEEP + tl.load(at + ROW_INDEX * n_rows, mask=ok, other=0).to(tl.int64) * length
    words = visible_positions(
        first, ok, row_id, hide_start, hide_end, keep, length, drop_below, seed_low, seed_high, WORD, DROP, KEPT
    )
    prefix_len = tl.load(at + ROW_PREFIX_LEN * n_rows, mask=ok, other=0)
    tl.store(WORDS + tl.program_id(0).to(tl.int64) * n_rows + row, words & low_bits(prefix_len - first), mask=ok)


@triton.jit
def either(a, b):
    return a | b


@triton.jit
def tile_words_kernel(
    ROWS, TILES, WORDS, TILE_WORDS, n_rows, n_tiles, n_words, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Grid (tiles, blocks of words). TILE_WORDS int32 [2, words, tiles]: what some, and what all rows of a tile see."""
    tile = tl.program_id(0)
    row0, rows = tile_value(TILES, n_tiles, tile, TILE_ROW), tile_value(TILES, n_tiles, tile, TILE_ROWS)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    ok = word < n_words
    some = tl.zeros([BLOCK_W], tl.int32)
    not_all = tl.zeros([BLOCK_W], tl.int32)
    for start in range(row0, row0 + rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        asks = row < row0 + rows
        asks = asks & (tl.load(ROWS + ROW_QUERIES * n_rows + row, mask=asks, other=0) > 0)
        at = WORDS + word.to(tl.int64)[:, None] * n_rows + row[None, :]
        words = tl.load(at, mask=ok[:, None] & asks[None, :], other=0)  # [BLOCK_W, BLOCK]
        some |= tl.reduce(words, 1, either)
        not_all |= tl.reduce(tl.where(asks[None, :], ~words, 0), 1, either)
    at = TILE_WORDS + word.to(tl.int64) * n_tiles + tile
    tl.store(at, some, mask=ok)
    tl.store(at + n_words.to(tl.int64) * n_tiles, ~not_all, mask=ok)


@triton.jit
def seen_by_tile(TILE_WORDS, n_tiles, tile, n):
    """Which of the prefix keys n [BLOCK_N] some row of the tile sees. Others are loaded as zeros: nothing in them must
    reach a product."""
    word = tl.load(TILE_WORDS + (n // WORD).to(tl.int64) * n_tiles + tile)
    return ((word >> (n % WORD)) & 1) != 0


@triton.jit
def block_word(TILE_WORDS, n_tiles, tile, first_key, BLOCK_N: tl.constexpr, ALL: tl.constexpr):
    """The words of a block of at most 64 keys in one: 0 if it has no bit set; with ALL, -1 if it has all of them."""
    at = TILE_WORDS + (first_key // WORD).to(tl.int64) * n_tiles + tile
    word = tl.load(at)
    if BLOCK_N < 32:
        bits: tl.constexpr = (1 << BLOCK_N) - 1
        word = (word >> (first_key % WORD)) & bits
        if ALL:
            word = tl.where(word == bits, -1, 0)
    if BLOCK_N > 32:
        word = (word & tl.load(at + n_tiles)) if ALL else (word | tl.load(at + n_tiles))
    return word


@triton.jit
def seen_by_lanes(WORDS, n_rows, row, first_key, KEYS_FIRST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which lane sees which of the prefix keys first_key .. first_key + BLOCK_N - 1, bool tile; row [BLOCK_M] is the
    lane's."""
    at = WORDS + (first_key // WORD).to(tl.int64) * n_rows + row
    word = tl.load(at)
    n = tl.arange(0, BLOCK_N)
    if BLOCK_N < 32:
        word = word >> (first_key % WORD)
    bits = along(word, KEYS_FIRST)
    if BLOCK_N > 32:
        bits = tl.where(across(n < 32, KEYS_FIRST), bits, along(tl.load(at + n_rows), KEYS_FIRST))
    return (bits & across(1 << (n % WORD), KEYS_FIRST)) != 0


@triton.jit
def prefix_masked(
    s, WORDS, TILE_WORDS, n_rows, n_words, n_tiles, tile, row, first_key, position, highest, prefix_len, window,
    MASKED: tl.constexpr, BRANCH: tl.constexpr, NEAR: tl.constexpr, KEYS_FIRST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of prefix keys first_key .. first_key + BLOCK_N - 1 with -inf where a lane does not see a key.

    MASKED: by the rows' words, else by the prefix's length. BRANCH: full tiles, which have no hidden pair, are frequent
    enough to look for, and returned as they are. NEAR: a window that includes the prefix; highest: last position of
    the lanes.
    """
    partial = True
    if BRANCH:
        if MASKED:
            all_words = TILE_WORDS + n_words.to(tl.int64) * n_tiles
            partial = block_word(all_words, n_tiles, tile, first_key, BLOCK_N, True) != -1
        else:
            partial = first_key + BLOCK_N > prefix_len
        if NEAR:
            partial = partial | (prefix_len + highest - first_key >= window)
    if partial:
        key = across(first_key + tl.arange(0, BLOCK_N), KEYS_FIRST)
        visible = seen_by_lanes(WORDS, n_rows, row, first_key, KEYS_FIRST, BLOCK_N) if MASKED else key < prefix_len
        if NEAR:
            visible = visible & (along(prefix_len + position, KEYS_FIRST) - key < window)
        s = tl.where(visible, s, -float("inf"))
    return s


@triton.jit
def own_seen(
    ROWS, KEEP, n_rows, row, t, keys, P, length, drop_below, seed_low, seed_high,
    OWN_CONTEXT: tl.constexpr, DROP: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Own keys t [BLOCK_N] of a row that are valid and not hidden by a context that reaches into them."""
    seen = t < keys
    if OWN_CONTEXT:
        c = P + t
        at = ROWS + row + tl.zeros_like(t)
        row_id = tl.load(at + ROW_ID * n_rows)
        hide_start = tl.load(at + ROW_HIDE_START * n_rows)
        hide_end = tl.load(at + ROW_HIDE_END * n_rows)
        keep = KEEP + tl.load(at + ROW_INDEX * n_rows).to(tl.int64) * length
        bits = visible_positions(
            c // 4 * 4, seen, row_id, hide_start, hide_end, keep, length, drop_below, seed_low, seed_high, 4, DROP, KEPT
        )
        seen = seen & (((bits >> (c & 3)) & 1) != 0)
    return seen


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
