#!/usr/bin/env python3
"""What the CUDA C++ kernels need and execute on GPUs that are not here: tables in tools/gpu/results, and docs/cuda.md.

    python tools/gpu/cuda/report.py                            write all; long, or seconds if nothing changed
    python tools/gpu/cuda/report.py --architectures sm_80      a part of the first table

cuda_resources: registers, spills and shared memory of every kernel on every architecture, as nvcc compiles it.
cuda_sass: the share of tensor-core instructions in the hottest loops, beside FlashAttention-2's.
cuda_counters: what the kernels of one training step execute, counted by the PTX emulator.
Exit status 1 if a kernel spills at D <= 128 or does not fit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for benchmarks/ and tools/, which are not installed

from benchmarks import harness
from ctkernels.tuning.storage import atomic_write_bytes
from tools.gpu.cuda import build as cuda_build
from tools.gpu.cuda import counters as cuda_counters
from tools.gpu.cuda import resources as cuda_resources
from tools.gpu.cuda import sass as cuda_sass
from tools.gpu.triton import resources

PARTS = ("resources", "sass", "counters")


def write(folder: Path, name: str, record: Mapping[str, Any], markdown: str) -> None:
    """FOLDER/NAME.json, one line per entry so that differences can be read, and FOLDER/NAME.md."""
    fields = [f'"{key}": {json.dumps(value)}' for key, value in record.items() if key != "entries"]
    if "entries" in record:
        entries = ",\n".join(json.dumps(entry) for entry in record["entries"])
        fields.append(f'"entries": [\n{entries}\n]')
    atomic_write_bytes(folder / f"{name}.json", ("{\n" + ",\n".join(fields) + "\n}\n").encode())
    head = f"nvcc {record['nvcc']}; written by `make gpu-report`."
    atomic_write_bytes(folder / f"{name}.md", f"{head}\n\n{markdown}\n".encode())


def compile_all(names: Sequence[str], files: Sequence[str] | None, jobs: int) -> None:
    """Sources for every architecture, several compilers at once; what they make is kept on disk."""
    sources = [source for source in cuda_build.sources() if files is None or source.stem in files]
    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(cuda_build.cubin, source, name) for name in names for source in sources]
        for compiled in done:
            compiled.result()


def write_resources(out: Path, names: Sequence[str], tuned: bool, files: Sequence[str] | None) -> list[str]:
    """Measure all kernels for `names`, or the tuned ones, or those of some files. Other entries of the table stay if it
    is of this compiler and of these sources. Returns the rules that are broken."""
    path = out / "cuda_resources.json"
    origin = {"nvcc": cuda_build.nvcc_version(), "sources": cuda_build.digest()}
    before = json.loads(path.read_text()) if path.exists() else {}
    table = resources.read(before["entries"] if origin.items() <= before.items() else [])
    for name in names:
        measured = cuda_resources.measure(cuda_resources.NVIDIA[name], tuned, files)
        table |= {entry.key: entry for entry in measured}
        print(f"{name}: {len(measured)} kernels", flush=True)
    entries = sorted(table.values(), key=lambda e: (list(cuda_resources.NVIDIA).index(e.architecture), e.kernel))
    record = {**origin, "entries": [asdict(entry) for entry in entries]}
    write(out, "cuda_resources", record, cuda_resources.markdown(entries))
    return [line for entry in entries for line in resources.violations(entry)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tools/gpu/results"))
    parser.add_argument("--docs", type=Path, help="also replace the tables between the markers of this file")
    known = list(cuda_resources.NVIDIA)
    parser.add_argument("--architectures", nargs="+", choices=known, default=known, help="of the first table")
    parser.add_argument(
        "--tuned", action="store_true", help="of the first table only the tuned kernels, which is quick"
    )
    files = [source.stem for source in cuda_build.sources()]
    parser.add_argument("--files", nargs="+", choices=files, help="of the first table only kernels of these sources")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once, for the first table")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    tables, broken = {}, []
    if "sass" in args.parts:
        shares, opcodes = cuda_sass.measure()
        write(args.out, "cuda_sass", cuda_sass.record(shares, opcodes), cuda_sass.markdown(shares))
        tables["cuda_sass"] = cuda_sass.markdown(shares)
    if "counters" in args.parts:
        counted = cuda_counters.measure()
        record = {"nvcc": cuda_build.nvcc_version(), **counted}
        write(args.out, "cuda_counters", record, cuda_counters.markdown(counted))
        tables["cuda_counters"] = cuda_counters.ratio_table(counted)
    if "resources" in args.parts:
        if not args.tuned:
            compile_all(args.architectures, args.files, args.jobs)
        broken = write_resources(args.out, args.architectures, args.tuned, args.files)
        print(*broken, sep="\n")
    if args.docs is not None:
        for name, table in tables.items():
            harness.replace_between_markers(args.docs, name, table)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
