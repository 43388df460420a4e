"""Tensor cores that truncate their sums: the accuracy rule of the op's own tests, held by the kernels in the emulator.

The emulator keeps no guard bits here, the least that was measured on hardware; an A100 has 1 and an H100 has 2.
"""

import os

import pytest

from tests.op import test_accuracy
from tools.gpu.cuda.emulated import BACKEND, Emulator, running_on

from .test_mutations import Mutation, mutated

pytestmark = pytest.mark.needs_nvcc

THOROUGH = os.environ.get("CTKERNELS_TEST_PROFILE") == "thorough"
DRAWS = 2 if THOROUGH else 1
# Sums over as many keys as a prefix may have, and over many lanes.
LONG = {
    "P=16384": dict(lens=[5, 3], P=16384, H=2, Hk=1, D=64),
    "P=4096": dict(lens=[5, 3], P=4096, H=2, Hk=1, D=64),
    "P=1024, D=128": dict(lens=[5, 3], P=1024, H=2, Hk=1, D=128),
    "P=1024, D=256": dict(lens=[5, 3], P=1024, H=2, Hk=1, D=256),
    "many lanes": dict(lens=[64] * 4, P=64, H=8, Hk=1, D=64),
}
PROBLEMS = test_accuracy.ORDINARY | test_accuracy.WIDE
LONG_CHAINS = Mutation(
    "mma.cuh", "float sum0[4] = {}, sum1[4] = {};",
    "float(&sum0)[4] = d0, (&sum1)[4] = d1;\n      const auto add = [](auto&, auto&) {};",
)  # fmt: skip


@pytest.mark.parametrize("problem", LONG if THOROUGH else ["P=16384"])
def test_fp32_over_a_long_prefix(problem):
    """By default out and lse alone: dq sums over the keys with the same function."""
    with running_on(Emulator(guard_bits=0)):
        test_accuracy.check(BACKEND, dict(types="fp32", **LONG[problem]), gradients=THOROUGH, draws=DRAWS)


@pytest.mark.parametrize("types", test_accuracy.TYPES if THOROUGH else ["fp32"])
@pytest.mark.parametrize("problem", PROBLEMS if THOROUGH else ["leave-one-out rows"])
def test_at_most_twice_the_error_of_eager_pytorch(problem, types):
    with running_on(Emulator(guard_bits=0)):
        test_accuracy.check(BACKEND, dict(types=types, **PROBLEMS[problem]), gradients=True, draws=DRAWS)


def test_sums_that_stay_in_the_tensor_cores_break_the_rule(tmp_path):
    """Even with the guard bits of an H100."""
    problem, build = PROBLEMS["leave-one-out rows"], mutated(tmp_path, LONG_CHAINS)
    with running_on(Emulator(guard_bits=2, build=build)), pytest.raises(AssertionError, match="out, "):
        test_accuracy.check(BACKEND, dict(types="fp32", **problem), gradients=False, draws=1)
