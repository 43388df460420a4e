"""Processes started as users start them, and what they run: `python -m tests.tuning.train.torchrun` is one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def launch(launcher: list[str], *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run `python -m LAUNCHER ARGUMENTS` from the repository's root."""
    argv = [sys.executable, "-m", *launcher, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def torchrun(processes: int, *arguments: str, **options) -> subprocess.CompletedProcess:
    """`torchrun -m ARGUMENTS` with so many processes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return launch(launcher, *arguments, **options)
