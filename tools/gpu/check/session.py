"""One command of the check: its folder, its clock, and the processes that it starts and watches. Without torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tools.gpu.check.records import Records, parse

ROOT = Path(__file__).resolve().parents[3]
RECORDS, LOG = "gpu_check.jsonl", "log.txt"
GRACE = 3.0  # seconds between asking a process to end and ending it
DEATH_SIGNAL = 1  # prctl: the signal that a process gets when its parent ends
LOST, NO_GPU = 70, 71  # exit status of a process whose GPU computes nothing more; of one that finds none
DEADLINE, HUNG = "deadline", "hung"  # why a process was ended
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Ended(Exception):
    """The time of this command is over."""


@dataclass
class Session:
    """out: folder of the results.  dry: on the CPU, with toy sizes.  deadline: seconds of this command, or None.
    quiet_limit: seconds without a new record after which a process counts as hung.
    prebuilt: folder with built extensions, or None.  rebuild: compile though there are some.
    """

    out: Path
    dry: bool = False
    deadline: float | None = None
    quiet_limit: float = 180.0
    prebuilt: Path | None = None
    rebuild: bool = False
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.records = Records(self.out / RECORDS)
        self._shown = 0  # bytes of the records

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def backends(self) -> tuple[str, ...]:
        return ("cpu",) if self.dry else ("cuda", "triton")

    def left(self) -> float:
        """Seconds for cases; some of the deadline is kept for the report."""
        if self.deadline is None:
            return float("inf")
        return self.deadline - min(10.0, 0.1 * self.deadline) - (time.monotonic() - self.started)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Variables of a child: no network, no interpreter of Triton, compiled code kept in build/."""
        kept = ROOT / "build" / "gpu-check"
        found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        found.setdefault("TRITON_CACHE_DIR", str(kept / "triton"))
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kept / "inductor"))
        found.setdefault("CTKERNELS_CACHE", str(kept / "proofs"))
        return {**found, "PYTHONUNBUFFERED": "1", **(more or {})}

    def run(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, hangs: bool = True, folder: Path = ROOT
    ) -> tuple[int | str, str]:
        """Run a process of the check until it ends.

        hangs: end it where no record comes for `quiet_limit` seconds.  folder: where it runs.

        Returns:
            its exit status, or `HUNG`; and what it printed, which also goes to the log.

        Raises:
            Ended: it was ended, since the time of this command is over.
        """
        with (self.out / LOG).open("a+") as log:
            log.write(f"\n$ {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            process = self._start(command, log, env, folder)
            try:
                why = self._watch(process, hangs)
            finally:
                _end(process)
                self.show()
            log.seek(start)
            text = log.read()
        if why == DEADLINE:
            raise Ended
        return why or process.returncode, text

    def _start(
        self, command: Sequence[str], log: IO[str], env: Mapping[str, str] | None, folder: Path
    ) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )

    def _watch(self, process: subprocess.Popen, hangs: bool) -> str | None:
        heard = time.monotonic()
        while process.poll() is None:
            if self.show():
                heard = time.monotonic()
            if self.left() <= 0:
                return DEADLINE
            if hangs and time.monotonic() - heard > self.quiet_limit:
                return HUNG
            time.sleep(0.05)
        return None

    def show(self) -> bool:
        """Print the results that came since the last call; whether any line came."""
        with self.records.path.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._shown += len(whole)
        for line in parse(whole.decode()):
            result = line.get("result")
            if result is not None and (line["stage"] != "test" or result.get("outcome") in (None, "failed")):
                state = result.get("failure") or result.get("reason") or "done"
                print(f"[{line['stage']}] {line['case']}: {state} ({line['seconds']:.1f} s)", flush=True)
        return bool(whole)

    def skip_shown(self) -> None:
        """Print only what comes from now on."""
        self._shown = self.records.path.stat().st_size


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]


def how_it_ended(status: int | str, quiet_limit: float) -> str:
    """An exit status in words."""
    if status == HUNG:
        return f"no result within {quiet_limit:g} s"
    if isinstance(status, int) and status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with status {status}"


def last_lines(text: str, count: int = 3) -> str:
    """The last lines that say something, as one."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-count:])[-500:]


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _die_with_parent() -> Callable[[], Any] | None:
    if _libc is None:
        return None
    return lambda: _libc.prctl(DEATH_SIGNAL, signal.SIGKILL)


def _end(process: subprocess.Popen) -> None:
    """End a process and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
