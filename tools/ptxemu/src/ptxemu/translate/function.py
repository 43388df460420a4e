"""Emits one C++ function per PTX function: scopes, registers, operands, labels, calls of emitters.

PTX registers become C++ locals holding raw bits (``u32`` for every 32-bit type and so on), declared
together at the top so that ``goto`` works.  Memory symbols become expressions for their address:
offsets for shared memory, host addresses for everything else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .. import parser
from ..errors import ParseError, Unsupported
from ..parser import TYPE_BITS
from .table import EMITTERS, UINT
from .wgmma_registers import Use, instrument, names_in


@dataclass(frozen=True)
class Register:
    name: str
    bits: int


@dataclass(frozen=True)
class RegisterFamily:
    """`.reg .b32 %r<100>;`"""

    prefix: str
    bits: int
    count: int


@dataclass(frozen=True)
class MemorySymbol:
    space: str
    address: str  # C++ expression


_XYZ = {"x": 0, "y": 1, "z": 2, "w": 3}
_SPECIAL_VECTORS = {
    "tid": "t->tid[%d]",
    "ntid": "t->block->ntid[%d]",
    "ctaid": "t->block->ctaid[%d]",
    "nctaid": "t->block->nctaid[%d]",
    "clusterid": "t->block->ctaid[%d]",
    "nclusterid": "t->block->nctaid[%d]",
    "cluster_ctaid": "(%d, 0u)",
    "cluster_nctaid": "(%d, 1u)",
}
_SPECIAL = {
    "laneid": "t->lane",
    "warpid": "(t->linear >> 5)",
    "nwarpid": "t->block->warp_count",
    "smid": "0u",
    "nsmid": "1u",
    "gridid": "0ull",
    "clock": "0u",
    "clock_hi": "0u",
    "clock64": "0ull",
    "globaltimer": "0ull",
    "globaltimer_lo": "0u",
    "lanemask_eq": "(1u << t->lane)",
    "lanemask_lt": "((1u << t->lane) - 1)",
    "lanemask_le": "((2u << t->lane) - 1)",
    "lanemask_ge": "(~((1u << t->lane) - 1))",
    "lanemask_gt": "(~((2u << t->lane) - 1))",
    "dynamic_smem_size": "(t->shared_bytes - t->block->static_shared)",
    "total_smem_size": "t->shared_bytes",
    "aggr_smem_size": "t->shared_bytes",
    "cluster_ctarank": "0u",
    "cluster_nctarank": "1u",
    "is_explicit_cluster": "0u",
}


def c_name(name):
    return re.sub(r"\W", "_", name)


def align_up(value, align):
    return (value + align - 1) // align * align


class FunctionEmitter:
    def __init__(self, module, function):
        self.module = module  # the ModuleTranslator
        self.function = function
        self.scopes = [{}]
        self.registers = {}  # Register -> None, in order of first use
        self.call_buffers = []  # (C++ name, size) of .param variables at call sites
        self.lines = []
        self.unique = 0
        self.local_bytes = 0
        self.shared_end = module.shared_bytes
        self.instruction = None
        self.id = -1
        self.defined_labels = set()
        self.calls = set()
        self.uses = []  # of registers, if there are wgmma
        self.has_wgmma = any(isinstance(i, parser.Instruction) and i.opcode[0] == "wgmma" for i in function.body)
        self.tracked = 0
        self._declare_parameters()

    # -- symbols ---------------------------------------------------------------------------

    def _declare_parameters(self):
        function, names = self.function, self.scopes[0]
        if any(p.register for p in function.parameters + function.results):
            raise Unsupported(f".func {function.name}: parameters in registers")
        self.parameter_offsets = []
        offset = 0
        for index, p in enumerate(function.parameters):
            if function.is_kernel:
                offset = align_up(offset, p.align)
                self.parameter_offsets.append(offset)
                names[p.name] = MemorySymbol("param", f"((u64)t->params + {offset})")
                offset += p.size
            else:
                names[p.name] = MemorySymbol("param", f"((u64)argument_{index})")
        self.parameter_bytes = offset
        for index, p in enumerate(function.results):
            names[p.name] = MemorySymbol("param", f"((u64)result_{index})")

    def lookup(self, name):
        match = re.fullmatch(r"(%?[A-Za-z_$][\w$]*?)(\d+)", name)
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            family = scope.get(match.group(1) + "<>") if match else None
            if family and int(match.group(2)) < family.count:
                register = Register(f"{family.prefix}{match.group(2)}", family.bits)
                scope[name] = register
                self.registers[register] = None
                return register
        return self.module.symbols.get(name)

    def register(self, operand):
        found = self.lookup(operand.strip())
        return found if isinstance(found, Register) else None

    def memory_symbol(self, operand):
        found = self.lookup(operand.strip())
        return found if isinstance(found, MemorySymbol) else None

    def _declare(self, declaration):
        text, scope = declaration.text, self.scopes[-1]
        if text.startswith(".reg"):
            match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
            bits = TYPE_BITS[match.group(1)]
            for name in parser.split_operands(match.group(2)):
                self.unique += 1
                suffix = "" if len(self.scopes) == 1 else f"s{self.unique}_"
                family = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                if family:
                    prefix = f"r_{suffix}{c_name(family.group(1).lstrip('%'))}"
                    scope[family.group(1) + "<>"] = RegisterFamily(prefix, bits, int(family.group(2)))
                else:
                    register = Register(f"r_{suffix}{c_name(name.lstrip('%'))}_", bits)
                    scope[name] = register
                    self.registers[register] = None
            return
        variable = parser.parse_variable(text)
        if variable.space == "local":
            self.local_bytes = align_up(self.local_bytes, variable.align)
            scope[variable.name] = MemorySymbol("local", f"((u64)local + {self.local_bytes})")
            self.local_bytes += variable.size
        elif variable.space == "param":
            self.unique += 1
            name = f"call_{self.unique}_{c_name(variable.name)}"
            self.call_buffers.append((name, variable.size))
            scope[variable.name] = MemorySymbol("param", f"((u64){name})")
        elif variable.space == "shared" and not variable.dynamic:
            if not self.function.is_kernel:
                raise Unsupported("static shared memory declared inside a device function")
            self.shared_end = align_up(self.shared_end, variable.align)
            scope[variable.name] = MemorySymbol("shared", f"{self.shared_end}u")
            self.shared_end += variable.size
        else:
            self.module.declare(variable)

    # -- operands --------------------------------------------------------------------------

    def raw(self, operand, bits):
        """The operand's bits as an unsigned C++ expression of the given width."""
        operand = operand.strip()
        ctype = UINT[bits]
        register = self.register(operand)
        if register:
            return register.name if register.bits == bits else f"(({ctype}){register.name})"
        if operand.startswith("-") and self.register(operand[1:]):
            return f"(({ctype})(-{self.raw(operand[1:], bits)}))"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            value = f"0x{operand[2:]}u"
            if bits == 64:
                return f"bits((double)as_f32({value}))"
            return value if bits == 32 else f"to_f16(as_f32({value}))"
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            value = f"0x{operand[2:]}ull"
            return value if bits == 64 else f"bits((float)as_f64({value}))"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", operand):
            text = operand.rstrip("U")
            number = int(text, 0) if not re.fullmatch(r"-?0\d+", text) else int(text, 8)
            number &= (1 << bits) - 1
            if bits == 128:
                return f"((((u128){number >> 64:#x}ull) << 64) | {number & (2**64 - 1):#x}ull)"
            return f"(({ctype}){number:#x}{'ull' if bits == 64 else 'u'})"
        if re.fullmatch(r"-?\d*\.\d*([eE][-+]?\d+)?", operand):
            return f"bits({operand}f)" if bits == 32 else f"bits((double){operand})"
        if operand == "WARP_SZ":
            return f"(({ctype})32u)"
        if operand.startswith("%"):
            name, _, component = operand[1:].partition(".")
            if name in _SPECIAL_VECTORS and component in _XYZ:
                return f"(({ctype})({_SPECIAL_VECTORS[name] % _XYZ[component]}))"
            if name in _SPECIAL:
                return f"(({ctype}){_SPECIAL[name]})"
            raise Unsupported(f"register {operand}")
        return f"(({ctype}){self._symbol_address(operand)})"

    def _symbol_address(self, operand):
        match = re.fullmatch(r"(?:generic\()?([\w$%]+)\)?\s*(?:\+\s*(-?\d+))?", operand)
        symbol = self.memory_symbol(match.group(1)) if match else None
        if not symbol:
            raise Unsupported(f"operand {operand}")
        return f"({symbol.address} + {match.group(2) or 0})"

    def value(self, operand, kind):
        """The operand as a C++ value of the PTX type: bool, integer, float or double."""
        operand = operand.strip()
        if kind == "pred":
            if operand.startswith("!"):
                return f"(!{self.value(operand[1:], kind)})"
            register = self.register(operand)
            return register.name if register else "true" if operand in ("1", "-1") else "false"
        raw = self.raw(operand, TYPE_BITS[kind])
        wrap = {"f32": "as_f32", "f64": "as_f64", "f16": "from_f16", "bf16": "from_bf16"}.get(kind)
        if wrap:
            return f"{wrap}({raw})"
        return f"(({kind}){raw})" if kind[0] == "s" else raw

    def assign(self, destination, kind, expression):
        """A statement storing `expression`, of the C++ type that value() gives, to a register."""
        destination = destination.strip()
        if destination == "_":
            return f"(void)({expression});"
        register = self.register(destination)
        if not register:
            raise Unsupported(f"destination {destination}")
        if kind == "pred":
            return f"{register.name} = ({expression});"
        if kind in ("f32", "f64"):
            expression = f"bits(({'float' if kind == 'f32' else 'double'})({expression}))"
        elif kind in ("f16", "bf16"):
            expression = f"to_{kind}({expression})"
        elif kind[0] == "s" and kind in TYPE_BITS and register.bits > TYPE_BITS[kind]:
            expression = f"(s{min(register.bits, 64)})({kind})({expression})"
        else:
            expression = f"({UINT[TYPE_BITS[kind]]})({expression})"
        return f"{register.name} = ({UINT[register.bits]})({expression});"

    def assign_raw(self, destination, bits, expression):
        return self.assign(destination, "pred" if bits == 1 else f"b{bits}", expression)

    # -- addresses -------------------------------------------------------------------------

    def address(self, operand):
        """`[base + offset]` -> (C++ expression for the address, state space if known)."""
        match = re.fullmatch(r"\[(.*)\]", operand.strip(), re.S)
        if not match:
            raise Unsupported(f"address {operand}")
        inner, offset = match.group(1).strip(), 0
        parts = re.fullmatch(r"([^\s+-]+)\s*(?:\+\s*)?(-?(?:0x[0-9a-fA-F]+|\d+))", inner)
        if parts and re.search(r"[+-]", inner) and self.lookup(parts.group(1)):
            inner, offset = parts.group(1), int(parts.group(2), 0)
        register = self.register(inner)
        if register:
            if not offset:
                return f"(u64){register.name}", ""
            return f"(u64)({UINT[register.bits]})({register.name} + {offset})", ""
        if re.fullmatch(r"0x[0-9a-fA-F]+|\d+", inner):
            return f"{int(inner, 0)}ull", ""
        symbol = self.memory_symbol(inner)
        if not symbol:
            raise Unsupported(f"address {operand}")
        return f"(u64)({symbol.address} + {offset})", symbol.space

    def pointer(self, operand, space, size, kind):
        """A checked host pointer expression for an access of `size` bytes."""
        address, known = self.address(operand)
        if known == "param" or not space:
            space = known or space
        if space == "shared":
            return f"shared_access(t, {address}, {size}, {self.id}, {kind})"
        if space == "global" or space == "const":
            return f"global_access(t, {address}, {size}, {self.id}, {kind})"
        if space == "local":
            return f"local_access(t, {address}, {size}, {self.id}, local, {{LOCAL_BYTES}})"
        if space == "param":
            return f"((u8*)({address}))"
        return f"generic_access(t, {address}, {size}, {self.id}, {kind})"

    # -- statements ------------------------------------------------------------------------

    def label(self, name):
        for scope in reversed(self.scopes):
            if ("label", name) in scope:
                return scope["label", name]
        raise Unsupported(f"label {name}")

    def _label_scopes(self):
        """Labels by scope number; scopes are numbered in the order they open."""
        labels, stack, opened = {}, [0], 0
        for item in self.function.body:
            if isinstance(item, parser.Scope):
                if item.opening:
                    opened += 1
                    stack.append(opened)
                else:
                    stack.pop()
            elif isinstance(item, parser.Label):
                labels.setdefault(stack[-1], []).append(item.name)
        return labels

    def _instruction(self, i):
        self.instruction = i
        self.id = self.module.add_instruction(i, self.function)
        try:
            emitter = EMITTERS.get(i.opcode[0])
            if not emitter:
                raise Unsupported(f"instruction {i.name}")
            code = emitter(self, i)
            condition = ""
            if i.predicate:
                register = self.register(i.predicate)
                condition = f"if ({'!' if i.negated else ''}{register.name}) "
        except (KeyError, IndexError, ValueError, AttributeError, StopIteration) as error:
            raise Unsupported(
                f"{self.function.name}, {i.location.describe()}: form not understood ({error!r})"
            ) from error
        except (Unsupported, ParseError) as error:
            raise Unsupported(f"{self.function.name}, {i.location.describe()}: {error}") from None
        if self.has_wgmma:
            found = [[self.register(name) for name in names_in(operand)] for operand in i.operands]
            names = tuple(tuple(r.name for r in registers if r) for registers in found)
            self.uses.append(Use(len(self.lines), self.id, i, names))
        self.lines.append(f"  {condition}{{ PTX_COUNT({self.id}); {code} }}")

    def emit(self):
        """Returns the C++ definition of the function."""
        labels = self._label_scopes()
        opened = 0

        def enter(number):
            for name in labels.get(number, ()):
                self.scopes[-1]["label", name] = f"L{number}_{c_name(name)}"

        enter(0)
        for item in self.function.body:
            if isinstance(item, parser.Scope):
                if item.opening:
                    opened += 1
                    self.scopes.append({})
                    enter(opened)
                else:
                    self.scopes.pop()
            elif isinstance(item, parser.Label):
                name = self.label(item.name)
                self.defined_labels.add(name)
                self.lines.append(f" {name}:;")
            elif isinstance(item, parser.Declaration):
                try:
                    self._declare(item)
                except (Unsupported, ParseError) as error:
                    raise Unsupported(f"{self.function.name}, PTX line {item.line}: {error}") from None
            else:
                self._instruction(item)
        self.tracked = instrument(self.lines, self.uses)
        return self._definition()

    def signature(self):
        if self.function.is_kernel:
            return f"static void kernel_{c_name(self.function.name)}(Thread* t)"
        parameters = ["Thread* t"]
        parameters += [f"u8* result_{k}" for k in range(len(self.function.results))]
        parameters += [f"u8* argument_{k}" for k in range(len(self.function.parameters))]
        return f"static void function_{c_name(self.function.name)}({', '.join(parameters)})"

    def _definition(self):
        out = [self.signature() + " {"]
        by_bits = {}
        for register in self.registers:
            by_bits.setdefault(register.bits, []).append(register.name)
        for bits, names in sorted(by_bits.items()):
            out.append(f"  {UINT[bits]} {', '.join(f'{n} = 0' for n in names)};")
        for name, size in self.call_buffers:
            out.append(f"  alignas(16) u8 {name}[{max(size, 1)}];")
        if self.local_bytes:
            out.append(f"  alignas(16) u8 local[{self.local_bytes}];")
        else:
            out.append("  u8* const local = nullptr; (void)local;")
        if self.tracked:
            out.append(f"  WgmmaRegister wgmma_state[{self.tracked}] = {{}};")
        if any("carry" in line for line in self.lines):
            out.append("  u32 carry = 0; (void)carry;")
        body = "\n".join(self.lines).replace("{LOCAL_BYTES}", str(self.local_bytes))
        return "\n".join(out) + "\n" + body + "\n}\n"

    def frame_bytes(self):
        """A generous estimate of the C++ stack frame."""
        registers = 16 * (len(self.registers) + self.tracked)
        return self.local_bytes + registers + sum(s + 16 for _, s in self.call_buffers) + 4096
