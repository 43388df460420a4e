"""The campaign finds what is wrong, and finds nothing in 2,000 cases."""

import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctkernels.testing.calls import tensor
from tools.fuzz import cases
from tools.fuzz.cases import Case
from tools.fuzz.engine import Engine
from tools.fuzz.guard import Guard, span_bytes

ROOT = Path(__file__).parents[3]


def test_a_slice():
    """2,000 cases, in a process of its own: the kernels' threads of this one do not live through a fork."""
    command = [sys.executable, "-m", "tools.fuzz", "--cases", "2000", "--first", "1000000"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "cases (" in done.stdout and ", 0 wrong." in done.stdout


@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced", "broadcast"])
@pytest.mark.parametrize("at_end", [False, True])
def test_guarded_tensors(layout, at_end):
    """Values and strides are those that were given; the first byte outside ends the process."""
    x = tensor(torch.Generator().manual_seed(1), (3, 5, 7), torch.bfloat16, layout)
    placed = Guard().place("x", x, at_end)
    assert torch.equal(placed, x) and placed.stride() == x.stride()
    edge = placed.data_ptr() + (span_bytes(placed) if at_end else -1)
    assert read_in_child(edge - 1 if at_end else edge + 1) == 0
    assert read_in_child(edge) == -signal.SIGSEGV


def read_in_child(address: int) -> int:
    """How a process ends that reads a byte."""
    process = os.fork()
    if process == 0:
        faulthandler.disable()
        ctypes.string_at(address, 1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_number_gives_one_call():
    one, same, other = (Case.draw(number, ["bf16"]) for number in (5, 5, 6))
    assert all(torch.equal(x, same.call.tensors[name]) for name, x in one.call.tensors.items())
    assert one.call.mask is None or one.call.mask.keys() == same.call.mask.keys()
    assert one.traits() == same.traits() != other.traits()


@pytest.fixture
def engine():
    return Engine("cpu")


def broken(monkeypatch, change):
    """The op, with results that are changed."""
    stock = cases.run

    def run(*args):
        got = stock(*args)
        change(got)
        return got

    monkeypatch.setattr(cases, "run", run)


def test_wrong_numbers_are_found(monkeypatch, engine):
    broken(monkeypatch, lambda got: got["out"].mul_(1.05))
    tally = engine.many(0, 4)
    assert tally.calls == 4 and len(tally.wrong) > 4
    assert tally.wrong[0].startswith("case ") and "out: error " in tally.wrong[0]


def test_a_process_that_dies_is_found(monkeypatch, engine):
    """And the calls behind it still run."""

    stock = cases.run

    def run(call, build, *others):
        if call.tensors["q"].shape == dying and str(build) == str(engine.builds[-1]):
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return stock(call, build, *others)

    dying = Case.draw(2, engine.types, engine.sizes).call.tensors["q"].shape
    monkeypatch.setattr(cases, "run", run)
    tally = engine.many(0, 5)
    assert tally.wrong == ["case 2: the process ended with SIGSEGV"] and tally.calls == 4


def test_nan_in_what_no_query_sees(engine):
    """Calls with it are drawn, and hold it where the clean call does not."""
    drawn = [case for case in (Case.draw(number, ["fp32"]) for number in range(40)) if case.poisoned]
    assert any(x.isnan().any() for case in drawn for x in case.given.tensors.values())
    assert not any(x.isnan().any() for case in drawn for x in case.call.tensors.values())
