"""What the benchmark scripts share: the machine, timing in turn, peak memory, rates to compare with, reports."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import ctkernels
from benchmarks.tables import table as table  # reports of benchmarks take it from here
from ctkernels import dispatch
from ctkernels.testing import memory
from ctkernels.tuning.storage import atomic_write_bytes

Value = TypeVar("Value")
Laps = dict[str, float]  # phase -> seconds of one run
BF16_UNITS = ("avx512_bf16", "amx_bf16")  # as /proc/cpuinfo names them


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON, Markdown and plots")
    parser.add_argument("--threads", type=int, help="threads of the CPU kernels and of PyTorch (default: PyTorch's)")
    return parser


def prepare(options: argparse.Namespace) -> None:
    """Set the threads and the CUDA device that the options name."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(getattr(options, "device", "cpu"))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and memory statistics are those of the current device


def describe_machine(device: str) -> dict[str, Any]:
    """The device and the versions, and how busy the machine is with other things."""
    info: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_fields().get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **dispatch.cpu_info(),
        "bf16_units": [unit for unit in BF16_UNITS if unit in _cpu_fields().get("flags", "").split()],
        "load": os.getloadavg()[0],
        "ctkernels": ctkernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.device(device).type == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return info


def hardware_line(info: Mapping[str, Any]) -> str:
    """The part of `describe_machine` that stays the same from run to run."""
    where = f"{info['gpu']} (CUDA {info['cuda']}), " if "gpu" in info else ""
    units = f" with {', '.join(info['bf16_units'])}" if info["bf16_units"] else " without bf16 units"
    return (
        f"{where}{info['cpu']}{units}, {info['cores']} cores, {info['threads']} threads, kernels for {info['isa']}; "
        f"torch {info['torch']}, Python {info['python']}"
    )


def machine_line(info: Mapping[str, Any]) -> str:
    """`describe_machine` as one line of Markdown."""
    return f"{hardware_line(info)}; load before the run {info['load']:.1f}; {info['date']}"


def _cpu_fields() -> dict[str, str]:
    """Fields of the first processor of /proc/cpuinfo, where there is one."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def timed(work: Callable[[], Value], device: str) -> tuple[Value, float]:
    """What `work` returns, and its seconds; on CUDA those of the device, measured with events."""
    if torch.device(device).type != "cuda":
        started = time.perf_counter()
        value = work()
        return value, time.perf_counter() - started
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    value = work()
    end.record()
    end.synchronize()
    return value, begin.elapsed_time(end) / 1e3


@dataclass(frozen=True)
class Spread:
    """Median, quartiles, smallest value and number of some times in seconds."""

    median: float
    q1: float
    q3: float
    best: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        q1, _, q3 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
        return cls(statistics.median(times), q1, q3, min(times), len(times))


def in_turn(
    works: Mapping[str, Callable[[], Laps]], seconds: float, least: int = 3, most: int = 50
) -> dict[str, dict[str, Spread]]:
    """Run all works in turn (A B C A B C ...) for about `seconds`: name -> phase -> times. Each should have run once.

    In turn, so that other work on the machine slows all of them alike.
    """
    gc.collect()
    rounds: dict[str, list[Laps]] = {name: [] for name in works}
    started = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - started > seconds:
            break
        for name, work in works.items():
            rounds[name].append(work())
    return {
        name: {phase: Spread.of([lap[phase] for lap in laps]) for phase in laps[0]} for name, laps in rounds.items()
    }


def extra_memory(work: Callable[[], Iterable[Tensor]], device: str) -> int | None:
    """Peak memory in bytes that `work` needs, besides what was there before and the tensors that it returns.

    None if the system cannot tell.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = list(work())
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        if sys.platform == "linux":
            if dispatch.availability()["cpu"] is None:
                dispatch.load("cpu").release_memory()
            ctypes.CDLL(None).malloc_trim(0)  # else memory kept from earlier calls is reused, not counted
        if not memory.reset_peak():
            return None
        before = memory.peak_bytes()
        results = list(work())
        peak = memory.peak_bytes()
    return max(0, peak - before - sum(x.numel() * x.element_size() for x in results))


def free_memory(device: str) -> int:
    """Bytes that can be allocated now."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info()[0]
    status = Path("/proc/meminfo")
    if not status.exists():
        return 4 << 30
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


class MatrixProduct:
    """The rate that ours is compared with: `torch.mm` of two [n, n] matrices, in the size that it computes fastest.

    In the type that the kernels multiply: the rows' type, but fp32 for fp16 and on a CPU without bf16 units. Run it in
    turn with the cases: a run repeats the product for about `LAP` seconds and reports the mean and the best time. It is
    a measure, not a limit: ours may be faster.
    """

    LAP = 0.03
    SIZES = (512, 1024, 2048)  # four times as much on other devices than the CPU

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.device = device
        on_cpu = torch.device(device).type == "cpu"
        native = dtype == torch.bfloat16 and dispatch.cpu_info()["isa"] in dispatch.BF16_ISAS
        self.dtype = torch.float32 if on_cpu and not native else dtype
        best = {n: self._fastest(n) for n in (self.SIZES if on_cpu else [4 * n for n in self.SIZES])}
        self._resize(max(best, key=lambda n: n**3 / best[n]))
        self._repeat = max(1, round(self.LAP / best[self.n]))

    def _resize(self, n: int) -> None:
        self.n, self.flops = n, 2 * n**3
        # random numbers: on ones a GPU draws less power, and runs at a higher clock than any real product
        self._a, self._b, self._out = (torch.randn(n, n, dtype=self.dtype, device=self.device) for _ in range(3))

    def _fastest(self, n: int) -> float:
        self._resize(n)
        return min(self._once() for _ in range(5))

    def _once(self) -> float:
        return timed(lambda: torch.mm(self._a, self._b, out=self._out), self.device)[1]

    def __call__(self) -> Laps:
        times = [self._once() for _ in range(self._repeat)]
        return {"mean": statistics.fmean(times), "best": min(times)}


class Reading:
    """The rate of reading memory: PyTorch's own sum over a tensor of `size` bytes."""

    def __init__(self, size: int, device: str) -> None:
        self._x, self._device = torch.ones(max(1, size // 4), device=device), device

    def __call__(self) -> Laps:
        return {"both": timed(self._x.sum, self._device)[1]}


def milliseconds(spread: Spread) -> str:
    """Median and quartiles."""
    digits = 0 if spread.median >= 0.1 else 2
    median, q1, q3 = (f"{1e3 * x:.{digits}f}" for x in (spread.median, spread.q1, spread.q3))
    return f"{median} ({q1}-{q3})"


def megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e6:.1f}"


def write_report(
    name: str, options: argparse.Namespace, machine: Mapping[str, Any], results: Any, markdown: str
) -> None:
    """Write OUT/NAME.json and OUT/NAME.md, and print the Markdown."""
    record = {"machine": machine, "command": sys.argv, "results": results}
    text = report_text(machine, markdown)
    atomic_write_bytes(options.out / f"{name}.json", (json.dumps(record, indent=1, default=_plain) + "\n").encode())
    atomic_write_bytes(options.out / f"{name}.md", f"{text}\n".encode())
    print(f"\n{text}\n\nwrote {options.out}/{name}.json and {name}.md")


def read_report(path: Path) -> tuple[dict[str, Any], Any]:
    """Machine and results of a JSON file of `write_report`."""
    record = json.loads(path.read_text(), object_hook=_restored)
    return record["machine"], record["results"]


def report_text(machine: Mapping[str, Any], markdown: str) -> str:
    """The Markdown of a report: the machine, the model if there is one, the tables."""
    model = [f"{machine['model']}, {machine['dtype']}"] if "model" in machine else []
    return "\n\n".join([machine_line(machine), *model, markdown])


def replace_between_markers(path: Path, name: str, markdown: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a file.

    Raises:
        ValueError: the markers are not there.
    """
    text = path.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in text or end not in text.split(begin)[1]:
        raise ValueError(f"{path} must hold the markers {begin} and {end}, in this order")
    before, rest = text.split(begin, 1)
    atomic_write_bytes(path, f"{before}{begin}\n{markdown}\n{end}{rest.split(end, 1)[1]}".encode())


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else str(value)


def _restored(value: dict[str, Any]) -> Any:
    """`Spread`s as they were before `_plain`."""
    return Spread(**value) if value.keys() == Spread.__dataclass_fields__.keys() else value
