"""An fp32 prefix under 16-bit rows: rounded to their type once per call, for all tiles that read it.

Each tile of lanes and each key block of the backward pass would otherwise convert what it loads: a sixth of all
instructions, and products that take fp32 from shared memory through bank conflicts.
"""

import triton
import triton.language as tl

from ctkernels.backends.triton.tile import load_pieces, store_pieces


@triton.jit
def round_kernel(
    PREFIX_K, PREFIX_V, ROUNDED_K, ROUNDED_V, pk_g, pk_h, pk_t, pv_g, pv_h, pv_t, P,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    VD: tl.constexpr, VD0: tl.constexpr, VD1: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, Hk, G). PREFIX_K, PREFIX_V fp32 [G, Hk, P, D | VD] by strides; the ROUNDED_ ones contiguous."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at, inside = n.to(tl.int64), n < P
    kv, prefix = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k0, k1 = load_pieces(
        PREFIX_K + prefix * pk_g + kv.to(tl.int64) * pk_h, at * pk_t, inside, D, D0, D1
    )  # [BLOCK_N, D0 | D1]
    v0, v1 = load_pieces(PREFIX_V + prefix * pv_g + kv.to(tl.int64) * pv_h, at * pv_t, inside, VD, VD0, VD1)
    to = (prefix * tl.num_programs(1) + kv) * P + at
    store_pieces(ROUNDED_K, to * D, k0, k1, inside, D, D0, D1)
    store_pieces(ROUNDED_V, to * VD, v0, v1, inside, VD, VD0, VD1)
