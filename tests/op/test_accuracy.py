"""Accuracy on problems of ordinary size, where no allowance for lucky cancellations is needed: the plain rule.

The error against fp64 is at most twice that of eager PyTorch in the same type on the same inputs, plus one rounding of
the result: by the largest error of a tensor, and by the root mean square.
"""

import pytest
import torch

from .cases import cotangents_for, make_call, run, run_dense

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
    "decoding": dict(B=6, S=2, T=90, P=300, H=8, Hk=2, D=64, seq_lens=torch.tensor([90, 33, 70, 2, 51, 88])),
}


@pytest.mark.parametrize("types", ["fp32", "bf16", "fp16", "bf16+fp32"])
@pytest.mark.parametrize("problem", ORDINARY)
def test_at_most_twice_the_error_of_eager_pytorch(build, problem, types):
    call = make_call(types=types, **ORDINARY[problem])
    cotangents = cotangents_for(call)
    dtype = call.tensors["q"].dtype
    truth = run_dense(call, cotangents, torch.float64)
    eager = run_dense(call, cotangents, dtype)
    for name, x in run(call, build, cotangents).items():
        seen = truth[name].isfinite()
        ours, theirs = ((y[seen].double() - truth[name][seen]).abs() for y in (x, eager[name]))
        unit = torch.finfo(x.dtype).eps
        for norm in (torch.Tensor.max, root_mean_square):
            allowed = 2 * norm(theirs) + unit * norm(truth[name][seen].abs())
            assert norm(ours) <= allowed, f"{name}: {norm.__name__} {float(norm(ours)):.3g} > {float(allowed):.3g}"


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean().sqrt()
