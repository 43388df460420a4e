#!/usr/bin/env python3
"""Writes the tables again from the JSON that the benchmarks left. Nothing is measured.

    python benchmarks/render.py                          benchmarks/results/*.md and the tables of the documents
    python benchmarks/render.py --results FOLDER         the Markdown in FOLDER alone

`make bench` ends with it. A document gets the first table of a report between its markers `<!-- NAME -->`. The README
gets a summary: a few numbers of four reports.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks/, which is not installed

from benchmarks import bench_attention, bench_dropin, bench_scaling, bench_serving, bench_tuning, harness
from benchmarks.bench_attention import OURS
from benchmarks.bench_serving import ANEW, IN_MEMORY
from benchmarks.cases import GPT2_LARGE
from ctkernels.tuning.storage import atomic_write_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
REPORTS = {
    "bench_attention": bench_attention.markdown,
    "bench_tuning": bench_tuning.markdown,
    "bench_serving": bench_serving.markdown,
    "bench_scaling": bench_scaling.markdown,
    "bench_dropin": bench_dropin.markdown,
}
PAGES = {name: "docs/guides/migrate.md" if name == "bench_dropin" else "docs/performance.md" for name in REPORTS}
Record = tuple[dict[str, Any], Any]  # machine, results


def read(folder: Path) -> dict[str, Record]:
    """The reports that lie in a folder, by name."""
    paths = {name: folder / f"{name}.json" for name in REPORTS}
    return {name: harness.read_report(path) for name, path in paths.items() if path.exists()}


def text(name: str, record: Record) -> str:
    """The Markdown of a report."""
    machine, results = record
    return harness.report_text(machine, REPORTS[name](results))


def first_table(markdown: str) -> str:
    """A report up to its second table, which has a bold title as every further one."""
    return "\n\n**".join(markdown.split("\n\n**")[:2])


def write_documents(records: Mapping[str, Record], root: Path = ROOT) -> None:
    """Replace the tables of the documents.

    Raises:
        ValueError: a report is missing, a document has no markers, or the summary would mix machines.
    """
    if missing := REPORTS.keys() - records.keys():
        raise ValueError(f"the documents need all reports; missing: {', '.join(sorted(missing))}")
    short = summary(records)
    for name, page in PAGES.items():
        harness.replace_between_markers(root / page, name, first_table(text(name, records[name])))
    harness.replace_between_markers(root / "README.md", "results", short)


def summary(records: Mapping[str, Record]) -> str:
    """A few numbers of four reports, all of one machine."""
    names = ("bench_attention", "bench_tuning", "bench_serving", "bench_scaling")
    machines = {harness.hardware_line(records[name][0]) for name in names}
    if len(machines) > 1:
        raise ValueError(f"the summary needs reports of one machine, got: {'; '.join(sorted(machines))}")
    attention, tuning, serving, scaling = (records[name][1] for name in names)
    (decoding,) = [r for r in scaling["decoding"] if (r["B"], r["G"], r["S"]) == (16, 1, bench_scaling.DECODING.S)]
    rows = [
        _attention(next(r for r in attention if r["name"] == GPT2_LARGE.name), "both"),
        _attention(decoding, "forward"),
        _epoch(tuning["epochs"][-1], Path(records["bench_tuning"][0]["model"]).name),
        _first_token(serving["batches"][-1]),
    ]
    return f"{harness.table(['', 'ctkernels', 'compared with', 'ratio'], rows)}\n\n{machines.pop()}."


def _attention(result: dict[str, Any], phase: str) -> list[str]:
    own, peer = result["entries"][OURS], result["entries"]["sdpa"]
    title = f"attention, {bench_attention.PHASES[phase]}: {result['name']} ({result['sizes']})"
    ours, theirs = (f"{_time(e['times'][phase].median)}, {_size(e['extra_bytes'])}" for e in (own, peer))
    return [title, ours, f"SDPA: {theirs}", bench_attention.ratio(peer, own, phase)]


def _epoch(result: dict[str, Any], model: str) -> list[str]:
    ours, theirs = (result["seconds"][name].median for name in (bench_tuning.OURS, "sdpa"))
    sizes = [_size(result["peak_bytes"][name]) for name in (bench_tuning.OURS, "sdpa")]
    title = f"an epoch of CT-KV: {model}, {result['rows']} demonstrations, prefix of {result['P']} tokens"
    plain = f"plain PyTorch, SDPA: {_time(theirs)}, {sizes[1]}"
    return [title, f"{_time(ours)}, {sizes[0]}", plain, f"{theirs / ours:.1f}x"]


def _first_token(batch: dict[str, Any]) -> list[str]:
    ours, theirs = (batch["ways"][way]["first"].median for way in (IN_MEMORY, ANEW))
    title = f"first token of {batch['rows']} requests, {batch['tasks']} tasks of {int(batch['P'])} tokens"
    return [title, _time(ours), f"demonstrations encoded again: {_time(theirs)}", f"{theirs / ours:.1f}x"]


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def _size(size: int | None) -> str:
    if size is None:
        return "memory unknown"
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON (default: the committed one)")
    args = parser.parse_args(argv)
    records = read(args.results)
    if not records:
        parser.error(f"{args.results} has none of {', '.join(f'{name}.json' for name in REPORTS)}")
    for name, record in records.items():
        atomic_write_bytes(args.results / f"{name}.md", f"{text(name, record)}\n".encode())
    if args.results.resolve() == RESULTS:
        write_documents(records)


if __name__ == "__main__":
    main()
