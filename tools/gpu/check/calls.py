"""Calls of the op for tools that watch a program (compute-sanitizer, ncu): forward and backward, and nothing else.

python -m tools.gpu.check.calls DEVICE BACKEND TYPE B P REPEATS
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks import peers
from benchmarks.cases import LLAMA, Inputs
from ctkernels import dispatch_table
from tools.gpu.check import timing

TYPES = {name: dtype for dtype, name in dispatch_table.DTYPES.items()}


def main(device: str, backend: str, dtype: str, B: int, P: int, repeats: int) -> None:
    """Run a training-shaped call `repeats` times."""
    case = replace(LLAMA, B=B, P=P, segments=min(B, LLAMA.segments), drop_p=0.05, dtype=TYPES[dtype])
    if device == "cpu":
        case = replace(case, H=2, Hk=1, S=3, D=16)
    x = Inputs(case, device, backend)
    x.require_grad(True)
    for _ in range(repeats):
        peers.results(peers.ours(x), x, x.dout)
    timing.synchronize(device)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
