"""How much of the machine code in the hottest loops are tensor-core instructions, beside FlashAttention-2's kernels.

A loop holds code for tiles that are masked in part and for tiles that are not. What counts is the path of a full tile:
of all paths once around a loop, those with the most tensor-core instructions, and of these the shortest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import networkx
from ptxemu import report

from benchmarks import harness
from tools.gpu.cuda import build as cuda_build

Instruction = tuple[int, str, str]  # address, opcode, text
TENSOR = "HMMA"
KERNELS = {"forward": ("forward",), "backward": ("query", "keys")}
HEAD_DIMENSIONS = (64, 128)
ARCHITECTURE, DTYPE, VARIANT = "sm_80", "bf16", "plain"


@dataclass(frozen=True)
class Share:
    """Tensor-core instructions on the path of a full tile, all instructions on it, registers and bytes of spills."""

    kernel: str
    D: int
    tensor: int
    instructions: int
    registers: int
    spills: int

    @property
    def share(self) -> float:
        return self.tensor / self.instructions


# FlashAttention-2's hottest loops, as nvcc 13.0 compiles its sm_80 kernels for bf16 and causal attention
FLASH_ATTENTION = {
    ("forward", 64): Share("FlashAttention-2 forward", 64, 128, 614, 238, 0),
    ("backward", 64): Share("FlashAttention-2 backward", 64, 80, 399, 192, 0),
    ("forward", 128): Share("FlashAttention-2 forward", 128, 256, 880, 255, 352),
    ("backward", 128): Share("FlashAttention-2 backward", 128, 320, 967, 255, 168),
}


def blocks(instructions: Sequence[Instruction]) -> networkx.DiGraph:
    """The control flow: nodes are basic blocks by their first instruction's index, with the range and the number of
    tensor-core instructions."""
    index = {address: n for n, (address, _, _) in enumerate(instructions)}
    targets = {n: _target(text, index) for n, (_, _, text) in enumerate(instructions)}
    jumps = [n for n, (_, opcode, _) in enumerate(instructions) if opcode.split(".")[0] in ("BRA", "EXIT", "RET")]
    starts = sorted({0, *(n + 1 for n in jumps), *(targets[n] for n in jumps if targets[n] is not None)})
    starts = [n for n in starts if n < len(instructions)]
    graph = networkx.DiGraph()
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        tensor = sum(opcode.startswith(TENSOR) for _, opcode, _ in instructions[start:end])
        graph.add_node(start, end=end, tensor=tensor)
        _, opcode, text = instructions[end - 1]
        is_jump = opcode.split(".")[0] in ("BRA", "EXIT", "RET")
        if is_jump and targets[end - 1] is not None:
            graph.add_edge(start, targets[end - 1])
        if (not is_jump or _conditional(text)) and end < len(instructions):
            graph.add_edge(start, end)
    return graph


def _target(text: str, index: Mapping[int, int]) -> int | None:
    """Of a branch: the index of the instruction that it leads to."""
    found = re.search(r"\bBRA\S*\s.*?\(?\.?(?:0x)([0-9a-f]+)", text)
    return index.get(int(found.group(1), 16)) if found else None


def _conditional(text: str) -> bool:
    """Whether a jump may not be taken: it has a predicate, before the opcode or as its first operand."""
    return text.startswith("@") or re.match(r"BRA\S*\s+!?U?P\d", text) is not None


def path_of_a_full_tile(instructions: Sequence[Instruction]) -> list[int]:
    """Indices of the instructions on it; empty where no loop has tensor-core instructions."""
    graph = blocks(instructions)
    graph = graph.subgraph(networkx.descendants(graph, 0) | {0})
    above = networkx.immediate_dominators(graph, 0)
    back = [(u, v) for u, v in graph.edges if _dominates(above, v, u)]
    forward = graph.copy()
    forward.remove_edges_from(back)
    best: tuple[tuple[int, int], list[int]] | None = None
    for tail, head in back:
        found = _best_path(forward, head, tail)
        if found is not None and (best is None or found[0] > best[0]):
            best = found
    if best is None or best[0][0] == 0:
        return []
    return [n for start in best[1] for n in range(start, graph.nodes[start]["end"])]


def _dominates(above: Mapping[int, int], a: int, b: int) -> bool:
    """Whether every path to block b leads through block a."""
    while b != a and above.get(b, b) not in (b, None):
        b = above[b]
    return a == b


def _best_path(graph: networkx.DiGraph, head: int, tail: int) -> tuple[tuple[int, int], list[int]] | None:
    """The path from head to tail with the most tensor-core instructions; of several, the one with the fewest
    instructions. Returns both numbers (the second negative), and its blocks. None: there is no path."""
    inside = (networkx.descendants(graph, head) | {head}) & (networkx.ancestors(graph, tail) | {tail})
    if head not in inside or tail not in inside:
        return None
    best: dict[int, tuple[tuple[int, int], int | None]] = {}
    for node in networkx.topological_sort(graph.subgraph(inside)):
        data = graph.nodes[node]
        before = [(best[p][0], p) for p in graph.predecessors(node) if p in best] if node != head else []
        (tensor, length), previous = max(before, default=((0, 0), None), key=lambda item: item[0])
        best[node] = ((tensor + data["tensor"], length - (data["end"] - node)), previous)
    path: list[int] = []
    node: int | None = tail
    while node is not None:
        path.append(node)
        node = best[node][1]
    return best[tail][0], path[::-1]


def measure(
    architecture: str = ARCHITECTURE, head_dimensions: Iterable[int] = HEAD_DIMENSIONS
) -> tuple[list[Share], dict[str, Counter[str]]]:
    """The shares of the kernels for full tiles, and what else is on the path: kernel -> opcode -> number."""
    machine_code, needs = cuda_build.instances(DTYPE, VARIANT, architecture)
    listing = report.disassemble(machine_code)
    shares, opcodes = [], {}
    for D in head_dimensions:
        for kernel in (name for names in KERNELS.values() for name in names):
            name = f"ctk_{kernel}_{DTYPE}_{D}_{VARIANT}"
            path = [listing[name][n] for n in path_of_a_full_tile(listing[name])]
            tensor = sum(opcode.startswith(TENSOR) for _, opcode, _ in path)
            need = needs[name]
            shares.append(Share(kernel, D, tensor, len(path), need.registers, need.spill_stores + need.spill_loads))
            opcodes[name] = Counter(opcode.split(".")[0] for _, opcode, _ in path)
    return shares, opcodes


def phase_of(kernel: str) -> str:
    return next(phase for phase, names in KERNELS.items() if kernel in names)


def record(shares: Sequence[Share], opcodes: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """What is kept of a measurement."""
    return {
        "nvcc": cuda_build.nvcc_version(),
        "architecture": ARCHITECTURE,
        "entries": [asdict(share) for share in shares],
        "opcodes": {name: dict(counts.most_common()) for name, counts in opcodes.items()},
    }


def violations(share: Share) -> list[str]:
    """Where a kernel falls behind FlashAttention-2's, or spills."""
    theirs = FLASH_ATTENTION[phase_of(share.kernel), share.D]
    broken = []
    if share.share < theirs.share:
        broken.append(f"{share.kernel} D={share.D}: {share.share:.3f} tensor-core instructions, not {theirs.share:.3f}")
    if share.spills:
        broken.append(f"{share.kernel} D={share.D}: {share.spills} bytes of spills")
    return broken


def regressions(share: Share, committed: Mapping[tuple[str, int], Share]) -> list[str]:
    """How a kernel is worse than the committed one."""
    before, where = committed.get((share.kernel, share.D)), f"{share.kernel} D={share.D}"
    if before is None:
        return [f"{where}: not in the committed table; run make gpu-report"]
    broken = [f"{where}: spills were {before.spills}, are {share.spills}"] if share.spills > before.spills else []
    if share.share < 0.99 * before.share:  # an instruction more or less is no regression
        broken.append(f"{where}: the share was {before.share:.3f}, is {share.share:.3f}")
    return broken


def read(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Share]:
    """The committed shares by kernel and head dimension."""
    return {(share.kernel, share.D): share for share in (Share(**entry) for entry in entries)}


def markdown(shares: Sequence[Share]) -> str:
    """A line per kernel, each phase under FlashAttention-2's kernel."""
    rows = []
    for (phase, D), theirs in sorted(FLASH_ATTENTION.items(), key=lambda item: (item[0][1], item[0][0] != "forward")):
        ours = [s for s in shares if s.D == D and phase_of(s.kernel) == phase]
        rows += [_line(theirs), *map(_line, ours)]
    header = ["kernel", "D", "tensor-core instructions", "of all", "share", "registers", "bytes of spills"]
    return harness.table(header, rows)


def _line(share: Share) -> list[str]:
    numbers = [
        str(share.tensor),
        str(share.instructions),
        f"{share.share:.3f}",
        str(share.registers),
        str(share.spills),
    ]
    return [share.kernel, str(share.D), *numbers]
