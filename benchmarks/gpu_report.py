#!/usr/bin/env python3
"""What the Triton kernels need and execute on GPUs that are not here: tables in benchmarks/results.

    python benchmarks/gpu_report.py                              write all; minutes, or seconds if nothing changed
    python benchmarks/gpu_report.py --architectures sm_90        compile for some and print what breaks a rule

gpu_resources: registers, spills and shared memory of every kernel on every architecture, compiled ahead of time.
gpu_counters: what the kernels of one training step execute on sm_80 and sm_90, counted by the PTX emulator;
gpu_model.md: the times that the model of benchmarks/gpu/model.py predicts from them.
Exit status 1 if a kernel spills at D <= 128 on NVIDIA or does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/ and tests/, which are not installed

import torch
import triton

from benchmarks import gpu_check
from benchmarks.gpu import counters, model, resources
from benchmarks.gpu.architectures import ARCHITECTURES


def write(folder: Path, name: str, record: dict, markdown: str) -> None:
    """FOLDER/NAME.json, one line per entry so that differences can be read, and FOLDER/NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in record.items() if key != "entries"}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    if "entries" in record:
        entries = ",\n".join(json.dumps(entry) for entry in record["entries"])
        lines.append(f'"entries": [\n{entries}\n]')
    (folder / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (folder / f"{name}.md").write_text(f"Triton {record['triton']}; written by `make gpu-report`.\n\n{markdown}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="only these; nothing is written")
    parser.add_argument("--no-counters", action="store_true", help="leave the counters as they are")
    args = parser.parse_args(argv)
    entries, broken = [], []
    for name in args.architectures or ARCHITECTURES:
        for sizes, dtype in resources.cases():
            found = resources.measure(sizes, dtype, ARCHITECTURES[name])
            entries += found
            for line in (line for entry in found for line in resources.violations(entry)):
                broken.append(line)
                print(line, flush=True)
        print(f"{name}: {sum(entry.architecture == name for entry in entries)} kernels", flush=True)
    status = 1 if broken else 0
    if args.architectures:
        return status
    record = {"triton": triton.__version__, "entries": [asdict(entry) for entry in entries]}
    write(args.out, "gpu_resources", record, resources.markdown(entries))
    if not args.no_counters:
        counted = counters.measure()
        write(args.out, "gpu_counters", {"triton": triton.__version__, **counted}, counters.markdown(counted))
        predictions = model.markdown(counted, [case for case in gpu_check.TRAINING if case.dtype == torch.bfloat16])
        (args.out / "gpu_model.md").write_text(predictions + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
