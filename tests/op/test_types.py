"""Storage types: every value survives loading and storing, and an fp32 prefix is rounded to the rows' type."""

import pytest
import torch

import ctkernels as ct
from ctkernels import dispatch
from ctkernels.testing.calls import cotangents_for, make_call, run
from ctkernels.testing.compare import assert_matches

HALVES = [torch.float16, torch.bfloat16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type, subnormal ones too; zeros in place of the rest. [65536]"""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))


def assert_kept(got: torch.Tensor, values: torch.Tensor, build) -> None:
    """All values pass, but the CPU's bf16 units take subnormal numbers for zero."""
    if build.isa in dispatch.BF16_ISAS and values.dtype == torch.bfloat16:
        flushed = (got == 0) & (values.abs() < torch.finfo(values.dtype).tiny)
        got = torch.where(flushed, values, got)
    assert torch.equal(got, values)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_passes_unchanged(build, dtype):
    """A row of one token that sees only itself gives back its value."""
    v = every_value(dtype).view(256, 1, 1, 256).to(build.device)
    q = torch.ones_like(v)
    empty = v.new_zeros(1, 0, 256)
    assert_kept(ct.prefix_attention(q, q, v, empty, empty, backend=build.name), v, build)


@pytest.mark.parametrize("dtype", HALVES)
def test_prefix_is_rounded_to_nearest_even_on_load(build, dtype):
    """One fp32 prefix value per output, own keys hidden: ties, neighbours of ties, subnormal and overflowing values."""
    exact = every_value(dtype).float()
    after = torch.cat([exact[1:], exact[:1]])
    middle = (exact.double() + after.double()).mul(0.5).float()
    up, down = (torch.nextafter(middle, torch.full_like(middle, s * float("inf"))) for s in (1, -1))
    for values in (exact, middle, up, down):
        prefix_v = values[values.isfinite()]
        prefix_v = prefix_v[: len(prefix_v) // 256 * 256].view(-1, 1, 1, 256).to(build.device)
        prefixes = prefix_v.shape[0]
        q = torch.ones(prefixes, 1, 1, 256, dtype=dtype, device=build.device)
        got = ct.prefix_attention(
            q,
            q,
            q,
            torch.ones_like(prefix_v),
            prefix_v,
            ct.ContextMask(hidden=torch.tensor([[1, 2]] * prefixes, device=build.device), length=2),
            prefix_index=torch.arange(prefixes, device=build.device),
            backend=build.name,
        )
        assert_kept(got, prefix_v.to(dtype), build)


def test_fp32_values_pass_unchanged(build):
    """Huge, tiny and subnormal ones."""
    v = torch.tensor([3.4e38, -3.4e38, 1e-38, 1e-45, -1e-40, 1.0 + 2**-23, 0.1, 0.0]).view(1, 1, 1, 8).to(build.device)
    q, empty = torch.ones_like(v), v.new_zeros(1, 0, 8)
    assert torch.equal(ct.prefix_attention(q, q, v, empty, empty, backend=build.name), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
@pytest.mark.parametrize("name", ["prefix_bias", "sinks"])
def test_bias_and_sinks_of_any_type(build, name, types, dtype):
    """They have a type of their own, and their gradients the same."""
    if dtype == torch.float64 and not build.double:
        dtype = torch.float32
    call = make_call(types=types, bias=(4, 11), sinks=True)
    call = call.with_tensors(**{name: call.tensors[name].to(dtype)})
    cotangents = cotangents_for(call)
    got = run(call, build, cotangents)
    assert got["d" + name].dtype == dtype
    rounded = torch.finfo(dtype).eps > torch.finfo(torch.float32).eps
    assert_matches(call, got, cotangents, names=tuple(n for n in got if n != "d" + name or not rounded))
