"""Counters of a launch, and static resource reports from ptxas and the SASS disassembler.

Counters are exact counts of what the kernel executed, with memory traffic from the same rules that
profilers document: 32 banks of 4 bytes for shared memory, 32-byte sectors for global memory.  They
say nothing about time.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

clock = time.perf_counter

# Columns of the runtime's per-instruction statistics.
STATS = (
    "shared_requests", "shared_wavefronts", "shared_ideal",
    "global_requests", "global_sectors", "global_ideal", "global_bytes",
)  # fmt: skip


def _ratio(value, ideal):
    return value / ideal if ideal else 1.0


@dataclass
class Counters:
    """What one launch executed.

    instructions: thread-level instruction counts by class (divide by 32 for full warps).
    warp_instructions: mma, ldmatrix and stmatrix per warp, wgmma per warpgroup.
    matrix_flops: multiplications and additions in mma and wgmma; scalar_flops: all others.
    shared_wavefronts / shared_ideal: passes over the banks, and passes if there were no conflict;
        loads, stores, atomics, ldmatrix, stmatrix and the writes of cp.async.
    global_sectors / global_ideal: 32-byte sectors requested per warp instruction, and the fewest
        that could hold the same bytes.
    global_bytes_read / written / touched: unique bytes of the registered buffers over the launch.
    shared_bytes: static plus dynamic allocation; shared_bytes_touched: last byte written, plus 1.
    lines: per PTX instruction that executed: a dict with location, count and memory statistics.
    """

    instructions: dict[str, int]
    warp_instructions: dict[str, int]
    matrix_flops: int
    scalar_flops: int
    shared_requests: int
    shared_wavefronts: int
    shared_ideal: int
    global_requests: int
    global_sectors: int
    global_ideal: int
    global_bytes_read: int
    global_bytes_written: int
    global_bytes_touched: int
    shared_bytes: int
    shared_bytes_touched: int
    lines: list[dict] = field(repr=False, default_factory=list)

    @property
    def bank_conflict_ratio(self):
        """Wavefronts over conflict-free wavefronts; 1.0 means no conflicts."""
        return _ratio(self.shared_wavefronts, self.shared_ideal)

    @property
    def coalescing_ratio(self):
        """Requested sectors over the fewest possible; 1.0 means fully coalesced."""
        return _ratio(self.global_sectors, self.global_ideal)

    @property
    def total_instructions(self):
        return sum(self.instructions.values())

    @property
    def atomics(self):
        return self.instructions.get("atomic", 0)

    @property
    def barriers(self):
        return self.instructions.get("barrier", 0)

    @classmethod
    def collect(cls, infos, executed, stats, config, shared_bytes):
        by_class = collections.Counter()
        collectives = collections.Counter()
        matrix_flops = scalar_flops = 0
        lines = []
        for info, count, row in zip(infos, executed.tolist(), stats.tolist(), strict=False):
            if not count:
                continue
            by_class[info.kind] += count
            if info.kind in ("mma", "wgmma", "ldmatrix", "stmatrix"):
                collectives[info.kind] += count // info.threads
                matrix_flops += count // info.threads * info.matrix_flops
            scalar_flops += count * info.scalar_flops
            lines.append(
                {
                    "location": info.location,
                    "opcode": info.opcode,
                    "class": info.kind,
                    "count": count,
                }
                | dict(zip(STATS, row, strict=False))
            )
        totals = dict(zip(STATS, stats.sum(axis=0).tolist(), strict=False))
        totals.pop("global_bytes")
        return cls(
            instructions=dict(by_class),
            warp_instructions=dict(collectives),
            matrix_flops=matrix_flops,
            scalar_flops=scalar_flops,
            global_bytes_read=config.bytes_read,
            global_bytes_written=config.bytes_written,
            global_bytes_touched=config.bytes_touched,
            shared_bytes=shared_bytes,
            shared_bytes_touched=config.max_shared_touched,
            lines=lines,
            **totals,
        )

    def of_class(self, *kinds):
        """Memory statistics summed over the instructions of some classes."""
        rows = [line for line in self.lines if line["class"] in kinds]
        out = {"count": sum(r["count"] for r in rows)}
        out |= {s: sum(r[s] for r in rows) for s in STATS}
        out["bank_conflict_ratio"] = _ratio(out["shared_wavefronts"], out["shared_ideal"])
        out["coalescing_ratio"] = _ratio(out["global_sectors"], out["global_ideal"])
        return out

    def worst_bank_conflicts(self, limit=5):
        rows = [r for r in self.lines if r["shared_wavefronts"] > r["shared_ideal"]]
        return sorted(rows, key=lambda r: r["shared_ideal"] - r["shared_wavefronts"])[:limit]

    def worst_coalescing(self, limit=5):
        rows = [r for r in self.lines if r["global_sectors"] > r["global_ideal"]]
        return sorted(rows, key=lambda r: r["global_ideal"] - r["global_sectors"])[:limit]

    def summary(self):
        """A table for people."""
        out = ["instructions (per thread):"]
        for kind, count in sorted(self.instructions.items(), key=lambda x: -x[1]):
            out.append(f"  {kind:<18}{count:>14,}")
        for kind, count in self.warp_instructions.items():
            unit = "warpgroup" if kind == "wgmma" else "warp"
            out.append(f"  {kind} per {unit}: {count:,}")
        out.append(f"matrix flops {self.matrix_flops:,}, scalar flops {self.scalar_flops:,}")
        out.append(
            f"shared memory: {self.shared_bytes:,} bytes allocated, "
            f"{self.shared_requests:,} requests, "
            f"{self.shared_wavefronts:,} wavefronts, {self.shared_ideal:,} without conflicts "
            f"(ratio {self.bank_conflict_ratio:.2f})"
        )
        out.append(
            f"global memory: {self.global_requests:,} requests, {self.global_sectors:,} sectors, "
            f"{self.global_ideal:,} ideal (ratio {self.coalescing_ratio:.2f}); unique bytes read "
            f"{self.global_bytes_read:,}, written {self.global_bytes_written:,}"
        )
        for title, rows, value, ideal in (
            ("bank conflicts", self.worst_bank_conflicts(3), "shared_wavefronts", "shared_ideal"),
            ("uncoalesced", self.worst_coalescing(3), "global_sectors", "global_ideal"),
        ):
            for r in rows:
                out.append(f"  {title}: {r[value]:,} instead of {r[ideal]:,} at {r['location'].describe()}")
        return "\n".join(out)


# ---------------------------------------------------------------------------------------------
# Static resources


def _tools():
    from . import toolchain  # imported here because it imports launch, which imports this module

    return toolchain


def _is_elf(source):
    return isinstance(source, (bytes, bytearray)) and bytes(source[:4]) == b"\x7fELF"


def _read(source):
    """A path, PTX text or bytes -> PTX text or cubin bytes."""
    if isinstance(source, os.PathLike) or (isinstance(source, str) and "\n" not in source):
        data = Path(source).read_bytes()
        return data if _is_elf(data) else data.decode()
    if isinstance(source, (bytes, bytearray)) and not _is_elf(source):
        return bytes(source).decode()
    return source


def _target_of(ptx):
    return re.search(r"^\s*\.target\s+(\w+)", ptx, re.M).group(1)


def _assemblers(ptx):
    """ptxas programs to try; older ones reject newer PTX versions."""
    tools, found = _tools(), []
    for name in ("ptxas", "ptxas-blackwell"):
        with contextlib.suppress(tools.ToolMissing):
            found.append(tools.find_tool(name))
    try:
        import triton.backends.nvidia as nvidia

        found += [str(p) for p in sorted((Path(nvidia.__file__).parent / "bin").glob("ptxas*"))]
    except ImportError:
        pass
    if not found:
        raise tools.ToolMissing("ptxas was not found (CUDA toolkit or Triton)")
    return list(dict.fromkeys(found))


def assemble(ptx, arch=None, options=()):
    """PTX text -> (cubin bytes, the verbose log of ptxas)."""
    tools = _tools()
    arch = arch or _target_of(ptx)
    error = None
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in.ptx", Path(directory) / "out.cubin"
        source.write_text(ptx)
        for assembler in _assemblers(ptx):
            try:
                done = tools.run_tool([assembler, "-v", f"-arch={arch}", *options, "-o", target, source])
                return target.read_bytes(), done.stderr + done.stdout
            except tools.CompileError as failure:
                error = error or failure
    raise error


def resources(source, arch=None):
    """Registers, spills, stack and static shared memory per kernel.

    source: PTX text, cubin bytes, or a path to either.  A cubin carries registers, stack and shared
    memory but not spill counts, which are then None.
    """
    source = _read(source)
    return _resources_of_cubin(source) if _is_elf(source) else _resources_of_ptx(source, arch)


def _resources_of_ptx(ptx, arch):
    _, log = assemble(ptx, arch)
    out, name = {}, None
    for line in log.splitlines():
        match = re.search(r"(?:Compiling entry function '|Function properties for )([\w$]+)", line)
        if match:
            name = match.group(1)
            out.setdefault(
                name,
                dict(
                    registers=None,
                    spill_stores=0,
                    spill_loads=0,
                    stack=0,
                    static_shared=0,
                    barriers=0,
                ),
            )
        for key, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spill_stores", r"(\d+) bytes spill stores"),
            ("spill_loads", r"(\d+) bytes spill loads"),
            ("static_shared", r"(\d+) bytes smem"),
            ("barriers", r"used (\d+) barriers"),
        ):
            match = re.search(pattern, line)
            if match and name:
                out[name][key] = int(match.group(1))
    return {k: v for k, v in out.items() if v["registers"] is not None}


def _with_cubin(cubin, function):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "in.cubin"
        path.write_bytes(cubin)
        return function(path)


def _resources_of_cubin(cubin):
    tools = _tools()
    tool = tools.find_tool("cuobjdump")
    text = _with_cubin(cubin, lambda path: tools.run_tool([tool, "-res-usage", path]).stdout)
    out = {}
    for name, usage in re.findall(r"Function\s+([\w$]+):\s*\n\s*(.*)", text):
        values = {k: int(v) for k, v in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", usage)}
        out[name] = dict(
            registers=values.get("REG"),
            spill_stores=None,
            spill_loads=None,
            stack=values.get("STACK"),
            static_shared=values.get("SHARED"),
            local=values.get("LOCAL"),
        )
    return out


def disassemble(source, arch=None):
    """SASS instructions per kernel: name -> list of (address, opcode, full text)."""
    tools = _tools()
    source = _read(source)
    cubin = source if _is_elf(source) else assemble(source, arch)[0]
    try:
        tool, options = tools.find_tool("cuobjdump"), ["-sass"]
        text = _with_cubin(cubin, lambda path: tools.run_tool([tool, *options, path]).stdout)
    except (tools.ToolMissing, tools.CompileError):
        tool = tools.find_tool("nvdisasm")
        text = _with_cubin(cubin, lambda path: tools.run_tool([tool, "-hex", path]).stdout)
    out, current = {}, None
    for line in text.splitlines():
        head = re.search(r"Function : ([\w$]+)|^\s*\.text\.([\w$]+):", line)
        if head:
            current = out.setdefault(head.group(1) or head.group(2), [])
            continue
        match = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line)
        if match and current is not None:
            body = match.group(2).strip()
            opcode = re.sub(r"^@!?U?P\w+\s+", "", body).split()[0]
            current.append((int(match.group(1), 16), opcode, body))
    return out


_LOOP_WEIGHT = ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA", "UTCHMMA", "FFMA")


def _loops(instructions):
    """(first, last) indices of backward branches' ranges."""
    index = {address: n for n, (address, _, _) in enumerate(instructions)}
    for n, (address, opcode, body) in enumerate(instructions):
        target = re.search(r"\bBRA\S*\s.*?`?\(?\.?(?:0x)([0-9a-f]+)", body) if opcode.startswith("BRA") else None
        if target and int(target.group(1), 16) <= address and int(target.group(1), 16) in index:
            yield index[int(target.group(1), 16)], n


def sass_histogram(source, arch=None):
    """Opcode counts per kernel, for the whole kernel and for its hottest loop.

    The hottest loop is the backward branch range with the most matrix (else FFMA) instructions, the
    tightest of them when several have the same; a branch of an instruction to itself (the trap
    after EXIT) is not a loop.  Returns
    name -> {"total": Counter, "loop": Counter, "loop_range": (first, last address) or None}.
    """
    out = {}
    for name, instructions in disassemble(source, arch).items():
        base = [opcode.split(".")[0] for _, opcode, _ in instructions]
        best = None
        for first, last in _loops(instructions):
            if first == last:
                continue
            inside = base[first : last + 1]
            weight = next((inside.count(k) for k in _LOOP_WEIGHT if k in base), 0)
            density = weight / len(inside)
            if best is None or (weight, density) > best[0]:
                best = (weight, density), first, last
        loop = collections.Counter(base[best[1] : best[2] + 1]) if best else collections.Counter()
        out[name] = {
            "total": collections.Counter(base),
            "loop": loop,
            "loop_range": (instructions[best[1]][0], instructions[best[2]][0]) if best else None,
        }
    return out
