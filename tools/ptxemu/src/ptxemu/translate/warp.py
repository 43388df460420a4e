"""Control flow, barriers and warp-level communication."""

from __future__ import annotations

from ..errors import Unsupported
from ..parser import TYPE_BITS
from .function import c_name
from .table import emits, unsupported


@emits("ret", "exit")
def leave(f, i):
    if i.opcode[0] == "exit" and not f.function.is_kernel:
        raise unsupported(i, "exit inside a device function")
    return "return;"


@emits("bra")
def branch(f, i):
    label = f.label(i.operands[-1])
    back = f"PTX_BACK_EDGE({f.id}); " if label in f.defined_labels else ""
    return f"{back}goto {label};"


@emits("trap", "brkpt")
def trap(f, i):
    return f'fail(t, kTrap, {f.id}, 0, 0, "{i.opcode[0]} instruction");'


@emits("call")
def call(f, i):
    operands = list(i.operands)
    results = []
    if operands[0].startswith("("):
        results = [x.strip() for x in operands.pop(0)[1:-1].split(",")]
    name = operands.pop(0)
    arguments = []
    if operands and operands[0].startswith("("):
        arguments = [x.strip() for x in operands.pop(0)[1:-1].split(",") if x.strip()]
    buffers = []
    for x in results + arguments:
        symbol = f.memory_symbol(x)
        if not symbol:
            raise Unsupported(f"call argument {x}")
        buffers.append(symbol.address)
    if name == "vprintf":
        values = ", ".join(f"load<u64>((u8*){b})" for b in buffers[1:])
        return f"store<u32>((u8*){buffers[0]}, device_printf(t, {values}));"
    if name == "__assertfail":
        kinds = ("u64", "u64", "u32", "u64")
        values = ", ".join(f"load<{k}>((u8*){b})" for k, b in zip(kinds, buffers, strict=False))
        return f"device_assert(t, {values}, {f.id});"
    if name not in f.module.device_functions:
        raise Unsupported(f"call of {name}, which is not defined in this module (or is indirect)")
    f.calls.add(name)
    pointers = "".join(f", (u8*){b}" for b in buffers)
    return f"function_{c_name(name)}(t{pointers});"


@emits("bar", "barrier")
def barrier(f, i):
    if "warp" in i.opcode:
        return f"warp_sync(t, {f.raw(i.operands[0], 32)}, {f.id});"
    if i.opcode[1].startswith("cluster"):
        # A cluster is one CTA: the wait is a block-wide barrier of its own.
        return f"barrier_sync(t, 16, 0, false, {f.id});" if "wait" in i.opcode else ""
    identifier = f.raw(i.operands[0], 32)
    aligned = "true" if i.opcode[0] == "bar" or "aligned" in i.opcode else "false"
    if "red" in i.opcode:
        operation = next(m for m in i.opcode if m in ("popc", "and", "or"))
        operands = i.operands[1:]
        identifier = f.raw(operands[0], 32)
        count = f.raw(operands[1], 32) if len(operands) == 3 else "0"
        vote = {"popc": "kBallot", "and": "kAll", "or": "kAny"}[operation]
        predicate = f.value(operands[-1], "pred")
        call = f"barrier_reduce(t, {identifier}, {count}, {vote}, {predicate}, {aligned}, {f.id})"
        return f.assign(i.operands[0], "b32" if operation == "popc" else "pred", call)
    count = f.raw(i.operands[1], 32) if len(i.operands) > 1 else "0"
    if "arrive" in i.opcode:
        return f"barrier_arrive(t, {identifier}, {count}, {f.id});"
    return f"barrier_sync(t, {identifier}, {count}, {aligned}, {f.id});"


def _two_results(f, i, first_bits):
    """`d|p`: statements assigning the variables `result` and `flag`."""
    names = i.operands[0].split("|")
    code = f.assign_raw(names[0], first_bits, "result")
    return code + (" " + f.assign(names[1], "pred", "flag") if len(names) > 1 else "")


@emits("shfl")
def shuffle(f, i):
    if "sync" not in i.opcode:
        raise unsupported(i, "without .sync")
    mode = next(m for m in ("up", "down", "bfly", "idx") if m in i.opcode)
    value, b, c, mask = (f.raw(x, 32) for x in i.operands[1:5])
    call = f"shuffle(t, k{mode.capitalize()}, {value}, {b}, {c}, {mask}, &flag, {f.id})"
    return f"bool flag; u32 result = {call}; " + _two_results(f, i, 32)


@emits("vote")
def vote(f, i):
    mode = next(m for m in ("all", "any", "uni", "ballot") if m in i.opcode)
    predicate, mask = f.value(i.operands[1], "pred"), f.raw(i.operands[2], 32)
    call = f"vote(t, k{mode.capitalize()}, {predicate}, {mask}, {f.id})"
    return f.assign(i.operands[0], "b32" if mode == "ballot" else "pred", call)


@emits("match")
def match(f, i):
    value, mask = f.raw(i.operands[1], TYPE_BITS[i.opcode[-1]]), f.raw(i.operands[2], 32)
    if "any" in i.opcode:
        return f.assign_raw(i.operands[0], 32, f"match_any(t, {value}, {mask}, {f.id})")
    return f"bool flag; u32 result = match_all(t, {value}, {mask}, &flag, {f.id}); " + _two_results(f, i, 32)


@emits("redux")
def warp_reduce(f, i):
    operation, kind = i.opcode[2], i.opcode[-1]
    names = {"add": "kAdd", "and": "kAnd", "or": "kOr", "xor": "kXor"}
    if operation in ("min", "max"):
        suffix = {"s32": "Signed", "u32": "Unsigned", "f32": "Float"}[kind]
        name = f"k{operation.capitalize()}{suffix}"
    else:
        name = names[operation]
    if "abs" in i.opcode or "NaN" in i.opcode:
        raise unsupported(i)
    value, mask = (f.raw(x, 32) for x in i.operands[1:3])
    return f.assign_raw(i.operands[0], 32, f"reduce(t, {name}, {value}, {mask}, {f.id})")


@emits("activemask")
def active_mask(f, i):
    return f.assign_raw(i.operands[0], 32, "active_mask(t)")


@emits("elect")
def elect(f, i):
    """The lowest lane of the mask is elected."""
    mask = f.raw(i.operands[1], 32)
    names = i.operands[0].split("|")
    code = f"u32 leader = __builtin_ctz({mask}); "
    return code + f.assign_raw(names[0], 32, "leader") + " " + f.assign(names[1], "pred", "leader == t->lane")
