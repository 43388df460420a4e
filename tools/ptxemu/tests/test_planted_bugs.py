"""Every mistake planted in a correct GEMM is found, with the right explanation."""

import numpy as np
import ptxemu
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.needs_nvcc

M, N, K = 128, 128, 128
OPERANDS = [(M, K, torch.bfloat16), (K, N, torch.bfloat16), (M, N, torch.float32)]


@pytest.fixture(scope="module")
def gemm(kernels):
    built = {}

    def get(bug):
        if bug not in built:
            built[bug] = ptxemu.compile_cuda(kernels / "gemm.cu", defines={"BUG": bug})
        return built[bug]

    return get


def run(module, **options):
    torch.manual_seed(0)
    # Far from one another in memory: a fault names the buffer that is nearest to the address.
    a, b, c = (torch.zeros(3, rows, columns, dtype=kind)[1] for rows, columns, kind in OPERANDS)
    a.copy_(torch.randn(M, K))
    b.copy_(torch.randn(K, N))
    module.launch("gemm", (N // 64, M // 64), 128, [a, b, c, M, N, K], **options)
    return (c.double() - a.double() @ b.double()).abs().max().item()


SCHEDULES = [("eager", 0), ("lazy", 0), ("eager", 1), ("lazy", 2)]


@pytest.mark.parametrize("mode, seed", SCHEDULES)
@pytest.mark.parametrize("check", [True, False])
def test_correct_kernel_is_clean(gemm, mode, seed, check):
    assert run(gemm("NONE"), mode=mode, schedule_seed=seed, check=check) < 1e-4


@pytest.mark.parametrize("mode, seed", SCHEDULES)
@pytest.mark.parametrize(
    "bug, kind, words",
    [
        (
            "MISSING_BARRIER",
            "shared_race",
            ["read of shared memory", "write by thread", "ldmatrix", "cp.async"],
        ),
        (
            "MISSING_TRAILING_SYNC",
            "shared_race",
            ["write of shared memory", "read by thread", "ldmatrix"],
        ),
        ("WAIT_OFF_BY_ONE", "async_hazard", ["still in flight", "wait for its group"]),
        (
            "GLOBAL_OUT_OF_BOUNDS",
            "out_of_bounds",
            ["past the end of argument `gemm_param_1` (32768 bytes)"],
        ),
        (
            "SHARED_OUT_OF_BOUNDS",
            "out_of_bounds",
            ["shared memory access of 16 bytes", "outside the block's"],
        ),
        ("MISALIGNED", "misaligned", ["is not 16-byte aligned"]),
        ("UNINITIALISED", "uninitialised_shared", ["was never written in this block", "ldmatrix"]),
        (
            "OVERLAPPING_BLOCKS",
            "global_race",
            ["races with a write by block", "argument `gemm_param_2`"],
        ),
    ],
)
def test_bug_is_reported(gemm, bug, kind, words, mode, seed):
    with pytest.raises(ptxemu.KernelFault) as caught:
        run(gemm(bug), mode=mode, schedule_seed=seed)
    fault = caught.value
    assert fault.kind == kind
    assert fault.kernel == "gemm" and len(fault.block) == len(fault.thread) == 3
    assert fault.location.ptx_line > 0
    assert ".cu" in fault.location.source + fault.location.inlined_at
    for word in words:
        assert word in str(fault)


def test_swapped_fragment_changes_the_result(gemm):
    assert run(gemm("SWAPPED_FRAGMENT")) > 1


def test_bugs_that_hide_without_checks(gemm):
    """Why the checker matters: in order and eagerly, some of these kernels look correct."""
    assert run(gemm("WAIT_OFF_BY_ONE"), check=False) < 1e-4
    assert run(gemm("WAIT_OFF_BY_ONE"), check=False, mode="lazy") > 1 or np.isnan(
        run(gemm("WAIT_OFF_BY_ONE"), check=False, mode="lazy")
    )


def test_single_checks_can_be_selected(gemm):
    assert run(gemm("OVERLAPPING_BLOCKS"), check=("bounds", "shared_race")) > 1e-4
    with pytest.raises(ptxemu.KernelFault) as caught:
        run(gemm("UNINITIALISED"), check="uninitialised_shared")
    assert caught.value.kind == "uninitialised_shared"
