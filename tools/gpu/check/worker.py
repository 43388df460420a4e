"""The process that runs the cases of the stages smoke, bench and train, one after the other:

    python -m tools.gpu.check.worker RECORDS DEVICE STAGE...

Cases with a result are left out. If a case ends the process (a lost CUDA context, a crash, a hang), the command that
started it notes that and starts another one, which goes on behind the case.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.gpu.check.records import Records
from tools.gpu.check.session import LOST, NO_GPU, describe

Job = Callable[[], dict[str, Any]]  # runs a case and returns its result


def run(records: Records, device: str, stages: list[str]) -> int:
    """Run what is missing of some stages; returns the exit status."""
    if device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU; --dry runs all stages on the CPU, with toy sizes")
        return NO_GPU
    for stage in stages:
        jobs: dict[str, Job] = importlib.import_module(f"tools.gpu.check.{stage}").jobs(device)
        if records.plans().get(stage) != list(jobs):
            records.plan(stage, jobs)
        done = records.results()
        for case, job in jobs.items():
            if (stage, case) in done:
                continue
            records.begin(stage, case)
            started, worked = time.perf_counter(), time.process_time()
            try:
                result = job()
            except Exception as error:
                traceback.print_exc()
                result = {"failure": describe(error)}
            more = {"on": name_of(device), "cpu_seconds": round(time.process_time() - worked, 3)}
            records.end(stage, case, time.perf_counter() - started, {**result, **more})
            if "failure" in result and lost(device):
                return LOST
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


def name_of(device: str) -> str:
    """The GPU of a result: a check may go on on another machine."""
    return torch.cuda.get_device_name() if device == "cuda" else device


def lost(device: str) -> bool:
    """Whether the GPU refuses everything that this process asks of it, as after an access outside of its memory."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.zeros(1, device=device).item()
    except torch.cuda.OutOfMemoryError:
        return False
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(run(Records(Path(sys.argv[1])), sys.argv[2], sys.argv[3:]))
