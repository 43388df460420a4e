"""Loads, stores, address conversions, atomics, asynchronous copies and mbarriers.

Cache and eviction hints are ignored.  A cluster is one CTA, so ``shared::cluster`` is
``shared::cta``.  Tensor-map copies (``cp.async.bulk.tensor``) are unsupported.
"""

from __future__ import annotations

from ..parser import TYPE_BITS
from .table import (
    UINT,
    data_type,
    emits,
    is_signed,
    state_space,
    unsupported,
    vector,
    vector_length,
)

_STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}


@emits("ld", "ldu", "st")
def load_store(f, i):
    kind = data_type(i)
    bits, storing = TYPE_BITS[kind], i.opcode[0] == "st"
    address, data = i.operands[:2] if storing else (i.operands[1], i.operands[0])
    strong = "Strong" if _STRONG & set(i.opcode) else ""
    access = f"k{strong}{'Write' if storing else 'Read'}"
    size, ctype = bits // 8, UINT[bits]
    total = size * vector_length(i)
    pointer = f.pointer(address, state_space(i), total, access)
    if storing and pointer.startswith(("shared_", "generic_")):
        code = f"alignas(16) u8 v[{total}];"
        for n, register in enumerate(vector(data)):
            code += f" store<{ctype}>(v + {n * size}, {f.raw(register, bits)});"
        function = pointer.split("_")[0] + "_store"
        where, _ = f.address(address)
        return code + f" {function}(t, {where}, v, {total}, {f.id}, {access});"
    code = f"u8* p = {pointer};"
    for n, register in enumerate(vector(data)):
        if storing:
            code += f" store<{ctype}>(p + {n * size}, {f.raw(register, bits)});"
        elif register != "_":
            code += " " + f.assign(register, kind if is_signed(kind) else f"b{bits}", f"load<{ctype}>(p + {n * size})")
    return code


@emits("cvta")
def convert_address(f, i):
    bits = TYPE_BITS[i.opcode[-1]]
    source = f.raw(i.operands[1], bits)
    if "shared" in i.name:
        source = f"(u64){source} - (u64)t->shared" if "to" in i.opcode else f"(u64)t->shared + (u32){source}"
    return f.assign_raw(i.operands[0], bits, source)


@emits("isspacep")
def is_space(f, i):
    address = f.raw(i.operands[1], 64)
    space = i.opcode[1].split("::")[0]
    tests = {
        "shared": f"is_shared_address(t, {address})",
        "global": f"!is_shared_address(t, {address})",
    }
    return f.assign(i.operands[0], "pred", tests.get(space, "false"))


@emits("mapa")
def map_shared_address(f, i):
    bits = TYPE_BITS[i.opcode[-1]]
    return f.assign_raw(i.operands[0], bits, f.raw(i.operands[1], bits))


@emits("createpolicy")
def create_policy(f, i):
    return f.assign_raw(i.operands[0], 64, "0")


@emits("fence")
def fence(f, i):
    """Of the memory model, only reads of shared memory through the async proxy are checked."""
    proxies = i.opcode[1] == "proxy" and i.opcode[2].startswith("async") and "global" not in i.opcode
    return "proxy_fence(t);" if proxies else ""


@emits("setmaxnreg")
def set_max_registers(f, i):
    more = "true" if i.opcode[1] == "inc" else "false"
    return f"set_max_registers(t, {more}, {int(i.operands[0], 0)}, {f.id});"


@emits(
    "membar", "nanosleep", "prefetch", "prefetchu", "pmevent", "griddepcontrol",
    "applypriority", "discard",
)  # fmt: skip
def no_operation(f, i):
    return ""


# -- atomics -----------------------------------------------------------------------------------

_ATOMIC_OPERATIONS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
_INTEGER_UPDATE = {
    "add": "x + y",
    "exch": "y",
    "and": "x & y",
    "or": "x | y",
    "xor": "x ^ y",
    "inc": "(x >= y ? 0 : x + 1)",
    "dec": "(x == 0 || x > y ? y : x - 1)",
    "cas": "(x == y ? z : x)",
}


def _float_update(i, operation, x, y):
    if operation == "add":
        return f"{x} + {y}"
    if operation in ("min", "max"):
        return f"float_{operation}({x}, {y})"
    raise unsupported(i)


def _update(i, operation, kind):
    """C++ for the new value from the old `x` and the operand `y` (and `z` for cas)."""
    if operation in ("exch", "cas"):
        return _INTEGER_UPDATE[operation]
    if kind in ("f32", "f64"):
        return f"bits({_float_update(i, operation, f'as_{kind}(x)', f'as_{kind}(y)')})"
    if kind in ("f16", "bf16"):
        return f"to_{kind}({_float_update(i, operation, f'from_{kind}(x)', f'from_{kind}(y)')})"
    if kind in ("f16x2", "bf16x2"):
        element = kind.removesuffix("x2")
        low = _float_update(i, operation, f"from_{element}((u16)x)", f"from_{element}((u16)y)")
        high = _float_update(i, operation, f"from_{element}((u16)(x >> 16))", f"from_{element}((u16)(y >> 16))")
        return f"(u32)to_{element}({low}) | ((u32)to_{element}({high}) << 16)"
    if operation in ("min", "max"):
        return f"std::{operation}<{kind.replace('b', 'u')}>(x, y)"
    return _INTEGER_UPDATE[operation]


@emits("atom", "red")
def atomic(f, i):
    if "async" in i.opcode:
        raise unsupported(i)
    operation = next(m for m in i.opcode if m in _ATOMIC_OPERATIONS)
    kind = data_type(i)
    bits = TYPE_BITS[kind]
    if bits > 64:
        raise unsupported(i)
    ctype, size = UINT[bits], bits // 8
    returning = i.opcode[0] == "atom"
    address, sources = (i.operands[1], i.operands[2:]) if returning else (i.operands[0], i.operands[1:])
    integer = kind[0] in "bus" and kind not in ("bf16", "bf16x2")
    orders = (returning and integer) or {"acquire", "release", "acq_rel"} & set(i.opcode)
    access = "kSyncAtomic" if orders else "kAtomic"
    code = f"u8* p = {f.pointer(address, state_space(i), size * vector_length(i), access)};"
    for n, source in enumerate(vector(sources[0])):
        captured = f"{ctype} y = {f.raw(source, bits)};"
        if operation == "cas":
            captured += f" {ctype} z = {f.raw(sources[1], bits)};"
        update = f"[&]({ctype} x) -> {ctype} {{ {captured} return {_update(i, operation, kind)}; }}"
        code += f" {ctype} old_{n} = atomic_update<{ctype}>(p + {n * size}, {update});"
    if returning:
        for n, destination in enumerate(vector(i.operands[0])):
            code += " " + f.assign_raw(destination, bits, f"old_{n}")
    return code


# -- asynchronous copies -----------------------------------------------------------------------


@emits("cp")
def copy(f, i):
    if i.opcode[1] != "async":
        raise unsupported(i)
    if "bulk" in i.opcode:
        return _bulk_copy(f, i)
    if "commit_group" in i.opcode:
        return "async_commit(t);"
    if "wait_group" in i.opcode:
        return f"async_wait(t, {int(i.operands[0], 0)});"
    if "wait_all" in i.opcode:
        return "async_wait(t, -1);"
    if "mbarrier" in i.opcode:
        barrier, _ = f.address(i.operands[0])
        no_increment = "true" if "noinc" in i.opcode else "false"
        return f"mbarrier_arrive_after_copies(t, {barrier}, {no_increment}, {f.id});"
    size = int(i.operands[2], 0)
    valid = str(size)
    if len(i.operands) > 3:
        extra = i.operands[3]
        register = f.register(extra)
        if register and register.bits == 1:  # ignore-src
            valid = f"({register.name} ? 0 : {size})"
        elif register and register.bits == 32:
            valid = f"(s64){register.name}"
        elif not register:
            valid = str(int(extra, 0))
        # a 64-bit register is a cache policy
    shared, _ = f.address(i.operands[0])
    source, _ = f.address(i.operands[1])
    return f"async_copy(t, {shared}, {source}, {size}, {valid}, {f.id});"


def _bulk_copy(f, i):
    if "commit_group" in i.opcode or "wait_group" in i.opcode or "prefetch" in i.opcode:
        return ""
    if "tensor" in i.opcode or "reduce" in i.name:
        raise unsupported(i, "tensor-map and reducing bulk copies")
    spaces = [m.split("::")[0] for m in i.opcode if m.split("::")[0] in ("shared", "global")]
    target, source = (f.address(x)[0] for x in i.operands[:2])
    size = f.raw(i.operands[2], 32)
    if spaces == ["shared", "global"]:
        barrier, _ = f.address(i.operands[3])
        return f"bulk_copy_in(t, {target}, {source}, {size}, {barrier}, {f.id});"
    if spaces == ["global", "shared"]:
        return f"bulk_copy_out(t, {target}, {source}, {size}, {f.id});"
    raise unsupported(i)


@emits("mbarrier")
def mbarrier(f, i):
    action = i.opcode[1]
    has_state = action in ("test_wait", "try_wait") or (action == "arrive" and not i.operands[0].startswith("["))
    destination, rest = (i.operands[0], i.operands[1:]) if has_state else (None, i.operands)
    address, _ = f.address(rest[0])
    if action == "init":
        return f"mbarrier_init(t, {address}, {f.raw(rest[1], 32)}, {f.id});"
    if action == "inval":
        return ""
    if action == "expect_tx":
        return f"mbarrier_expect(t, {address}, {f.raw(rest[1], 32)}, {f.id});"
    if action == "complete_tx":
        return f"mbarrier_expect(t, {address}, -(s64){f.raw(rest[1], 32)}, {f.id});"
    if action == "arrive":
        code, count = "", "1"
        if "expect_tx" in i.opcode:
            code = f"mbarrier_expect(t, {address}, {f.raw(rest[1], 32)}, {f.id}); "
        elif len(rest) > 1:
            count = f.raw(rest[1], 32)
        call = f"mbarrier_arrive(t, {address}, {count}, {f.id})"
        return code + (f.assign_raw(destination, 64, call) if destination and destination != "_" else call + ";")
    if action in ("test_wait", "try_wait"):
        by_parity = "parity" in i.opcode
        wanted = f.raw(rest[1], 32 if by_parity else 64)
        wait = "true" if action == "try_wait" else "false"
        call = f"mbarrier_test(t, {address}, {wanted}, {wait}, {f.id})"
        return f.assign(destination, "pred", call)
    raise unsupported(i)
