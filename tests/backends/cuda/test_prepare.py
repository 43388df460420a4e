"""`ctkernels.prepare` on the CUDA kernels: what is launched per layer, and that no bit changes."""

import pytest
import torch
from torch import Tensor

import ctkernels as ct
from ctkernels.testing.models import make_model, tokens
from ctkernels.tuning.adapters.prefix import KVPrefix
from tools.gpu.cuda.emulated import BACKEND, Emulator, running_on

pytestmark = pytest.mark.needs_nvcc

LAYERS, ROWS, H, HK, P, D = 2, (9, 16, 4), 4, 2, 520, 64
FEW, MANY = 1, 40  # multiprocessors: enough work for all of them, or work that is cut into ranges
# Beyond the first layer. FlashAttention-2 has 1 and 3.
FORWARD = {FEW: ["forward_bf16_64_plain", "fill_out_bf16"], MANY: ["forward_bf16_64_plain", "merge_out_bf16"]}
BACKWARD = {
    FEW: ["delta_bf16", "query_bf16_64_plain", "keys_bf16_64_plain"],
    MANY: ["delta_bf16", "query_bf16_64_plain", "keys_bf16_64_plain", "sum_parts"],
}
SET_UP = ["setup_rows", "setup_tiles"]


def rows(layer: int) -> list[Tensor]:
    """q, k, v `[N, heads, D]` of a layer."""
    draw = torch.Generator().manual_seed(layer)
    return [torch.randn(sum(ROWS), heads, D, generator=draw).bfloat16().requires_grad_() for heads in (H, HK, HK)]


@pytest.fixture
def prefixes() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(100)
    one = lambda: torch.randn(HK, P, D, generator=draw).requires_grad_()  # noqa: E731
    return [(one(), one()) for _ in range(LAYERS)]


@pytest.fixture
def bounds() -> Tensor:
    return torch.tensor([0, *ROWS]).cumsum(0).to(torch.int32)


def a_mask(**more) -> ct.ContextMask:
    return ct.ContextMask(hidden=torch.tensor([[0, 70], [64, 192], [0, 0]]), drop_p=0.2, seed=5, **more)


def step(mask, bounds, prefixes, emulator, **options) -> tuple[list[list[str]], list[Tensor]]:
    """All layers forward, then all backward: names of the launches of each call, and results and gradients."""
    launched, results = [], []

    def seen() -> list[str]:
        names = [name.removeprefix("ctk_") for name in emulator.launched]
        emulator.launched.clear()
        return names

    outs, inputs = [], [[*rows(layer), *prefix] for layer, prefix in enumerate(prefixes)]
    for q, k, v, prefix_k, prefix_v in inputs:
        outs.append(
            ct.prefix_attention_varlen(
                q, k, v, bounds, prefix_k, prefix_v, mask, backend=BACKEND.name, return_lse=True, **options
            )
        )
        launched.append(seen())
    for (out, lse), leaves in zip(reversed(outs), reversed(inputs), strict=True):
        gradients = torch.autograd.grad((out, lse), leaves, (out.detach() * 0.5, torch.ones_like(lse)))
        launched.append(seen())
        results += [out.detach(), lse.detach(), *gradients]
    return launched, results


@pytest.mark.parametrize("multiprocessors", [FEW, MANY])
def test_launches_and_bits(prefixes, bounds, multiprocessors):
    with running_on(Emulator(multiprocessors=multiprocessors)) as emulator:
        plain, expected = step(a_mask(), bounds, prefixes, emulator)
        prepared, got = step(ct.prepare(a_mask(), prefixes), bounds, prefixes, emulator)
    forward, backward = FORWARD[multiprocessors], BACKWARD[multiprocessors]
    assert len(forward) <= 2 and len(backward) <= 4
    assert plain == [[*SET_UP, "pack", *forward]] * LAYERS + [[*SET_UP, "pack", *backward]] * LAYERS
    # the first layer makes the tables of both directions
    assert prepared == [[*SET_UP * 2, *forward], *[forward] * (LAYERS - 1), *[backward] * LAYERS]
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_attached_models_prepare_every_forward_pass():
    model = make_model("llama", torch.bfloat16)
    layers = model.config.num_hidden_layers
    prefix = KVPrefix.from_tokens(model, tokens(12, seed=2), torch.tensor([0, 5, 12]))
    mask = ct.ContextMask.leave_one_out(prefix.segments, torch.tensor([0, 1]), drop_p=0.2)
    bounds = torch.tensor([0, 4, 7], dtype=torch.int32)
    with running_on(Emulator()) as emulator, prefix.attach(model, mask, cu_seqlens=bounds, backend=BACKEND.name):
        for _ in range(2):
            emulator.launched.clear()
            model(tokens(1, 7, seed=3)).logits.float().square().mean().backward()
            kernels = [name.removeprefix("ctk_").split("_bf16")[0] for name in emulator.launched]
            backward = ["delta", "query", "keys"] * (layers - 1) + ["delta", "keys"]  # the first layer needs no dq
            assert kernels == SET_UP * 2 + ["forward", "fill_out"] * layers + backward
