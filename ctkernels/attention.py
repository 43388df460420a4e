"""The public op: attention of many short rows over one shared, trainable KV prefix.

Reading order: this file (arguments and their checks) -> mask.py -> problem.py -> dispatch.py (which backend) -> ops.py
(registered operators, autograd) -> one backend. prepare.py: what layers share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctkernels import dispatch, dispatch_table, ops
from ctkernels.backends import finite, reference
from ctkernels.mask import ContextMask
from ctkernels.prepare import NOTHING, Decided, PreparedMask
from ctkernels.problem import Problem, check_values

MAX_HEAD_DIM = 512
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# asked once: torch 2.11 cannot compile the question
_AUTOCAST = tuple(device for device in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(device))


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: ContextMask | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    seq_lens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    window_prefix: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of B rows over the concatenation `[shared prefix | the row's own keys]`.

    For query i of row b and head h, over the visible keys j:

        logit_j = softcap(scale * <q_i, key_j>) + prefix_bias_j - alibi_slopes_h * distance(i, j)
        out_i = sum_j softmax_j(logit) value_j        lse_i = log sum_j exp(logit_j)

    `sinks` add exp(sinks_h) to the denominator of the softmax, but not to lse: out_i is then multiplied by
    sigmoid(lse_i - sinks_h).

    Every prefix key is in the past. The query at own position i sees own key t iff t <= i. `mask` hides context
    positions. Two rows of three tokens that leave out their own demonstration (`#` visible, `.` hidden):

        prefix     demo 0  demo 1  demo 2 | own keys
        row 0      ....    ####    ####   | #..
                   ....    ####    ####   | ##.
                   ....    ####    ####   | ###
        row 2      ####    ####    ....   | #..   and so on

    The prefix has no batch dimension: all rows read it in place. Its gradient is the sum over all rows, all their
    queries and all heads of a KV group. It is accumulated in fp32 (fp64 for fp64 inputs) in a fixed order, so the same
    inputs give the same bits. Nothing of size B x P is kept for the backward pass. During a pass, GPU kernels use one
    bit per row and prefix token.

    Args:
        q: `[B, H, S, D]`, fp32, bf16, fp16 (fp64 on CPU), D <= 512; any strides with a contiguous last dimension.
        k, v: `[B, Hk, T, D]`, q's type, T >= S, H divisible by Hk; v may have a head dimension Dv <= 512 of its own.
            With T > S (decoding) the queries are the last S of a row's valid keys.
        prefix_k, prefix_v: `[Hk, P, D]`, or `[G, Hk, P, D]` for G prefixes; prefix_v has v's Dv in place of D. Their
            type is q's, or fp32 with bf16/fp16 rows: then they are rounded on load, with an fp32 gradient. On GPUs, a
            NaN or infinity in them may reach rows that must not see it (docs/numerics.md).
        mask: context mask (leave-one-out spans, token dropout, explicit pattern).
        prefix_index: integer `[B]`, the prefix that each row reads.
        prefix_lens: integer `[G]`, valid length of each prefix (default P).
        seq_lens: integer `[B]`, number of valid own keys of each row, the rest being padding on the right (default T).
            Padding queries get out = 0 and lse = -inf.
        causal: False lets a query see every valid own key.
        scale: factor of the logits (default 1/sqrt(D)).
        window: a query sees only keys less than `window` positions back, counted along `[prefix | own keys]`.
        window_prefix: False makes the prefix visible whatever the window.
        softcap: c > 0 replaces a logit x by c * tanh(x / c).
        alibi_slopes: `[H]`, fp32, not differentiable.
        prefix_bias: `[P]`, `[H, P]` or `[G, H, P]`, floating, added to the logits of prefix keys; differentiable.
        sinks: `[H]`, floating, a logit per head that has no value (attention sinks of gpt-oss); differentiable.
        return_lse: also return lse `[B, H, S]`, fp32 (fp64 for fp64), natural logarithm; differentiable.
        backend: None or "auto", "reference", "cpu", "triton", "cuda". If a named backend cannot serve the call, an
            error says why; no other one takes its place.

    Returns:
        out `[B, H, S, Dv]` in q's type, or (out, lse). A query that sees no key gets out = 0, lse = -inf.

    Raises:
        ValueError, TypeError: an argument is not as described above. The message names it; no kernel has run.
        RuntimeError: a second derivative is needed, and the backend is not the reference.

    Source: Context Tuning for In-Context Optimization, arXiv 2507.04221.
    """
    out, lse = attend(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        mask,
        cu_seqlens=None,
        seq_lens=seq_lens,
        prefix_index=prefix_index,
        prefix_lens=prefix_lens,
        causal=causal,
        scale=scale,
        window=window,
        window_prefix=window_prefix,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        prefix_bias=prefix_bias,
        sinks=sinks,
        backend=backend,
    )
    return (out, lse) if return_lse else out


def prefix_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: ContextMask | None = None,
    *,
    prefix_index: Tensor | None = None,
    prefix_lens: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    window_prefix: bool = True,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    prefix_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`prefix_attention` over rows packed one after another, without padding.

    Args:
        q: `[N, H, D]`, N tokens of all rows together.
        k, v: `[N, Hk, D]`; v may have a head dimension Dv of its own.
        cu_seqlens: int32 `[B+1]`; row b is tokens cu_seqlens[b] to cu_seqlens[b+1]. It starts at 0, never decreases and
            ends at N.
        All other arguments: as in `prefix_attention`.

    Returns:
        out `[N, H, Dv]`, or (out, lse) with lse `[N, H]`.

    Raises:
        ValueError, TypeError, RuntimeError: as `prefix_attention`.
    """
    q, k, v = _rows(q, k, v, "[N, H, D]", "[N, Hk, D]")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's {q.shape[0]} tokens, got shape {tuple(k.shape)}")
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 tensor [B+1], got {_kind(cu_seqlens)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must be an int32 tensor [B+1], got shape {tuple(cu_seqlens.shape)}")
    out, lse = attend(
        q.transpose(0, 1).unsqueeze(0),
        k.transpose(0, 1).unsqueeze(0),
        v.transpose(0, 1).unsqueeze(0),
        prefix_k,
        prefix_v,
        mask,
        cu_seqlens=cu_seqlens,
        seq_lens=None,
        prefix_index=prefix_index,
        prefix_lens=prefix_lens,
        causal=causal,
        scale=scale,
        window=window,
        window_prefix=window_prefix,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        prefix_bias=prefix_bias,
        sinks=sinks,
        backend=backend,
    )
    out, lse = (x.squeeze(0).transpose(0, 1) for x in (out, lse))
    return (out, lse) if return_lse else out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: ContextMask | None,
    *,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor | None,
    prefix_index: Tensor | None,
    prefix_lens: Tensor | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    window_prefix: bool,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    prefix_bias: Tensor | None,
    sinks: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Both public calls: q `[B, H, S, D]`, or `[1, H, N, D]` with cu_seqlens. Returns (out, lse) in that layout.

    What has been checked and decided of a call is kept by a mask from `prepare`, for calls that are like it.
    """
    inputs: Any = (q, k, v, prefix_k, prefix_v, prefix_bias, sinks)
    problem_tensors = (cu_seqlens, seq_lens, prefix_index, prefix_lens, alibi_slopes)
    options = (causal, scale, window, window_prefix, softcap, backend)
    key = _likeness(inputs, problem_tensors, options) if isinstance(mask, PreparedMask) else None
    decided = mask.decided.get(key) if isinstance(mask, PreparedMask) and key is not None else None
    if decided is None:
        decided, inputs = _decide(inputs, mask, problem_tensors, options)
        if decided.choice.forward == "reference":
            problem = decided.problem
            if not torch.compiler.is_compiling():
                check_values(inputs[0], inputs[1], inputs[3], problem)
                if finite.enabled():
                    finite.check_inputs(*(*inputs, problem))
            with torch.autocast(q.device.type, enabled=False):
                return reference.prefix_attention(*(*inputs, problem))
        if isinstance(mask, PreparedMask) and key is not None:
            mask.remember(key, decided)
    elif prefix_bias is not None:
        inputs = (q, k, v, prefix_k, prefix_v, _three(prefix_bias), sinks)
    prepared = NOTHING
    if isinstance(mask, PreparedMask):
        prepared = mask.of_call(decided, (prefix_k, prefix_v), inputs[:6])
    return ops.attend(inputs, prepared, *decided, direct=key is not None)


def _likeness(
    inputs: Sequence[Tensor | None], problem_tensors: Sequence[Tensor | None], options: tuple
) -> tuple | None:
    """What a call's checks and decisions depend on besides its mask; None: not known, or operators are looked for."""
    q = inputs[0]
    if ops.looked_for() or type(q) not in ops.PLAIN or q is None:
        return None
    if torch.is_autocast_enabled(q.device.type) and q.device.type in _AUTOCAST:
        return None
    described: list[object] = [*options]
    for option in options:
        described.append(type(option))
    for x in inputs:
        if x is None:
            described.append(None)
        elif type(x) in ops.PLAIN and x.dim():
            described += (x.shape, x.dtype, x.device, x.stride(-1))
        else:
            return None
    for x in problem_tensors:
        if x is None:
            described.append(None)
        elif type(x) in ops.PLAIN:  # an id means the same tensor as long as the decision holds it
            described += (id(x), x.shape, x.dtype, x.device, x.requires_grad)
        else:
            return None
    return tuple(described)


def _decide(inputs: Any, mask: ContextMask | None, problem_tensors: Any, options: Any) -> tuple[Decided, Any]:
    """The problem and the backends of a call after all checks, and its inputs as backends take them. Arguments as in
    `attend`."""
    q, k, v, prefix_k, prefix_v, prefix_bias, sinks = inputs
    cu_seqlens, seq_lens, prefix_index, prefix_lens, alibi_slopes = problem_tensors
    causal, scale, window, window_prefix, softcap, backend = options
    q, k, v = _rows(q, k, v, "[B, H, S, D]", "[B, Hk, T, D]")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's batch size {q.shape[0]}, got shape {tuple(k.shape)}")
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"k must have at least as many positions as q (T >= S = {q.shape[2]}), got T = {k.shape[2]}")
    prefix_k, prefix_v = _prefixes(q, k, v, prefix_k, prefix_v)
    G, _, P, D = prefix_k.shape
    Dv = prefix_v.shape[3]
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if mask is None:
        mask = ContextMask()
    elif not isinstance(mask, ContextMask):
        raise TypeError(f"mask must be a ContextMask or None, got {_kind(mask)}")
    context_length = P if mask.length is None else mask.length
    for name, tensor, size in (
        ("prefix_index", prefix_index, rows),
        ("seq_lens", seq_lens, rows),
        ("prefix_lens", prefix_lens, G),
        ("mask.row_ids", mask.row_ids, rows),
    ):
        _check_vector(name, tensor, size, q.device)
    _check_vector("cu_seqlens", cu_seqlens, rows + 1, q.device)
    if prefix_index is None and G != 1 and rows:
        raise ValueError(f"prefix_index must be given for G = {G} prefixes, got None")
    _check_mask(mask, rows, context_length, q.device)
    prefix_bias = _check_bias(prefix_bias, G, q.shape[1], P, q)
    _check_slopes(alibi_slopes, q)
    _check_sinks(sinks, q)
    for name, flag in (("causal", causal), ("window_prefix", window_prefix)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool, got {_kind(flag)}")
    # heads(D, Dv) are numbers, while torch.compile may know D and Dv only as symbols
    choice = dispatch.choose(backend, q.device, q.dtype, *dispatch_table.heads(D, Dv))
    problem = Problem(
        alibi_slopes=alibi_slopes,
        cu_seqlens=cu_seqlens,
        seq_lens=seq_lens,
        prefix_index=prefix_index,
        prefix_lens=prefix_lens,
        hidden=mask.hidden,
        row_ids=mask.row_ids,
        keep=mask.keep,
        seed_in_memory=mask.seed if isinstance(mask.seed, Tensor) else None,
        context_length=context_length,
        drop_p=float(mask.drop_p),
        seed=0 if isinstance(mask.seed, Tensor) else mask.seed if mask.seed < 2**63 else mask.seed - 2**64,
        scale=_check_number("scale", scale, 1.0 / math.sqrt(max(D, 1))),
        causal=causal,
        window=_check_window(window),
        window_prefix=window_prefix,
        softcap=_check_softcap(softcap),
    )
    # kernels read any strides in place if the last dimension is contiguous
    q, k, v, prefix_k, prefix_v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, prefix_k, prefix_v))
    return Decided(problem, choice), (q, k, v, prefix_k, prefix_v, prefix_bias, sinks)


def _rows(q: Tensor, k: Tensor, v: Tensor, q_shape: str, k_shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Check q, k and v in the caller's layout, and cast them under autocast. Heads are dimension 1 in both layouts."""
    for name, x, shape in (("q", q, q_shape), ("k", k, k_shape), ("v", v, k_shape)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor {shape}, got {_kind(x)}")
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    q, k, v = _autocast(q, k, v)
    if q.dtype not in ROW_DTYPES:
        raise TypeError(f"q must be fp32, bf16, fp16 or fp64, got {q.dtype}")
    H, Hk, D = q.shape[1], k.shape[1], q.shape[-1]
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's type {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if k.shape[-1] != D:
        raise ValueError(f"k must have q's head dimension D = {D}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v must have k's shape {tuple(k.shape)} but for the last dimension, got {tuple(v.shape)}")
    for name, dimension, size in (("q", "D", D), ("v", "Dv", v.shape[-1])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head dimension {dimension} in [1, {MAX_HEAD_DIM}], got {size}")
    if Hk == 0 or H % Hk:
        raise ValueError(f"q's heads H must be a multiple of k's heads Hk >= 1, got H = {H}, Hk = {Hk}")
    return q, k, v


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of scaled_dot_product_attention. The prefix keeps its own type."""
    device = tensors[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _prefixes(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> tuple[Tensor, Tensor]:
    """Check the prefixes and give them the shapes `[G, Hk, P, D]` and `[G, Hk, P, Dv]`."""
    Hk = k.shape[1]
    for name, x, own, dimension in (("prefix_k", prefix_k, "k", k.shape[3]), ("prefix_v", prefix_v, "v", v.shape[3])):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [Hk, P, D] or [G, Hk, P, D], got {_kind(x)}")
        if x.dim() not in (3, 4):
            raise ValueError(f"{name} must have shape [Hk, P, D] or [G, Hk, P, D], got {tuple(x.shape)}")
        if x.shape[-3] != Hk or x.shape[-1] != dimension:
            raise ValueError(
                f"{name} must have Hk = {Hk} heads of dimension {dimension} as {own}, got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype and not (x.dtype == torch.float32 and q.dtype in (torch.bfloat16, torch.float16)):
            raise TypeError(f"{name} must have q's type {q.dtype}, or fp32 with bf16/fp16 rows, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {x.device}")
    if prefix_k.shape[:-1] != prefix_v.shape[:-1]:
        shape = f"{tuple(prefix_k.shape)} but for the last dimension"
        raise ValueError(f"prefix_v must have prefix_k's shape {shape}, got {tuple(prefix_v.shape)}")
    if prefix_k.dtype != prefix_v.dtype:
        raise TypeError(f"prefix_v must have prefix_k's type {prefix_k.dtype}, got {prefix_v.dtype}")
    return (prefix_k, prefix_v) if prefix_k.dim() == 4 else (prefix_k.unsqueeze(0), prefix_v.unsqueeze(0))


def _check_vector(name: str, x: Tensor | None, size: int, device: torch.device) -> None:
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor [{size}], got {_kind(x)}")
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{name} must have shape [{size}], got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {x.device}")


def _check_mask(mask: ContextMask, rows: int, context_length: int, device: torch.device) -> None:
    for name, x, shape in (
        ("mask.hidden", mask.hidden, (rows, 2)),
        ("mask.keep", mask.keep, (rows, context_length)),
    ):
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on q's device {device}, got {x.device}")
    if isinstance(mask.seed, Tensor) and mask.seed.device != device:
        raise ValueError(f"mask.seed must be on q's device {device}, got {mask.seed.device}")


def _check_bias(bias: Tensor | None, G: int, H: int, P: int, q: Tensor) -> Tensor | None:
    """Check the bias and give it the shape `[1 or G, 1 or H, P]`."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        raise TypeError(f"prefix_bias must be a floating tensor [P], [H, P] or [G, H, P], got {_kind(bias)}")
    if bias.device != q.device:
        raise ValueError(f"prefix_bias must be on q's device {q.device}, got {bias.device}")
    if all(tuple(bias.shape) != shape for shape in ((P,), (H, P), (G, H, P))):
        raise ValueError(f"prefix_bias must have shape [{P}], [{H}, {P}] or [{G}, {H}, {P}], got {tuple(bias.shape)}")
    return _three(bias)


def _three(bias: Tensor) -> Tensor:
    return bias.reshape((1,) * (3 - bias.dim()) + tuple(bias.shape))


def _check_slopes(slopes: Tensor | None, q: Tensor) -> None:
    if slopes is None:
        return
    if not isinstance(slopes, Tensor) or not slopes.is_floating_point():
        raise TypeError(f"alibi_slopes must be a floating tensor [H], got {_kind(slopes)}")
    if tuple(slopes.shape) != (q.shape[1],):
        raise ValueError(f"alibi_slopes must have shape [{q.shape[1]}], got {tuple(slopes.shape)}")
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes must be on q's device {q.device}, got {slopes.device}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: none is computed; pass alibi_slopes.detach()")


def _check_sinks(sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(f"sinks must be a floating tensor [H], got {_kind(sinks)}")
    if tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks must have shape [{q.shape[1]}], got {tuple(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"sinks must be on q's device {q.device}, got {sinks.device}")


def _check_number(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _check_window(window: int | None) -> int:
    if window is None:
        return 0
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"window must be an integer >= 1 or None, got {_kind(window)}")
    if window < 1:
        raise ValueError(f"window must be an integer >= 1 or None, got {window}")
    return window


def _check_softcap(softcap: float | None) -> float:
    value = _check_number("softcap", softcap, 0.0)
    if softcap is not None and value <= 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    return value


def _kind(value: object) -> str:
    return str(value.dtype) + f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
