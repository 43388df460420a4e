"""Registers, spills and shared memory: the rules, the committed table, and a subset compiled again on every run."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import triton

from tools.gpu.architectures import ARCHITECTURES
from tools.gpu.triton import resources
from tools.gpu.triton.resources import TRAINING, TYPES, Entry

RESULTS = Path(resources.__file__).parents[1] / "results"
# `make gpu-report` compiles everything
COMPILED = [("sm_80", 64, "bf16"), ("sm_80", 128, "fp16"), ("sm_90", 96, "bf16"), ("gfx942", 64, "bf16")]
ENTRY = Entry("training", "forward", "k", 64, "bf16", "sm_80", "", 4, 2, 128, 0, 0, 4096, 166912, 4)


@pytest.fixture(scope="module")
def table():
    """What `make gpu-report` wrote: the version of Triton, and the entries by key."""
    record = json.loads((RESULTS / "triton_resources.json").read_text())
    return record["triton"], resources.read(record["entries"])


@pytest.mark.parametrize("name, D, dtype", COMPILED)
def test_kernels_fit_and_are_not_worse_than_committed(table, name, D, dtype):
    sizes = replace(TRAINING, D=D, dtype=TYPES[dtype], prefix_dtype=torch.float32)
    entries = resources.measure(sizes, dtype, ARCHITECTURES[name])
    assert {"forward_kernel", "dq_kernel", "own_kernel", "prefix_kernel"} <= {entry.kernel for entry in entries}
    broken = [line for entry in entries for line in resources.violations(entry)]
    version, committed = table
    if triton.__version__ == version:  # another compiler allocates other registers
        broken += [line for entry in entries for line in resources.regressions(entry, committed)]
    assert not broken, "\n".join(broken)


def test_the_committed_table_breaks_no_rule(table):
    assert [line for entry in table[1].values() for line in resources.violations(entry)] == []


def test_the_committed_table_covers_everything(table):
    """Every architecture, and on each every call and its largest kernels."""
    kernels = {"forward_kernel", "dq_kernel", "own_kernel", "prefix_kernel"}
    for name in ARCHITECTURES:
        for sizes, dtype in resources.cases(name):
            found = {
                entry.kernel
                for entry in table[1].values()
                if (entry.architecture, entry.variant, entry.D, entry.dtype) == (name, sizes.name, sizes.D, dtype)
            }
            missing = (kernels if not sizes.past else {"forward_kernel"}) - found
            assert not missing, f"{name} {sizes.name} {sizes.D} {dtype}: {missing}"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spills=8), "8 bytes of spills"),
        (dict(spills=8, D=128), "8 bytes of spills"),
        (dict(shared=166913), "166913 bytes of shared memory, the limit is 166912"),
        (dict(blocks=0), "do not fit a multiprocessor"),
        (dict(spills=8, D=256), None),
        (dict(spills=8, architecture="gfx942"), None),
    ],
)
def test_rules(change, message):
    broken = resources.violations(replace(ENTRY, **change))
    assert not broken if message is None else message in broken[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spills=1), "spills was 0, is 1"),
        (dict(stack=16), "stack was 0, is 16"),
        (dict(shared=4097), "shared was 4096, is 4097"),
        (dict(blocks=3), "blocks was 4, is 3"),
        (dict(kernel="new"), "not in the committed table"),
        (dict(registers=130), None),  # no matter while as many blocks fit
        (dict(shared=4000, blocks=5), None),
    ],
)
def test_regressions(change, message):
    worse = resources.regressions(replace(ENTRY, **change), {ENTRY.key: ENTRY})
    assert not worse if message is None else message in worse[0]


def test_the_table_can_be_read_and_shown():
    entries = [ENTRY, replace(ENTRY, architecture="gfx942", spills=3)]
    assert list(resources.read(map(asdict, entries)).values()) == entries
    assert "| k | 64 | bf16 | 128 / 4 / 4 | 128 +3 / 4 / 4 |" in resources.markdown(entries)
