"""Memory beyond inputs and outputs does not depend on rows x prefix length."""

import subprocess
import sys

import pytest

from .backends import backends

SCRIPT = """
import resource
import sys
import torch
sys.path.insert(0, {root!r})
import ctkernels as ct
from ctkernels import dispatch

torch.set_num_threads(2)


def step(rows, prefix):
    q, k, v = (torch.randn(rows, 1, heads, 8).transpose(1, 2) for heads in (2, 1, 1))
    prefix_k, prefix_v = (torch.randn(1, prefix, 8, requires_grad=True) for _ in range(2))
    q.requires_grad_()
    hidden = torch.tensor([[b, b + prefix // 2] for b in range(rows)])
    mask = ct.ContextMask(hidden=hidden, drop_p=0.1, seed=1)
    out, lse = ct.prefix_attention(q, k, v, prefix_k, prefix_v, mask, return_lse=True, backend={backend!r})
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))


def peak():  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


step(8, 64)
before = peak()
step({rows}, {prefix})
print(peak() - before)
"""


@pytest.mark.parametrize("backend", [b.name for b in backends() if b.name == "cpu"])
def test_peak_memory(backend, pytestconfig):
    """One byte per (row, prefix key) would be 16 MiB, one fp32 logit per head 128 MiB; inputs and outputs are 3 MiB."""
    script = SCRIPT.format(root=str(pytestconfig.rootpath), backend=backend, rows=1024, prefix=16384)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 10 * 2**20
