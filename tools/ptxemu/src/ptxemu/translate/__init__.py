"""PTX module -> one C++ translation unit.

Every ``.entry`` becomes ``extern "C" int launch_<name>(LaunchConfig*, Fault*)``.  Module variables
are owned by the caller: the C++ declares a pointer for each, to be set after loading.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .. import parser
from ..errors import Unsupported
from . import arithmetic, matrix, memory, warp  # noqa: F401  (they fill the opcode table)
from .classify import classify, matrix_flops, scalar_flops, threads_per_instruction
from .function import FunctionEmitter, MemorySymbol, align_up, c_name


@dataclass(frozen=True)
class KernelParameter:
    name: str
    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """What a launch needs to know about an ``.entry``."""

    name: str
    symbol: str
    parameters: tuple[KernelParameter, ...]
    parameter_bytes: int
    static_shared: int
    stack_bytes: int
    required_threads: tuple[int, ...] = ()
    max_threads: tuple[int, ...] = ()
    max_registers: int = 0  # .maxnreg; 0: what the register file gives each thread
    min_blocks: int = 1


@dataclass(frozen=True)
class InstructionInfo:
    function: str
    location: parser.Location
    opcode: str
    kind: str
    matrix_flops: int
    scalar_flops: int
    threads: int


@dataclass
class Translation:
    cpp: str
    kernels: dict[str, Kernel]
    instructions: list[InstructionInfo]
    variables: dict[str, parser.Variable] = field(default_factory=dict)


class ModuleTranslator:
    def __init__(self, module, wanted=None):
        self.module = module
        self.symbols = {}
        self.variables = {}
        self.instructions = []
        self.shared_bytes = 0  # static shared memory declared at module level
        self.shared_align = 16
        self.device_functions = {f.name for f in module.functions if not f.is_kernel}
        self.wanted = wanted
        for variable in module.variables:
            self.declare(variable)

    def declare(self, variable):
        if variable.space == "shared":
            self.shared_align = max(self.shared_align, variable.align)
            if variable.dynamic:
                symbol = MemorySymbol("shared", "t->block->static_shared")
            else:
                self.shared_bytes = align_up(self.shared_bytes, variable.align)
                symbol = MemorySymbol("shared", f"{self.shared_bytes}u")
                self.shared_bytes += variable.size
        else:
            self.variables[variable.name] = variable
            symbol = MemorySymbol(variable.space, f"((u64)variable_{c_name(variable.name)})")
        self.symbols[variable.name] = symbol

    def add_instruction(self, i, function):
        self.instructions.append(
            InstructionInfo(
                function.name,
                i.location,
                i.name,
                classify(i),
                matrix_flops(i),
                scalar_flops(i),
                threads_per_instruction(i),
            )
        )
        return len(self.instructions) - 1

    def translate(self):
        emitters = {}
        bodies = []
        for function in self.module.functions:
            if function.is_kernel and self.wanted is not None and function.name not in self.wanted:
                continue
            emitter = FunctionEmitter(self, function)
            bodies.append(emitter.emit())
            emitters[function.name] = emitter
        frames = {name: self._stack(name, emitters) for name in emitters}
        kernels = {}
        launches = []
        for name, emitter in emitters.items():
            if not emitter.function.is_kernel:
                continue
            symbol = c_name(name)
            directives = emitter.function.directives
            parameters = tuple(
                KernelParameter(p.name, offset, p.size, p.kind)
                for p, offset in zip(emitter.function.parameters, emitter.parameter_offsets, strict=False)
            )
            kernels[name] = Kernel(
                name,
                f"launch_{symbol}",
                parameters,
                emitter.parameter_bytes,
                align_up(emitter.shared_end, self.shared_align),
                frames[name],
                directives.get("reqntid", ()),
                directives.get("maxntid", ()),
                *directives.get("maxnreg", (0,)),
                *directives.get("minnctapersm", (1,)),
            )
            launches.append(
                f'extern "C" int launch_{symbol}(LaunchConfig* config, Fault* fault) '
                f"{{ return run_grid(kernel_{symbol}, config, fault); }}"
            )
        parts = [
            '#include "ptx_runtime.h"',
            '#pragma GCC diagnostic ignored "-Wunused-label"',
            "using namespace ptx;",
            *(f'extern "C" {{ u8* variable_{c_name(v)}; }}' for v in self.variables),
            *(e.signature() + ";" for e in emitters.values() if not e.function.is_kernel),
            *bodies,
            *launches,
        ]
        return Translation("\n".join(parts) + "\n", kernels, self.instructions, self.variables)

    def _stack(self, name, emitters, active=()):
        """Frame bytes of the deepest call chain."""
        if name in active:
            raise Unsupported(f"recursive device function {name}")
        emitter = emitters[name]
        deepest = max((self._stack(c, emitters, (*active, name)) for c in emitter.calls), default=0)
        return emitter.frame_bytes() + deepest


def translate(module, kernels=None):
    """Translates a parsed module; `kernels` optionally selects entry points by name."""
    return ModuleTranslator(module, kernels).translate()
