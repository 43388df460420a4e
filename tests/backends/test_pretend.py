"""The op's tests give a GPU backend tensors of its own device alone: they run here on a device that is pretended."""

import os
import subprocess
import sys

import pytest

QUICK = ("tests/op/test_errors.py", "tests/op/test_library.py", "tests/op/test_edges.py", "tests/op/test_transforms.py")
STRICT = """
import pytest
import torch
from ctkernels.testing.calls import call_op, make_call
from ctkernels.testing.pretend import DEVICE, install

install()
here = make_call(types="fp32", mask=dict(hidden=torch.zeros(3, 2, dtype=torch.long)))
there = here.to(DEVICE)
call_op(there, "cuda")
with pytest.raises(ValueError, match="computes on pretend tensors, got cpu"):
    call_op(here, "cuda")
with pytest.raises(ValueError, match="mask.hidden must be on q's device pretend:0, got cpu"):
    call_op(there.with_mask(**here.mask), "cuda")
with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
    torch.equal(call_op(there, "cuda")[0], here.tensors["q"])
"""


def run(*words: str) -> str:
    environment = {**os.environ, "CTKERNELS_PRETEND_GPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_a_pretended_device_refuses_tensors_of_the_cpu():
    run("-c", STRICT)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_suite_of_the_op_on_a_gpu(backend):
    """More of it: `make test-gpu-full`."""
    files = QUICK if backend == "cuda" else QUICK[:1]
    found = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"[{backend}", *files)
    assert " passed" in found and "skipped" not in found
