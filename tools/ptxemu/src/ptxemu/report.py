"""Static resources of a kernel: what ptxas says of it, and its machine code from the SASS disassembler."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import tempfile
from pathlib import Path

from .errors import CompileError, ToolMissing
from .toolchain import find_tool, run_tool


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
    found = []
    for name in ("ptxas", "ptxas-blackwell"):
        with contextlib.suppress(ToolMissing):
            found.append(find_tool(name))
    try:
        import triton.backends.nvidia as nvidia

        found += [str(p) for p in sorted((Path(nvidia.__file__).parent / "bin").glob("ptxas*"))]
    except ImportError:
        pass
    if not found:
        raise ToolMissing("ptxas was not found (CUDA toolkit or Triton)")
    return list(dict.fromkeys(found))


def assemble(ptx, arch=None, options=()):
    """PTX text -> (cubin bytes, the verbose log of ptxas)."""
    arch = arch or _target_of(ptx)
    error = None
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in.ptx", Path(directory) / "out.cubin"
        source.write_text(ptx)
        for assembler in _assemblers(ptx):
            try:
                done = run_tool([assembler, "-v", f"-arch={arch}", *options, "-o", target, source])
                return target.read_bytes(), done.stderr + done.stdout
            except CompileError as failure:
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
    tool = find_tool("cuobjdump")
    text = _with_cubin(cubin, lambda path: run_tool([tool, "-res-usage", path]).stdout)
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
    source = _read(source)
    cubin = source if _is_elf(source) else assemble(source, arch)[0]
    try:
        tool, options = find_tool("cuobjdump"), ["-sass"]
        text = _with_cubin(cubin, lambda path: run_tool([tool, *options, path]).stdout)
    except (ToolMissing, CompileError):
        tool = find_tool("nvdisasm")
        text = _with_cubin(cubin, lambda path: run_tool([tool, "-hex", path]).stdout)
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
