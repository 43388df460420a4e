"""Builds translated modules with g++ and launches their kernels on CPU memory.

Built libraries are cached by content in ``$PTXEMU_CACHE`` or ``~/.cache/ptxemu``.  A module is
built on first launch, separately for each level of instrumentation (see runtime/ptx_runtime.h):
0 plain, 1 checks, 2 checks and counters.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import parser
from .counters import STATS, Counters
from .errors import CompileError, KernelFault, PtxError, ToolMissing
from .translate import translate
from .translate.function import c_name

FAULT_KINDS = (
    "none", "out_of_bounds", "misaligned", "uninitialised_shared", "shared_race", "async_hazard",
    "global_race", "deadlock", "barrier_divergence", "warp_sync", "trap", "timeout", "arithmetic",
    "invalid",
)  # fmt: skip

# Names accepted in launch(check=...), with their bits in the runtime.
CHECKS = {"bounds": 1, "uninitialised_shared": 2, "shared_race": 4, "global_race": 8, "sync": 16}

_RUNTIME = Path(__file__).parent / "runtime"
_SOURCES = (
    "ptx_grid.cpp", "ptx_sync.cpp", "ptx_memory.cpp", "ptx_async.cpp", "ptx_counters.cpp", "ptx_print.cpp",
    "ptx_matrix.cpp", "ptx_sums.cpp",
)  # fmt: skip
_HEADERS = ("ptx_runtime.h", "ptx_internal.h")


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("static_shared", ctypes.c_uint32),
        ("dynamic_shared", ctypes.c_uint32),
        ("params", ctypes.c_void_p),
        ("param_bytes", ctypes.c_uint32),
        ("lazy_copies", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("checks", ctypes.c_uint32),
        ("strict_warp_sync", ctypes.c_uint32),
        ("guard_bits", ctypes.c_uint32),
        ("registers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("stack_bytes", ctypes.c_uint64),
        ("timeout_seconds", ctypes.c_double),
        ("instruction_count", ctypes.c_uint32),
        ("range_count", ctypes.c_uint32),
        ("range_begin", ctypes.c_void_p),
        ("range_end", ctypes.c_void_p),
        ("executed", ctypes.c_void_p),
        ("stats", ctypes.c_void_p),
        ("bytes_read", ctypes.c_uint64),
        ("bytes_written", ctypes.c_uint64),
        ("bytes_touched", ctypes.c_uint64),
        ("max_shared_touched", ctypes.c_uint64),
    ]


class _Fault(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("instr", ctypes.c_int32),
        ("other_instr", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("bytes", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("message", ctypes.c_char * 2000),
    ]


# ---------------------------------------------------------------------------------------------
# Building


def cache_directory():
    base = os.environ.get("PTXEMU_CACHE")
    path = Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptxemu"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _cpu_flags():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    present = set(re.search(r"^flags\s*:(.*)$", text, re.M).group(1).split())
    return [f"-m{flag}" for flag in ("avx2", "fma", "f16c") if flag in present]


def _compiler():
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if not compiler:
        raise ToolMissing("g++ (or the compiler named by CXX) is needed to build kernels")
    return compiler


def _compile(arguments):
    done = subprocess.run([_compiler(), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{_compiler()} failed:\n{done.stderr[-4000:]}")


def _build(target, sources, arguments):
    """Compiles to a temporary name and renames, so that concurrent processes do not collide."""
    if target.exists():
        return target
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as temporary:
        pass
    try:
        _compile([*arguments, *map(str, sources), "-o", temporary.name])
        os.chmod(temporary.name, 0o755)
        os.replace(temporary.name, target)
    finally:
        Path(temporary.name).unlink(missing_ok=True)
    return target


def _flags(level):
    return [
        "-std=c++17", "-w", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv",
        *_cpu_flags(), f"-DPTX_LEVEL={level}", f"-I{_RUNTIME}",
    ]  # fmt: skip


def _digest(*texts):
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _runtime_objects(level):
    flags = _flags(level)
    everything = [(_RUNTIME / name).read_text() for name in (*_SOURCES, *_HEADERS)]
    key = _digest(*everything, *flags, _compiler())
    jobs = [(cache_directory() / f"{Path(s).stem}-{key}.o", _RUNTIME / s) for s in _SOURCES]
    return key, [_build(target, [source], [*flags, "-O3", "-c"]) for target, source in jobs]


def build_library(cpp, level, optimise="-O1"):
    """Compiles generated C++ and returns the path of the shared library."""
    runtime_key, objects = _runtime_objects(level)
    key = _digest(cpp, runtime_key, optimise)
    directory = cache_directory()
    target = directory / f"kernel-{key}.so"
    if not target.exists():
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".cpp") as source:
            source.write(cpp)
            source.flush()
            _build(target, [source.name, *objects], [*_flags(level), optimise, "-shared", "-lpthread"])
    return target


# ---------------------------------------------------------------------------------------------
# Buffers and arguments


def pointer(array):
    """The address of a torch tensor's or numpy array's first element, for use inside structs."""
    if hasattr(array, "data_ptr"):
        return array.data_ptr()
    return array.__array_interface__["data"][0]


def byte_range(array):
    """[begin, end) of the memory that the elements of a tensor or array occupy."""
    if hasattr(array, "data_ptr"):
        if array.device.type != "cpu":
            raise PtxError(f"tensors must be on the CPU, not on {array.device}")
        size, strides = array.element_size(), [s * array.element_size() for s in array.stride()]
    else:
        size, strides = array.itemsize, list(array.strides)
    begin = end = pointer(array)
    if 0 in tuple(array.shape):
        return begin, begin
    for length, stride in zip(array.shape, strides, strict=False):
        if stride < 0:
            begin += (length - 1) * stride
        else:
            end += (length - 1) * stride
    return begin, end + size


def _is_array(value):
    return hasattr(value, "data_ptr") or isinstance(value, np.ndarray)


def _merge(ranges):
    """Sorted ranges with overlapping ones joined."""
    merged = []
    for begin, end in sorted(r for r in ranges if r[1] > r[0]):
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return merged


def _encode(kernel, parameter, value):
    """The bytes of one kernel argument."""
    size, where = (
        parameter.size,
        f"{kernel.name}: argument `{parameter.name}` ({parameter.size} bytes)",
    )
    if isinstance(value, (bytes, bytearray)):
        data = bytes(value)
    elif _is_array(value):
        data = struct.pack("<Q", pointer(value))
    elif value is None:
        data = bytes(8)
    elif isinstance(value, (float, np.floating)):
        data = struct.pack({2: "<e", 4: "<f", 8: "<d"}.get(size, "<d"), float(value))
    elif isinstance(value, (bool, int, np.integer)):
        if parameter.kind in ("f32", "f64", "f16"):
            data = struct.pack({"f16": "<e", "f32": "<f", "f64": "<d"}[parameter.kind], float(value))
        else:
            data = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    elif isinstance(value, ctypes.Structure):
        data = bytes(value)
    else:
        raise TypeError(f"{where}: cannot pass a {type(value).__name__}")
    if len(data) != size:
        raise TypeError(f"{where}: got {len(data)} bytes")
    return data


# ---------------------------------------------------------------------------------------------
# Modules


@dataclass
class LaunchResult:
    """What a successful launch reports."""

    kernel: str
    seconds: float
    counters: Counters | None = None  # when asked for


class Module:
    """A translated PTX module.  ``kernels`` maps names to parameters and static resources."""

    def __init__(self, ptx, kernels=None, optimise="-O1"):
        self.ptx = ptx
        parsed = parser.parse(ptx)
        self.target = parsed.target
        translation = translate(parsed, kernels)
        self.cpp = translation.cpp
        self.kernels = translation.kernels
        self.instructions = translation.instructions
        self.variables = {}
        self._optimise = optimise
        self._variants = {}
        self._registered = {}
        self._allocate_variables(translation.variables)

    def _allocate_variables(self, variables):
        for name, v in variables.items():
            storage = np.zeros(v.size + 256, np.uint8)
            skip = -pointer(storage) % 256
            self.variables[name] = storage[skip : skip + max(v.size, 1)]
        for name, v in variables.items():
            element = parser.TYPE_BITS[v.kind] // 8
            data = b"".join(self._initial_value(x, element, v.kind) for x in v.initial or ())
            self.variables[name][: len(data)] = np.frombuffer(data[: v.size], np.uint8)

    def _initial_value(self, text, size, kind):
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text) or re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16).to_bytes(size, "little")
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return (int(text.rstrip("U"), 0) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        if kind in ("f32", "f64") and re.fullmatch(r"-?[\d.eE+-]+", text):
            return struct.pack("<f" if kind == "f32" else "<d", float(text))
        match = re.fullmatch(r"(?:generic\()?([\w$%]+)\)?\s*(?:\+\s*(\d+))?", text)
        if match and match.group(1) in self.variables:
            return (pointer(self.variables[match.group(1)]) + int(match.group(2) or 0)).to_bytes(size, "little")
        raise PtxError(f"cannot evaluate the initial value `{text}`")

    def register(self, *arrays):
        """Allows kernels to access these tensors or arrays in all further launches."""
        for array in arrays:
            self._registered[id(array)] = array

    def unregister(self, *arrays):
        for array in arrays:
            self._registered.pop(id(array), None)

    def build(self, check=True, counters=False):
        """Compiles the variant for these launch options now instead of at the first launch."""
        self._variant(2 if counters else 1 if check else 0)

    def _variant(self, level):
        if level not in self._variants:
            library = ctypes.CDLL(str(build_library(self.cpp, level, self._optimise)))
            for name, storage in self.variables.items():
                ctypes.c_void_p.in_dll(library, f"variable_{c_name(name)}").value = pointer(storage)
            self._variants[level] = library
        return self._variants[level]

    def launch(
        self, name, grid, block, args, shared_bytes=0, mode="eager", schedule_seed=0, check=True, *,
        counters=False, buffers=(), workers=None, timeout_seconds=600.0, strict_warp_sync=False,
        guard_bits=0,
    ):  # fmt: skip
        """Runs a kernel to completion; raises KernelFault when it does something wrong.

        args: tensors, arrays, ints, floats, bytes or ctypes structures, one per kernel parameter.
        mode: when ``cp.async`` data arrives, "eager" at issue or "lazy" at the wait.
        schedule_seed: 0 runs threads in order, anything else picks a random one at every step.
        check: True, False, or a collection of names from ``CHECKS``.
        buffers: further arrays the kernel may access, e.g. those behind pointers inside structs.
        strict_warp_sync: for the race check, only barriers and bar.warp.sync order memory, not
            shuffles, votes or matrix instructions.
        guard_bits: bits that tensor cores keep below those of a float when they align the terms of a sum
            and truncate; published are 0 (V100), 1 (A100) and 2 (H100, B200): see runtime/ptx_sums.cpp.
        """
        if name not in self.kernels:
            raise PtxError(f"no kernel `{name}`; the module has {', '.join(self.kernels) or 'none'}")
        kernel = self.kernels[name]
        grid, block = self._dimensions("grid", grid), self._dimensions("block", block)
        self._check_block(kernel, block)
        if mode not in ("eager", "lazy"):
            raise ValueError(f'mode must be "eager" or "lazy", not {mode!r}')
        if not 0 <= guard_bits <= 8:
            raise ValueError(f"guard_bits must be between 0 and 8, got {guard_bits}")
        enabled = self._check_bits(check)
        args = list(args)
        if len(args) != len(kernel.parameters):
            names = ", ".join(p.name for p in kernel.parameters)
            raise TypeError(f"{name} takes {len(kernel.parameters)} arguments ({names}), got {len(args)}")
        parameters = bytearray(max(kernel.parameter_bytes, 1) + 8)
        for parameter, value in zip(kernel.parameters, args, strict=False):
            data = _encode(kernel, parameter, value)
            parameters[parameter.offset : parameter.offset + parameter.size] = data
        arrays = [x for x in (*args, *buffers, *self._registered.values()) if _is_array(x)]
        ranges = _merge([byte_range(a) for a in arrays] + [byte_range(v) for v in self.variables.values()])

        threads = block[0] * block[1] * block[2]
        level = 2 if counters else 1 if enabled else 0
        library = self._variant(level)
        count = len(self.instructions)
        executed = np.zeros(count, np.uint64)
        stats = np.zeros((count, len(STATS)), np.uint64)
        parameter_buffer = (ctypes.c_char * len(parameters)).from_buffer(parameters)
        begins = np.array([r[0] for r in ranges], np.uint64)
        ends = np.array([r[1] for r in ranges], np.uint64)
        config = _LaunchConfig(
            grid=grid,
            block=block,
            static_shared=kernel.static_shared,
            dynamic_shared=shared_bytes,
            params=ctypes.addressof(parameter_buffer),
            param_bytes=kernel.parameter_bytes,
            lazy_copies=mode == "lazy",
            workers=workers or os.cpu_count() or 1,
            checks=enabled,
            strict_warp_sync=strict_warp_sync,
            guard_bits=guard_bits,
            registers=kernel.max_registers or min(256, 65536 // (threads * kernel.min_blocks) // 8 * 8),
            seed=schedule_seed,
            # not a multiple of a power of two: equal strides would collide in the caches
            stack_bytes=(kernel.stack_bytes + 65536 + 4095) // 4096 * 4096 + 4096 + 192,
            timeout_seconds=timeout_seconds,
            instruction_count=count,
            range_count=len(ranges),
            range_begin=begins.ctypes.data,
            range_end=ends.ctypes.data,
            executed=executed.ctypes.data,
            stats=stats.ctypes.data if counters else None,
        )
        fault = _Fault()
        start = time.perf_counter()
        failed = getattr(library, kernel.symbol)(ctypes.byref(config), ctypes.byref(fault))
        seconds = time.perf_counter() - start
        if failed:
            raise self._fault(kernel, fault, ranges, args, buffers)
        result = LaunchResult(name, seconds)
        if counters:
            result.counters = Counters.collect(
                self.instructions, executed, stats, config, kernel.static_shared + shared_bytes
            )
        return result

    @staticmethod
    def _dimensions(what, value):
        values = [value] if isinstance(value, int) else list(value)
        values = ([*values, 1, 1])[:3]
        if min(values) < 1:
            raise ValueError(f"{what} dimensions must be positive: {tuple(values)}")
        return tuple(int(v) for v in values)

    @staticmethod
    def _check_block(kernel, block):
        threads = block[0] * block[1] * block[2]
        if threads > 1024:
            raise ValueError(f"a block has at most 1024 threads, not {threads}")
        required = kernel.required_threads
        if required and (*required, 1, 1)[:3] != block:
            raise ValueError(f"{kernel.name} requires blocks of {required} threads, not {block}")
        limit = np.prod(kernel.max_threads) if kernel.max_threads else 1024
        if threads > limit:
            raise ValueError(f"{kernel.name} was compiled for at most {limit} threads, not {threads}")

    @staticmethod
    def _check_bits(check):
        if check is True:
            return sum(CHECKS.values())
        if check is False or check is None:
            return 0
        names = [check] if isinstance(check, str) else list(check)
        unknown = set(names) - set(CHECKS)
        if unknown:
            raise ValueError(f"unknown checks {sorted(unknown)}; there are {', '.join(CHECKS)}")
        return sum(CHECKS[n] for n in set(names))

    def _fault(self, kernel, fault, ranges, args, buffers):
        def location(index):
            return self.instructions[index].location if 0 <= index < len(self.instructions) else None

        def describe_instruction(match):
            found = location(int(match.group(1)))
            return found.describe() if found else "an unknown instruction"

        def describe_range(match):
            begin, end = ranges[int(match.group(1))]
            return self._range_name(kernel, begin, end, args, buffers)

        message = fault.message.decode(errors="replace")
        message = re.sub(r"\{instr:(-?\d+)\}", describe_instruction, message)
        message = re.sub(r"\{range:(\d+)\}", describe_range, message)
        return KernelFault(
            FAULT_KINDS[fault.kind],
            kernel.name,
            message,
            tuple(fault.block),
            tuple(fault.thread),
            location(fault.instr),
            location(fault.other_instr),
            fault.address,
            fault.bytes,
        )

    def _range_name(self, kernel, begin, end, args, buffers):
        named = [(f"argument `{p.name}`", a) for p, a in zip(kernel.parameters, args, strict=False)]
        named += [(f"buffers[{n}]", b) for n, b in enumerate(buffers)]
        named += [("a registered buffer", b) for b in self._registered.values()]
        named += [(f"variable `{n}`", v) for n, v in self.variables.items()]
        for label, array in named:
            if _is_array(array) and begin <= byte_range(array)[0] < end:
                return f"{label} ({end - begin} bytes)"
        return f"a buffer of {end - begin} bytes"
