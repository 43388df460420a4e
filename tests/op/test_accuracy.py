"""Accuracy on problems of ordinary size, where no allowance for lucky cancellations is needed: the plain rule.

The error against fp64 is at most twice that of eager PyTorch in the same type on the same inputs, plus one rounding of
the result: by the largest error of a tensor, and by the root mean square.
"""

import pytest
import torch

from ctkernels.testing.calls import cotangents_for, make_call, run, run_dense

ORDINARY = {
    "leave-one-out rows": dict(
        lens=[31, 18, 40, 25, 9, 33],
        P=240,
        H=6,
        Hk=2,
        D=64,
        mask=dict(hidden=torch.tensor([[40 * b, 40 * b + 40] for b in range(6)]), drop_p=0.1, seed=1),
    ),
    "padded rows": dict(B=5, S=30, P=150, H=4, Hk=4, D=128, seq_lens=torch.tensor([30, 11, 25, 30, 7])),
    "odd sizes": dict(lens=[13, 57, 29], P=99, H=7, Hk=1, D=80, bias=(7, 99), softcap=20.0),
    "peaked": dict(B=4, S=25, P=120, H=4, Hk=2, D=64, scale=0.6),
    "sinks": dict(lens=[31, 18, 40], P=240, H=6, Hk=2, D=64, sinks=True),
}


DECODING = dict(B=6, S=2, T=90, P=300, H=8, Hk=2, D=64, seq_lens=torch.tensor([90, 33, 70, 2, 51, 88]))
TYPES = ["fp32", "bf16", "fp16", "bf16+fp32"]


WIDE = {
    "values narrower than keys": dict(lens=[31, 18, 40], P=240, H=4, Hk=4, D=192, Dv=128),
    "wide heads": dict(B=3, S=30, P=150, H=4, Hk=2, D=512),
}


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("problem", ORDINARY)
def test_at_most_twice_the_error_of_eager_pytorch(build, problem, types):
    check(build, dict(types=types, **ORDINARY[problem]), gradients=True)


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("problem", WIDE)
def test_head_dimensions_beyond_the_usual(wide_build, problem, types):
    check(wide_build, dict(types=types, **WIDE[problem]), gradients=True)


@pytest.mark.parametrize("types", TYPES)
def test_decoding_at_most_twice_the_error_of_eager_pytorch(build, types):
    check(build, dict(types=types, **DECODING), gradients=False)


def check(build, sizes: dict, gradients: bool, draws: int = 4) -> None:
    """Errors of several draws, added up, so that no single lucky draw of eager PyTorch decides."""
    totals: dict[tuple[str, str], list] = {}
    for seed in range(draws):
        call = make_call(seed=seed, **sizes)
        cotangents = cotangents_for(call, seed) if gradients else None
        truth = run_dense(call, cotangents, torch.float64)
        eager = run_dense(call, cotangents, call.tensors["q"].dtype)
        for name, x in run(call, build, cotangents).items():
            seen = truth[name].isfinite()
            exact = truth[name][seen]
            ours, theirs = ((y[seen].double() - exact).abs() for y in (x, eager[name]))
            for norm in (torch.Tensor.max, root_mean_square):
                allowed = 2 * norm(theirs) + torch.finfo(x.dtype).eps * norm(exact.abs())
                totals.setdefault((name, norm.__name__), []).append((norm(ours), allowed))
    for (name, norm), pairs in totals.items():
        ours, allowed = (float(sum(x)) for x in zip(*pairs, strict=True))
        assert ours <= allowed, f"{name}, {norm}: {ours:.3g} > {allowed:.3g}"


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()
