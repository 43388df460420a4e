"""Registered operators: schemas, fakes, autograd.

Forward and backward are operators of their own: torch.compile, opcheck, selective checkpointing and profilers see them
by name. Arguments:

    q [B, H, S, D], k [B, Hk, T, D], v [B, Hk, T, Dv]   with cu_seqlens: B = 1, and the rows packed along S and T
    prefix_k [G, Hk, P, D], prefix_v [G, Hk, P, Dv], prefix_bias [1 or G, 1 or H, P], sinks [H]
    the fields of Prepared, those of Problem, then those of Choice

An operator calls the backend that Choice names. The backend checks values that could make it read outside of a tensor.
Backends know nothing of sinks: `backends/sinks.py` puts them around any of them.

Where nothing looks for operators (no compiler, transform, mode, profiler or subclass), a call goes to its backend at
once: the way through the operators takes longer than everything else that Python does for a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctkernels import dispatch
from ctkernels.backends import finite
from ctkernels.backends import sinks as sink
from ctkernels.backends.check import expect
from ctkernels.dispatch import Choice
from ctkernels.problem import PROBLEM_TENSORS, Prepared, Problem, compute_dtype

INPUTS_SCHEMA = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor? prefix_bias, Tensor? sinks"
INPUT_COUNT = 7
SETTINGS_SCHEMA = (  # the fields of Prepared, of Problem, and of Choice
    "Tensor? forward_tables, Tensor? backward_tables, Tensor? prepared_prefix_k, Tensor? prepared_prefix_v, "
    "Tensor? alibi_slopes, Tensor? cu_seqlens, Tensor? seq_lens, Tensor? prefix_index, Tensor? prefix_lens, "
    "Tensor? hidden, Tensor? row_ids, Tensor? keep, Tensor? seed_in_memory, SymInt context_length, float drop_p, "
    "SymInt seed, float scale, bool causal, SymInt window, bool window_prefix, float softcap, str forward_backend, "
    "str backward_backend"
)
SETTINGS_TENSORS = len(Prepared._fields) + PROBLEM_TENSORS
SETTINGS_COUNT = len(Prepared._fields) + len(Problem._fields) + len(Choice._fields)

torch.library.define("ctkernels::prefix_attention", f"({INPUTS_SCHEMA}, {SETTINGS_SCHEMA}) -> (Tensor out, Tensor lse)")
torch.library.define(
    "ctkernels::prefix_attention_backward",
    f"(Tensor dout, Tensor? dlse, {INPUTS_SCHEMA}, Tensor out, Tensor lse, bool[{INPUT_COUNT}] needs, "
    f"{SETTINGS_SCHEMA}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dprefix_k, Tensor dprefix_v, Tensor dprefix_bias, "
    "Tensor dsinks)",
)
prefix_attention = torch.ops.ctkernels.prefix_attention.default
prefix_attention_backward = torch.ops.ctkernels.prefix_attention_backward.default


def _split(settings) -> tuple[Prepared, Problem, Choice]:
    first, end = len(Prepared._fields), len(Prepared._fields) + len(Problem._fields)
    return Prepared(*settings[:first]), Problem(*settings[first:end]), Choice(*settings[end:])


def _known(backend: ModuleType, prepared: Prepared) -> dict[str, Prepared]:
    return {"prepared": prepared} if hasattr(backend, "tables") and any(x is not None for x in prepared) else {}


def _forward(q, k, v, prefix_k, prefix_v, prefix_bias, sinks, *settings):
    return _compute(q, k, v, prefix_k, prefix_v, prefix_bias, sinks, *_split(settings))


def _compute(q, k, v, prefix_k, prefix_v, prefix_bias, sinks, prepared, problem, choice):
    if finite.enabled():
        finite.check_inputs(q, k, v, prefix_k, prefix_v, prefix_bias, sinks, problem)
    backend = dispatch.load(choice.forward)
    out, lse = backend.forward(q, k, v, prefix_k, prefix_v, prefix_bias, problem, **_known(backend, prepared))
    if sinks is not None:
        sink.apply(out, lse, sinks)
    return out, lse


def _backward(dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, sinks, out, lse, needs, *settings):
    inputs = (q, k, v, prefix_k, prefix_v, prefix_bias, sinks)
    return _compute_backward(dout, dlse, *inputs, out, lse, needs, *_split(settings))


def _compute_backward(
    dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, sinks, out, lse, needs, prepared, problem, choice
):
    if finite.enabled():
        finite.check_gradients(dout, dlse, lse)
    inputs = (q, k, v, prefix_k, prefix_v, prefix_bias)
    *kernel_needs, needs_sinks = needs
    dsinks = q.new_empty(0)
    if needs_sinks:
        expect(sinks is not None, "the gradient of absent sinks is asked for")
        dsinks = sink.gradient(dout, out, lse, sinks)
    if not any(kernel_needs):
        return *empty_gradients(*inputs, kernel_needs), dsinks
    backend = dispatch.load(choice.backward)
    extra = _known(backend, prepared)
    if sinks is not None:
        if getattr(backend, "USES_DS_SUM", False):
            extra["ds_sum"] = sink.sum_of_ds(dout, dlse, out, lse, sinks)
        dout, lse = sink.before_backward(dout, dlse, out, lse, sinks)
    grads = backend.backward(dout, dlse, *inputs, out, lse, kernel_needs, problem, **extra)
    return *grads, dsinks


torch.library.impl("ctkernels::prefix_attention", ("cpu", "cuda"), _forward)
torch.library.impl("ctkernels::prefix_attention_backward", ("cpu", "cuda"), _backward)


@torch.library.register_fake("ctkernels::prefix_attention")
def _forward_fake(q, k, v, *others):
    return empty_rows(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


@torch.library.register_fake("ctkernels::prefix_attention_backward")
def _backward_fake(dout, dlse, q, k, v, prefix_k, prefix_v, prefix_bias, sinks, out, lse, needs, *settings):
    dsinks = torch.empty_like(sinks) if needs[-1] else q.new_empty(0)
    return *empty_gradients(q, k, v, prefix_k, prefix_v, prefix_bias, needs[:-1]), dsinks


def empty_rows(x: Tensor, D: int) -> Tensor:
    """Uninitialised `[B, H, S, D]` for x `[B, H, S, ..]`, in memory as B, S, H, D: the order that the layers around
    attention use."""
    B, H, S, _ = x.shape
    return x.new_empty(B, S, H, D).transpose(1, 2)


def empty_gradients(q, k, v, prefix_k, prefix_v, prefix_bias, needs) -> tuple[Tensor, ...]:
    """Uninitialised gradients. A gradient that is not needed has no elements."""
    rows = [empty_rows(x, x.shape[3]) if need else x.new_empty(0) for x, need in zip((q, k, v), needs[:3], strict=True)]
    shared = [
        x.new_empty(x.shape if need else 0)
        for x, need in zip((prefix_k, prefix_v, q if prefix_bias is None else prefix_bias), needs[3:], strict=True)
    ]
    return (*rows, *shared)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[: INPUT_COUNT + SETTINGS_TENSORS], *output)
    ctx.settings = inputs[INPUT_COUNT + SETTINGS_TENSORS :]
    ctx.set_materialize_grads(False)


def _gradients(ctx, backward, dout: Tensor | None, dlse: Tensor | None, needs: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments, None where there is none. `backward` is the operator, or calls it."""
    nothing = (None,) * SETTINGS_COUNT
    if dout is None and dlse is None:
        return (None,) * INPUT_COUNT + nothing
    saved = ctx.saved_tensors
    inputs, tensors = saved[:INPUT_COUNT], saved[INPUT_COUNT : INPUT_COUNT + SETTINGS_TENSORS]
    out, lse = saved[INPUT_COUNT + SETTINGS_TENSORS :]
    if dout is None:
        dout = torch.zeros_like(out)
    grads = backward(dout, dlse, *inputs, out, lse, needs, *tensors, *ctx.settings)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing


class _Attention(torch.autograd.Function):
    """The derivative of the operator.

    It is registered under the Autograd key directly. `register_autograd` would add 0.1 ms per call for a schema of this
    length, since it looks up every argument's default.
    """

    @staticmethod
    def forward(ctx, keyset, *inputs):
        output = _below_autograd(keyset, *inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        needs = list(ctx.needs_input_grad[1 : 1 + INPUT_COUNT])
        return None, *_gradients(ctx, prefix_attention_backward, dout, dlse, needs)


def _below_autograd(keyset, *inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return prefix_attention.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _autograd(keyset, *inputs):
    if forward_ad._current_level >= 0:
        _refuse_tangents(inputs[:INPUT_COUNT])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:INPUT_COUNT]):
        return _Attention.apply(keyset, *inputs)
    return _below_autograd(keyset, *inputs)


_library = torch.library.Library("ctkernels", "FRAGMENT")
_library.impl("prefix_attention", _autograd, "Autograd", with_keyset=True)


def _refuse_second_derivative(ctx, *grads: Tensor | None):
    raise RuntimeError(
        "ctkernels.prefix_attention has no second derivative in its kernel backends; use backend='reference'"
    )


torch.library.register_autograd("ctkernels::prefix_attention_backward", _refuse_second_derivative)


def _refuse_tangents(inputs) -> None:
    """Raise RuntimeError for inputs with forward-mode derivatives, which the operator would silently drop."""
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise RuntimeError(
            "ctkernels.prefix_attention has no forward-mode derivative in its kernel backends; use backend='reference'"
        )


class _Transformed(torch.autograd.Function):
    """`_Attention` for torch.func's transforms, which need `setup_context`. vmap calls the operator once per entry."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return prefix_attention(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        return _gradients(ctx, _TransformedBackward.apply, dout, dlse, list(ctx.needs_input_grad[:INPUT_COUNT]))


class _TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return prefix_attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_refuse_second_derivative)


class _Direct(torch.autograd.Function):
    """`_Attention` without an operator."""

    @staticmethod
    def forward(ctx, q, k, v, prefix_k, prefix_v, prefix_bias, sinks, settings):
        prepared, problem, choice = settings
        ctx.alone = prefix_k.dim() == 3
        inputs = _as_sets((q, k, v, prefix_k, prefix_v, prefix_bias, sinks))
        out, lse = _compute(*inputs, prepared, problem, choice)
        ctx.save_for_backward(*inputs, *prepared, *problem[:PROBLEM_TENSORS], out, lse)
        ctx.settings = (*problem[PROBLEM_TENSORS:], *choice)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        needs = list(ctx.needs_input_grad[:INPUT_COUNT])
        operator = torch.is_grad_enabled() or looked_for()  # it knows what to say to a second derivative
        backward = prefix_attention_backward if operator else _backward
        *grads, dprefix_k, dprefix_v, dbias, dsinks = _gradients(ctx, backward, dout, dlse, needs)[:INPUT_COUNT]
        if ctx.alone:
            dprefix_k, dprefix_v = (x if x is None else x.squeeze(0) for x in (dprefix_k, dprefix_v))
        return *grads, dprefix_k, dprefix_v, dbias, dsinks, None


PLAIN = (Tensor, torch.nn.Parameter, type(None))


def _as_sets(inputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The inputs with prefixes of four dimensions."""
    q, k, v, prefix_k, prefix_v, *others = inputs
    if prefix_k is None or prefix_v is None or prefix_k.dim() == 4:
        return inputs
    return q, k, v, prefix_k.unsqueeze(0), prefix_v.unsqueeze(0), *others


def looked_for() -> bool:
    """Whether somebody may want to see the operators that are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def attend(
    inputs: Sequence[Tensor | None], prepared: Prepared, problem: Problem, choice: Choice, direct: bool = False
) -> tuple[Tensor, Tensor]:
    """The op on its inputs, q to sinks; prefixes may have three dimensions. `direct`: nobody looks for operators."""
    if direct or (not looked_for() and all(type(x) in PLAIN for x in inputs)):
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
            return _Direct.apply(*inputs, (prepared, problem, choice))
        return _compute(*(*_as_sets(inputs), prepared, problem, choice))
    return _operator(*_as_sets(inputs), *prepared, *problem, *choice)


def _operator(*inputs) -> tuple[Tensor, Tensor]:
    """Call the operator, in the form that an active transform of torch.func can differentiate."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        if forward_ad._current_level >= 0:
            _refuse_tangents(inputs[:INPUT_COUNT])
        return _Transformed.apply(*inputs)
    return prefix_attention(*inputs)
