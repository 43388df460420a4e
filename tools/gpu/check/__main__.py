"""Everything that there is to know about the op on a GPU, in stages: is it right, and how fast is it.

    PYTHON=python3 make gpu-check STAGES="build smoke" DEADLINE=540    a machine without network or virtual environment
    PYTHON=python3 make gpu-check DEADLINE=540 RESUME=1                goes on, as often as needed
    python -m tools.gpu.check --dry                                    all stages on the CPU, with toy sizes

    build      the extensions load, or are compiled for this GPU; versions and the machine
    smoke      each backend and type beside the reference in fp64, in memory full of NaN, twice for the same bits
    test       the op's tests on each backend
    bench      ceilings; time of the device (from CUDA graphs, warm and L2-cold) and of the host, ours and the peers'
    train      steps of a random Llama-3.2-1B: the authors' loop, ours eager, compiled and in a CUDA graph
    sanitize   compute-sanitizer's four tools
    profile    ncu's metrics of every kernel

Each case leaves a record when it ends. A case that crashes, hangs or loses the GPU fails alone: the stage goes on
behind it in a new process. Files in the output folder: gpu_check.jsonl (the records), .json and .md (the report),
log.txt, dispatch.json, the extensions if they were compiled (for --prebuilt elsewhere), and profile.ncu-rep.

Exit status: 0 all is done and right; 1 something failed; 2 wrong usage, or no GPU; 3 the time was over before all was
done, and nothing failed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools.gpu.check import report
from tools.gpu.check.build import build
from tools.gpu.check.session import NO_GPU, Ended, Session, how_it_ended, last_lines, python
from tools.gpu.check.suite import test
from tools.gpu.check.watched import profile, sanitize

WORKER = ("-m", "tools.gpu.check.worker")
# what a stage does; those of the worker share a process, since loading torch and a model takes long
STAGES: dict[str, Callable[[Session], None] | None] = {
    "build": build,
    "smoke": None,
    "test": test,
    "bench": None,
    "train": None,
    "sanitize": sanitize,
    "profile": profile,
}
FAILED, USAGE, OUT_OF_TIME = 1, 2, 3


class NoGpu(Exception):
    """There is no GPU; the message says so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages and write the report; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools.gpu.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES), help="default: all")
    parser.add_argument("--deadline", type=float, help="seconds after which this command has ended")
    parser.add_argument("--resume", action="store_true", help="leave out what has a result in the output folder")
    parser.add_argument("--retry", action="store_true", help="as --resume, but what failed runs again")
    parser.add_argument("--dry", action="store_true", help="all on the CPU, with toy sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="output folder")
    parser.add_argument("--prebuilt", type=Path, help="folder with built extensions, for instance of an earlier check")
    parser.add_argument("--rebuild", action="store_true", help="compile the extensions in any case")
    parser.add_argument("--quiet-limit", type=float, default=180.0, help="seconds after which a case hangs")
    args = parser.parse_args(argv)
    for name in ("deadline", "quiet_limit"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value:g}")
    stages = [stage for stage in STAGES if stage in args.stages]
    session = Session(args.out, args.dry, args.deadline, args.quiet_limit, args.prebuilt, args.rebuild)
    with locked(args.out) as free:
        if not free:
            parser.error(f"another check is writing to {args.out}")
        if not args.resume and not args.retry:
            session.records.forget(stages)
        elif args.retry:
            session.records.forget(stages, failed_only=True)
        others = {line["device"] for line in session.records.lines() if "device" in line} - {session.device}
        if others and session.records.plans():
            parser.error(
                f"{args.out} holds results of {', '.join(others)}, this is {session.device}; take another --out"
            )
        session.records.append(device=session.device)
        session.skip_shown()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            run(session, stages)
        except NoGpu as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return USAGE
        except Ended:
            print(f"the {args.deadline:g} s are over; --resume goes on", flush=True)
        finally:
            session.show()
            summary = report.write(session, stages)
    print((args.out / report.MARKDOWN).read_text(), flush=True)
    if summary["failures"]:
        return FAILED
    return OUT_OF_TIME if summary["missing"] else 0


def run(session: Session, stages: Sequence[str]) -> None:
    """Run the stages in order.

    Raises:
        Ended: the time is over.
        NoGpu: there is none.
    """
    waiting: list[str] = []
    for stage in stages:
        work = STAGES[stage]
        if work is None:
            waiting.append(stage)
            continue
        run_worker(session, waiting)
        waiting = []
        with measured(session, [stage]):
            work(session)
        if stage == "build" and "failure" in session.records.results()[stage, "extensions"]:
            return  # all that follows would fail for the same reason
    run_worker(session, waiting)


def run_worker(session: Session, stages: list[str]) -> None:
    """Run stages in a process that is replaced where a case ends it. Raises as `run`."""
    if not stages or all(session.records.missing(stage) == [] for stage in stages):
        return
    command = python(*WORKER, str(session.records.path.resolve()), session.device, *stages)
    with measured(session, stages):
        while True:
            before, lines = len(session.records.results()), len(session.records.lines())
            status, text = session.run(command)
            if status == 0:
                return
            if status == NO_GPU:
                raise NoGpu(last_lines(text, 1))
            for stage, case in session.records.unfinished(lines)[-1:]:
                why = f"{how_it_ended(status, session.quiet_limit)}: {last_lines(text)}"
                session.records.end(stage, case, 0.0, {"failure": why})
            if len(session.records.results()) == before:  # it ended outside of its cases
                why = f"{how_it_ended(status, session.quiet_limit)}: {last_lines(text)}"
                session.records.plan(stages[0], ["start"])
                session.records.end(stages[0], "start", 0.0, {"failure": why})
                return


@contextlib.contextmanager
def measured(session: Session, stages: Sequence[str]) -> Iterator[None]:
    """Note the seconds of stages, and those of processors that their processes took."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        yield
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        session.records.append(ran=list(stages), seconds=time.monotonic() - started, cpu_seconds=cpu)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether no other check writes to a folder; none can begin within the block."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
