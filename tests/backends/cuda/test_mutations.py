"""Mistakes planted into copies of the kernels are caught: by the emulator's checks, or by results that are wrong.

Each is one edit of the text of one file. By default a few of them run; `make mutations-cuda` runs all.
"""

import os
import shutil
from dataclasses import dataclass

import ptxemu
import pytest
import torch

from ctkernels.testing.calls import cotangents_for, run
from ctkernels.testing.compare import assert_matches
from tools.gpu.cuda import plan
from tools.gpu.cuda.emulated import BACKEND, Build, Emulator, running_on

from .test_execution import mixed_call

pytestmark = pytest.mark.needs_nvcc

THOROUGH = os.environ.get("CTKERNELS_TEST_PROFILE") == "thorough"


@dataclass(frozen=True)
class Mutation:
    """Replace `old`, which must be there, by `new`; `nth` of several places, else the only one. The kernels of a call
    of `types`, `D` and `Dv` have that code; `growth` of the logits along the prefix is as in `mixed_call`."""

    file: str
    old: str
    new: str
    nth: int = 0
    places: int = 1
    types: str = "bf16"
    D: int = 64
    growth: float = 30.0
    Dv: int | None = None


MUTATIONS = {
    "forward: v is read before it has arrived": Mutation(
        "forward.cuh", "meet<THREADS>();  // v is here, and nobody reads k any more", ""
    ),
    "forward: k of the next block overwrites this one's": Mutation(
        "forward.cuh", "__syncthreads();  // nobody reads the last step's k and v any more", ""
    ),
    "forward: a wait that leaves one group out": Mutation("forward.cuh", "copy_wait<0>();", "copy_wait<1>();", 0, 6),
    "forward: a new top that o does not follow": Mutation(
        "forward.cuh", "o[m][d][2 * h] *= alpha, o[m][d][2 * h + 1] *= alpha;", "o[m][d][2 * h] *= alpha;"
    ),
    "query: a wait that leaves one group out": Mutation(
        "backward_query.cuh", "copy_wait<0>();", "copy_wait<1>();", 1, 4
    ),
    "query: a block that is not copied": Mutation("backward_query.cuh", "if (STAGES == 2 && ahead) {", "if (false) {"),
    "keys: words of another step": Mutation(
        "backward_keys.cuh", "return words + x.ring / STATES * 4 * L;", "return words + x.index % 2 * 4 * L;"
    ),
    "keys: states of another step": Mutation(
        "backward_keys.cuh", "next.ring == 2 * STATES ? 0", "next.ring == 1 * STATES ? 0"
    ),
    "keys: delta forgotten where all is visible": Mutation(
        "backward_keys.cuh", "(ds[0][n][e] - lane.delta)", "ds[0][n][e]", growth=1.0
    ),
    "keys: delta forgotten": Mutation(
        "backward_keys.cuh", "need_k ? ds[0][n][e] - lane.delta : 0.0f", "need_k ? ds[0][n][e] : 0.0f"
    ),
    "tile: columns of a fragment swapped": Mutation("tile.cuh", "8 * (n % 4) + e", "8 * (n % 4) + (1 - e)"),
    "mma: rows of a fragment swapped": Mutation(
        "mma.cuh", "{{pair_of(T{}, acc[2 * i][0], acc[2 * i][1]), pair_of(T{}, acc[2 * i][2], acc[2 * i][3])",
        "{{pair_of(T{}, acc[2 * i][2], acc[2 * i][3]), pair_of(T{}, acc[2 * i][0], acc[2 * i][1])",
    ),
    "shared: the permutation forgotten where matrices are read": Mutation(
        "shared.cuh", "return (at ^ (32 * i % SPAN))", "return (at + (32 * i % SPAN))"
    ),
    "shared: the two rows of a 32-bit fragment swapped": Mutation(
        "shared.cuh", "thread % 4 * 2 + r, thread / 16", "thread % 4 * 2 + 1 - r, thread / 16", types="fp32"
    ),
    "mma: exact products without their small terms": Mutation(
        "mma.cuh", "if constexpr (TF32)", "if constexpr (true)", types="fp32"
    ),
    "walk: a copy that wraps around without changing the row": Mutation(
        "walk.cuh", "chunk -= CHUNKS, ++row;", "chunk -= CHUNKS;", D=80
    ),
    "walk: the last block of the prefix left out": Mutation(
        "walk.cuh", "max(min(split * share + share, tile.prefix_len), 0)",
        "max(min(split * share + share, tile.prefix_len - 14), 0)",
    ),
    "walk: causality one key late": Mutation(
        "walk.cuh", "any &= low_bits(lane.position + 1 - start);", "any &= low_bits(lane.position + 2 - start);"
    ),
    "slices: a slice overwrites the one that is multiplied": Mutation(
        "slices.cuh", "__syncthreads();  // this slice of k is here, and nobody reads the other buffer any more", "",
        D=264, Dv=40,
    ),
    "slices: a wait that leaves one group out": Mutation(
        "slices.cuh", "copy_wait<0>();", "copy_wait<1>();", 3, 8, D=264, Dv=40
    ),
    "slices: a slice of k left out": Mutation(
        "slices.cuh", "count = value_slices + slices;", "count = value_slices + slices - 1;", D=264, Dv=40
    ),
    "slices: states of another step": Mutation(
        "slices.cuh", "fetch(ring ^ 1, 0, buffer ^ 1)", "fetch(ring, 0, buffer ^ 1)", D=264, Dv=40
    ),
    "slices: results one slice off": Mutation("slices.cuh", "kv, mine * SLICE<T>);", "kv, 0);", D=40, Dv=264),
    "reduce: a copy goes on behind narrower values": Mutation(
        "reduce.cuh", "D = job.columns;", "D = job.stride;", D=64, Dv=40
    ),
    "mask: a span one position too long": Mutation(
        "../mask.h", "~low_bits(row.hidden_end - first);", "~low_bits(row.hidden_end + 1 - first);"
    ),
    "setup: a tile takes the first row's span for all": Mutation(
        "setup.cuh", "seen.any |= any, seen.all &= all;", "if (r == info.row_begin) seen.any = any, seen.all = all;"
    ),
}  # fmt: skip
DEFAULT = [
    "forward: v is read before it has arrived",
    "keys: words of another step",
    "walk: causality one key late",
    "slices: a slice overwrites the one that is multiplied",
]


def edited(mutation: Mutation) -> str:
    """The text of the mutation's file after the edit."""
    parts = (plan.SOURCES / "cuda" / mutation.file).read_text().split(mutation.old)
    assert len(parts) == mutation.places + 1, f"{mutation.file} has {len(parts) - 1} times {mutation.old!r}"
    at = mutation.nth + 1
    return mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:])


def mutated(folder, mutation: Mutation) -> Build:
    """A build of a copy of the sources with one edit."""
    shutil.copytree(plan.SOURCES, folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
    (folder / "csrc" / "cuda" / mutation.file).write_text(edited(mutation))
    return Build(folder / "csrc")


def test_every_mistake_has_its_place():
    """Also those that do not run by default."""
    for mutation in MUTATIONS.values():
        edited(mutation)


@pytest.mark.parametrize("name", MUTATIONS if THOROUGH else DEFAULT)
def test_mistake_is_caught(name, tmp_path):
    mutation = MUTATIONS[name]
    build = mutated(tmp_path, mutation)
    call = mixed_call(mutation.types, mutation.D, mutation.growth, Dv=mutation.Dv)
    cotangents = cotangents_for(call)
    with pytest.raises((ptxemu.KernelFault, AssertionError)):
        results = []
        for mode, seed in (("eager", 0), ("lazy", 2)):
            with running_on(Emulator(mode, seed, build=build)):
                results.append(run(call, BACKEND, cotangents))
            assert_matches(call, results[-1], cotangents)
        assert all(torch.equal(x, results[0][key]) for key, x in results[1].items())
