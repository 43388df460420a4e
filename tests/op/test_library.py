"""The registered operators under torch's own tools: opcheck, torch.compile, autocast."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

import ctkernels as ct
from ctkernels.ops import INPUT_COUNT
from ctkernels.testing.backends import Backend, backends
from ctkernels.testing.calls import call_op, cotangents_for, make_call, run

from .test_gradients import Recorder

OPCHECKED = {
    "plain": {},
    "everything": dict(
        types="bf16+fp32",
        G=2,
        bias=(2, 4, 11),
        sinks=True,
        prefix_index=torch.tensor([0, 1, 0]),
        prefix_lens=torch.tensor([11, 4]),
        seq_lens=torch.tensor([5, 0, 3]),
        mask=dict(
            hidden=torch.tensor([[0, 3], [3, 11], [0, 0]]),
            drop_p=0.2,
            seed=2**63,
            keep=torch.arange(33).view(3, 11) % 4 > 0,
        ),
        window=9,
        softcap=3.0,
        alibi_slopes=torch.rand(4),
    ),
    "values of their own": dict(Dv=5, sinks=True, types="fp32"),
    "packed": dict(lens=[4, 0, 3], types="fp32", mask=dict(drop_p=0.2, seed=3, row_ids=torch.tensor([5, 0, 2]))),
    "no rows": dict(B=0, types="fp32"),
}


def recorded(call, backend) -> tuple:
    """(operator, arguments) of the forward and of the backward operator, as the public function calls them."""
    call = call.to(backend.device)
    tensors = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    with Recorder() as recorder:
        outputs = call_op(replace(call, tensors=tensors), backend.name)
        torch.autograd.backward(outputs, [c.to(o) for c, o in zip(cotangents_for(call), outputs, strict=True)])
    names = ("prefix_attention", "prefix_attention_backward")
    return tuple((recorder.calls[name][0][0], recorder.calls[name][0][1]) for name in names)


@pytest.mark.parametrize("case", OPCHECKED)
def test_opcheck(kernel_backend, case):
    sizes = {"types": "fp64" if kernel_backend.double else "fp32", **OPCHECKED[case]}
    (forward, forward_args), (backward, backward_args) = recorded(make_call(**sizes), kernel_backend)
    assert forward is torch.ops.ctkernels.prefix_attention.default
    assert backward is torch.ops.ctkernels.prefix_attention_backward.default
    differentiable = tuple(
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() and i < INPUT_COUNT else x
        for i, x in enumerate(forward_args)
    )
    torch.library.opcheck(forward, forward_args)
    torch.library.opcheck(forward, differentiable)
    plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward_args)
    torch.library.opcheck(backward, plain)


def test_operators_are_registered():
    """With schemas, whether or not any kernel is built."""
    for name in ("prefix_attention", "prefix_attention_backward"):
        schema = getattr(torch.ops.ctkernels, name).default._schema
        assert not schema.is_mutable
        assert {"q", "k", "v", "prefix_k", "prefix_v", "prefix_bias", "sinks"} <= {a.name for a in schema.arguments}


class Step:
    """A training step's attention: leave-one-out with dropout, as a function of tensors and a seed."""

    def __init__(self, backend: Backend, lens: list[int] | None = None) -> None:
        self.backend = backend.name
        self.call = make_call(types="fp32", lens=lens, bias=(11,), sinks=True).to(backend.device)
        self.segments = torch.tensor([0, 4, 7, 11], device=backend.device)
        self.held_out = torch.tensor([2, -1, 0], device=backend.device)
        self.cotangents = [x.to(backend.device) for x in cotangents_for(self.call)]

    def __call__(self, tensors: dict[str, torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = ct.ContextMask.leave_one_out(self.segments, self.held_out, 0.3, seed)
        common = dict(mask=mask, return_lse=True, backend=self.backend)
        common |= {name: tensors[name] for name in ("prefix_bias", "sinks")}
        q, k, v, prefix_k, prefix_v = (tensors[n] for n in ("q", "k", "v", "prefix_k", "prefix_v"))
        if self.call.cu_seqlens is None:
            return ct.prefix_attention(q * 1.5, k, v, prefix_k, prefix_v, **common)
        return ct.prefix_attention_varlen(q * 1.5, k, v, self.call.cu_seqlens, prefix_k, prefix_v, **common)

    def values(self, function, seed: int) -> list[torch.Tensor]:
        tensors = {name: x.clone().requires_grad_() for name, x in self.call.tensors.items()}
        outputs = function(tensors, seed)
        return [*outputs, *torch.autograd.grad(outputs, list(tensors.values()), self.cotangents)]


def test_compiled_fullgraph_gives_the_same(backend):
    check_compiled(backend, None)


def test_compiled_fullgraph_gives_the_same_for_packed_rows(kernel_backend):
    """The reference unpacks rows by their lengths, which no compiler knows; the registered operators do not care."""
    check_compiled(kernel_backend, [4, 0, 7])


def check_compiled(backend: Backend, lens: list[int] | None) -> None:
    """Forward and backward, for a seed per step, and without compiling once per seed."""
    torch._dynamo.reset()
    step = Step(backend, lens)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step.__call__, fullgraph=True, backend=counter)
    for seed in [0, 1, 2**31, 5, 2**62 + 3, 2**63 - 1, 17, 123456789]:
        for expected, got in zip(step.values(step, seed), step.values(compiled, seed), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0 if backend.kernel else 1e-5)
    assert counter.frame_count <= 2


def test_compiled_with_inductor(kernel_backend):
    torch._dynamo.reset()
    step = Step(kernel_backend)
    compiled = torch.compile(step.__call__, fullgraph=True)
    for seed in (3, 4):
        for expected, got in zip(step.values(step, seed), step.values(compiled, seed), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_with_dynamic_shapes(kernel_backend):
    """One compilation serves batches of any size."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def attend(q, k, v, prefix_k, prefix_v, hidden):
        return ct.prefix_attention(
            q, k, v, prefix_k, prefix_v, ct.ContextMask(hidden=hidden, drop_p=0.2, seed=5), backend=kernel_backend.name
        )

    for B, S in ((3, 5), (4, 9), (7, 2), (2, 30)):
        hidden = torch.tensor([[b, b + 3] for b in range(B)], device=kernel_backend.device)
        call = make_call(types="fp32", B=B, S=S).to(kernel_backend.device)
        call = call.with_mask(hidden=hidden, drop_p=0.2, seed=5)
        got = attend(*call.tensors.values(), hidden)
        torch.testing.assert_close(got.cpu(), run(call, kernel_backend)["out"], rtol=0, atol=0)
    assert counter.frame_count == 1


def test_compiled_with_a_mask_as_an_argument(backend):
    torch._dynamo.reset()
    call = make_call(types="fp32").to(backend.device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(mask, q, k, v, prefix_k, prefix_v):
        return ct.prefix_attention(q, k, v, prefix_k, prefix_v, mask, backend=backend.name)

    for seed in range(12):  # more seeds than dynamo would recompile for
        mask = dict(drop_p=0.4, seed=seed)
        got = attend(ct.ContextMask(**mask), *call.tensors.values())
        torch.testing.assert_close(
            got.cpu(), run(call.with_mask(**mask), backend)["out"], rtol=0, atol=0 if backend.kernel else 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_sdpa(backend, dtype):
    """fp32 tensors come out in autocast's type and get fp32 gradients; the prefix stays in fp32."""
    call = make_call(types="fp32", mask=dict(drop_p=0.3, seed=1), bias=(11,), sinks=True).to(backend.device)
    tensors = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    with torch.autocast(backend.device, dtype=dtype):
        out, lse = call_op(replace(call, tensors=tensors), backend.name)
        stock = scaled_dot_product_attention(tensors["q"], tensors["k"], tensors["v"], enable_gqa=True)
    assert out.dtype == stock.dtype == dtype
    assert lse.dtype == torch.float32

    by_hand = call.with_tensors(**{name: call.tensors[name].to(dtype) for name in ("q", "k", "v")})
    dout, dlse = cotangents_for(by_hand)
    expected = run(by_hand, backend, (dout, dlse))
    assert torch.equal(out.cpu(), expected["out"]) and torch.equal(lse.cpu(), expected["lse"])
    for name, g in zip(
        tensors, torch.autograd.grad((out, lse), list(tensors.values()), (dout.to(out), dlse.to(lse))), strict=True
    ):
        assert g.dtype == torch.float32
        assert torch.equal(g.cpu(), expected["d" + name].float()), name


def test_autocast_unifies_types_and_can_be_switched_off(backend):
    call = make_call(types="fp32").to(backend.device)
    mixed = call.with_tensors(q=call.tensors["q"].bfloat16())
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert call_op(mixed, backend.name)[0].dtype == torch.bfloat16
        with torch.autocast(backend.device, enabled=False):
            assert call_op(call, backend.name)[0].dtype == torch.float32
            with pytest.raises(TypeError, match=r"k.*bfloat16.*float32"):
                call_op(mixed, backend.name)


def test_autocast_packed(backend):
    call = make_call(types="fp32", lens=[3, 5]).to(backend.device)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        assert call_op(call, backend.name)[0].dtype == torch.bfloat16


def test_inference_mode_and_no_grad(backend):
    call = make_call(types="fp32").to(backend.device)
    expected = run(call, backend)["out"]
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            assert torch.equal(call_op(call, backend.name)[0].cpu(), expected)


def test_auto_takes_a_kernel_where_there_is_one():
    """backend=None and "auto" give the bits of the first backend that the table lists for the device."""
    available = {b.name for b in backends()}
    call = make_call(types="fp32", mask=dict(drop_p=0.3, seed=1))
    first = "cpu" if "cpu" in available else "reference"
    expected = call_op(call, first)[0]
    for auto in (None, "auto"):
        assert torch.equal(call_op(call, auto)[0], expected)


def test_activation_checkpointing(backend):
    """Recomputation in the backward pass draws the same tokens again."""
    call = make_call(types="fp32", mask=dict(drop_p=0.3, seed=1)).to(backend.device)
    cotangents = cotangents_for(call)
    expected = run(call, backend, cotangents)
    tensors = {name: x.detach().requires_grad_() for name, x in call.tensors.items()}
    outputs = torch.utils.checkpoint.checkpoint(
        lambda *xs: call_op(replace(call, tensors=dict(zip(tensors, xs, strict=True))), backend.name),
        *tensors.values(),
        use_reentrant=False,
    )
    grads = torch.autograd.grad(
        outputs, list(tensors.values()), [c.to(o) for c, o in zip(cotangents, outputs, strict=True)]
    )
    for name, g in zip(tensors, grads, strict=True):
        assert torch.equal(g.cpu(), expected["d" + name]), name
