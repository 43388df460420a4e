#!/usr/bin/env python3
"""What the Triton kernels need and execute on GPUs that are not here: tables in tools/gpu/results, and docs/gpu.md.

    python tools/gpu/triton/report.py                              write all; minutes, or seconds if nothing changed
    python tools/gpu/triton/report.py --architectures sm_90 --no-counters      a part of the first table
    python tools/gpu/triton/report.py --kernels words_kernel                   after a change of this kernel alone
    python tools/gpu/triton/report.py --variants decoding                      of this call alone

triton_resources: registers, spills and shared memory of every kernel on every architecture, compiled ahead of time.
triton_counters: what the kernels of one training step execute on sm_80 and sm_90, counted by the PTX emulator;
step_model.md: the times that the model of tools/gpu/model.py predicts from them.
Exit status 1 if a kernel spills at D <= 128 on NVIDIA or does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for benchmarks/ and tools/, which are not installed

import torch
import triton

from benchmarks import harness
from tools.gpu import check, model
from tools.gpu.architectures import ARCHITECTURES
from tools.gpu.triton import counters, resources


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


def write_counters(folder: Path, counted: dict, docs: Path | None) -> None:
    """The counters, what the model makes of them, and both between the markers of a page."""
    write(folder, "triton_counters", {"triton": triton.__version__, **counted}, counters.markdown(counted))
    predictions = model.markdown(counted, [case for case in check.TRAINING if case.dtype == torch.bfloat16])
    (folder / "step_model.md").write_text(predictions + "\n")
    if docs is not None:
        harness.replace_between_markers(docs, "counters", counters.ratio_table(counted))
        harness.replace_between_markers(docs, "model", predictions)


def committed(folder: Path) -> list[resources.Entry]:
    """The entries of the table that is there."""
    path = folder / "triton_resources.json"
    return list(resources.read(json.loads(path.read_text())["entries"]).values()) if path.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tools/gpu/results"))
    parser.add_argument("--docs", type=Path, help="also replace the tables between the markers of this file")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, help="only these; the others stay as they are"
    )
    parser.add_argument("--kernels", nargs="+", help="of the first table only these; the others stay as they are")
    parser.add_argument(
        "--variants", nargs="+", help="of the first table only these calls; the others stay as they are"
    )
    parser.add_argument("--no-counters", action="store_true", help="leave the counters as they are")
    args = parser.parse_args(argv)
    names = args.architectures or list(ARCHITECTURES)
    before = committed(args.out)
    some = args.kernels or args.variants
    table = {entry.key: entry for entry in before if some or entry.architecture not in names}
    for name in names:
        for sizes, dtype in resources.cases(name):
            if args.variants and sizes.name not in args.variants:
                continue
            measured = resources.measure(sizes, dtype, ARCHITECTURES[name], args.kernels)
            table |= {entry.key: entry for entry in measured}  # the sums of dk and dv are one kernel
        print(f"{name}: {sum(entry.architecture == name for entry in table.values())} kernels", flush=True)
    entries = sorted(table.values(), key=lambda entry: list(ARCHITECTURES).index(entry.architecture))
    record = {"triton": triton.__version__, "entries": [asdict(entry) for entry in entries]}
    write(args.out, "triton_resources", record, resources.markdown(entries))
    broken = [line for entry in entries for line in resources.violations(entry)]
    print(*broken, sep="\n")
    if not args.no_counters:
        counted = counters.measure()
        write_counters(args.out, counted, args.docs)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
