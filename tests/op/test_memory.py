"""Memory beyond inputs and outputs does not depend on rows x prefix length."""

import subprocess
import sys

import pytest

from ctkernels.testing.backends import backends

SCRIPT = """
import resource
import sys
import torch
sys.path.insert(0, {root!r})
import ctkernels as ct

torch.set_num_threads(2)


def step(rows, tokens, prefix):
    q, k, v = (torch.randn(rows, tokens, heads, 8).transpose(1, 2) for heads in (2, 1, 1))
    prefix_k, prefix_v = (torch.randn(1, prefix, 8, requires_grad=True) for _ in range(2))
    q.requires_grad_()
    hidden = torch.tensor([[b, b + prefix // 2] for b in range(rows)])
    mask = ct.ContextMask(hidden=hidden, drop_p=0.1, seed=1)
    out, lse = ct.prefix_attention(q, k, v, prefix_k, prefix_v, mask, return_lse=True, backend={backend!r})
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))


def peak():  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


step(8, 3, 64)
before = peak()
step({rows}, {tokens}, {prefix})
print(peak() - before)
"""


@pytest.mark.parametrize(("rows", "tokens", "prefix", "limit"), [(1024, 1, 16384, 10), (1, 2048, 16384, 16)])
@pytest.mark.parametrize("backend", [b.name for b in backends() if b.name == "cpu"])
def test_peak_memory(backend, rows, tokens, prefix, limit, pytestconfig):
    """A byte per (query, prefix key) would be 16 or 32 MiB, an fp32 logit per head 128 or 256; `limit` MiB are allowed.

    Inputs, outputs and gradients are 3 MiB.
    """
    script = SCRIPT.format(root=str(pytestconfig.rootpath), backend=backend, rows=rows, tokens=tokens, prefix=prefix)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < limit * 2**20


RELEASE = """
import sys
import psutil
sys.path.insert(0, {root!r})
from ctkernels.backends import cpu

exec(sys.stdin.read())  # defines step
def resident():  # bytes
    return psutil.Process().memory_info().rss
step(64, 32, 2048)
before = resident()
cpu.release_memory()
print(before - resident())
"""


def test_scratch_memory_is_released(pytestconfig):
    """What threads keep between calls, some MB, goes back to the system on request."""
    root = str(pytestconfig.rootpath)
    step = SCRIPT.format(root=root, backend="cpu", rows=0, tokens=0, prefix=0).split("step(8, 3, 64)")[0]
    script = RELEASE.format(root=root)
    done = subprocess.run([sys.executable, "-c", script], input=step, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 2 * 2**20
