"""Arithmetic, logic, comparison, conversion and move instructions.

Float results are rounded to nearest even unless the opcode says otherwise; ``.approx`` and
``.full`` forms use the accurate host function, so they are more precise than hardware.
"""

from __future__ import annotations

from ..parser import TYPE_BITS
from .table import FLOAT_TYPES, HALF_TYPES, UINT, emits, is_signed, unsupported, vector

_C_OPERATOR = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
_ROUNDING = {"rz": "kRoundZero", "rm": "kRoundDown", "rp": "kRoundUp"}


def _rounding(i):
    return next((_ROUNDING[m] for m in i.opcode if m in _ROUNDING), None)


def _finish_float(i, expression, kind):
    """Applies .sat, .relu and .ftz to a float or double expression."""
    if "sat" in i.opcode:
        expression = f"saturate({expression})"
    if "relu" in i.opcode:
        expression = f"relu({expression})"
    if "ftz" in i.opcode and kind == "f32":
        expression = f"flush({expression})"
    return expression


def _float_inputs(f, i, operands, kind):
    values = [f.value(x, kind) for x in operands]
    if "ftz" in i.opcode and kind == "f32":
        values = [f"flush({v})" for v in values]
    return values


def _by_halves(f, i, kind, operands, compute):
    """Applies `compute` (operand expressions -> result expression) to one or two halves."""
    element = kind.removesuffix("x2")
    read, write = f"from_{element}", f"to_{element}"
    if kind == element:
        return f.assign_raw(i.operands[0], 16, f"{write}({compute([f'{read}({f.raw(x, 16)})' for x in operands])})")
    raw = [f.raw(x, 32) for x in operands]
    low = compute([f"{read}((u16){x})" for x in raw])
    high = compute([f"{read}((u16)({x} >> 16))" for x in raw])
    return f.assign_raw(i.operands[0], 32, f"(u32){write}({low}) | ((u32){write}({high}) << 16)")


def _float_expression(i, values, fused):
    operation = i.opcode[0]
    if operation in ("fma", "mad"):
        return f"{fused}({', '.join(values)})"
    if operation in ("min", "max"):
        name = f"float_{operation}" + ("_nan" if "NaN" in i.opcode else "")
        result = f"{name}({values[0]}, {values[1]})"
        return result if len(values) == 2 else f"{name}({result}, {values[2]})"
    return f"({values[0]} {'/' if operation == 'div' else _C_OPERATOR[operation]} {values[1]})"


@emits("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max")
def arithmetic(f, i):
    kind = i.opcode[-1]
    if "cc" in i.opcode:
        return _carry(f, i, kind, carry_in=False)
    if kind in ("f32", "f64"):
        return _float_arithmetic(f, i, kind)
    if kind in HALF_TYPES:
        if "xorsign" in i.opcode:
            raise unsupported(i)

        def compute(values):
            wide = [f"(double){v}" for v in values]
            return _finish_float(i, _float_expression(i, wide, "std::fma"), kind)

        return _by_halves(f, i, kind, i.operands[1:], compute)
    if kind == "f32x2":
        raw = [f.raw(x, 64) for x in i.operands[1:]]
        low = _float_expression(i, [f"as_f32((u32){x})" for x in raw], "std::fma")
        high = _float_expression(i, [f"as_f32((u32)({x} >> 32))" for x in raw], "std::fma")
        low, high = (_finish_float(i, x, "f32") for x in (low, high))
        return f.assign_raw(i.operands[0], 64, f"(u64)bits({low}) | ((u64)bits({high}) << 32)")
    if kind in ("s16x2", "u16x2"):
        return _pairs_of_16(f, i, kind)
    return _integer_arithmetic(f, i, kind)


def _float_arithmetic(f, i, kind):
    values = _float_inputs(f, i, i.operands[1:], kind)
    mode = _rounding(i)
    if mode and kind == "f64":
        raise unsupported(i, "directed rounding of f64")
    if mode:
        operation = i.opcode[0]
        if operation == "sub":
            operation, values = "add", [values[0], f"-{values[1]}"]
        operation = "fma" if operation == "mad" else operation
        expression = f"{operation}_rounded({', '.join(values)}, {mode})"
    else:
        if "xorsign" in i.opcode:
            raise unsupported(i)
        expression = _float_expression(i, values, "std::fma")
    return f.assign(i.operands[0], kind, _finish_float(i, expression, kind))


def _pairs_of_16(f, i, kind):
    element = kind[:3]
    raw = [f.raw(x, 32) for x in i.operands[1:]]
    operation = i.opcode[0]

    def compute(shift):
        x, y = (f"({element})(u16)({r} >> {shift})" for r in raw)
        if operation in ("min", "max"):
            result = f"std::{operation}<{element}>({x}, {y})"
        elif operation == "add":
            result = f"({x} + {y})"
        else:
            raise unsupported(i)
        return f"(u32)(u16)({result})"

    return f.assign_raw(i.operands[0], 32, f"{compute(0)} | ({compute(16)} << 16)")


def _integer_arithmetic(f, i, kind):
    operation, bits = i.opcode[0], TYPE_BITS[kind]
    destination, sources = i.operands[0], i.operands[1:]
    if operation in ("mul", "mad") and "wide" in i.opcode:
        wide = f"{kind[0]}{2 * bits}"
        expression = f"({wide}){f.value(sources[0], kind)} * ({wide}){f.value(sources[1], kind)}"
        if operation == "mad":
            expression = f"(u{2 * bits})({expression}) + {f.raw(sources[2], 2 * bits)}"
        return f.assign_raw(destination, 2 * bits, expression)
    if operation in ("mul", "mad") and "hi" in i.opcode:
        wide = f"{kind[0]}{2 * bits}"
        x, y = (f"({wide}){f.value(s, kind)}" for s in sources[:2])
        expression = f"(u{bits})(({x} * {y}) >> {bits})"
        if operation == "mad":
            expression += f" + {f.raw(sources[2], bits)}"
        return f.assign_raw(destination, bits, expression)
    raw = [f.raw(s, bits) for s in sources]
    values = [f.value(s, kind) for s in sources]
    if operation in ("add", "sub") and "sat" in i.opcode:
        limits = "(s64)std::numeric_limits<s32>::min(), (s64)std::numeric_limits<s32>::max()"
        expression = f"(s64){values[0]} {_C_OPERATOR[operation]} (s64){values[1]}"
        return f.assign_raw(destination, bits, f"std::clamp({expression}, {limits})")
    if operation in ("add", "sub", "mul"):
        return f.assign_raw(destination, bits, f"{raw[0]} {_C_OPERATOR[operation]} {raw[1]}")
    if operation == "mad":
        return f.assign_raw(destination, bits, f"{raw[0]} * {raw[1]} + {raw[2]}")
    if operation in ("div", "rem"):
        sign = "/" if operation == "div" else "%"
        check = f'if (!d) fail(t, kArithmetic, {f.id}, 0, 0, "integer division by zero"); '
        quotient = f"n {sign} d"
        if is_signed(kind):  # the one overflowing case
            quotient = f"d == -1 ? ({kind})({'0 - (u64)n' if sign == '/' else '0'}) : ({kind})({quotient})"
        return f"{kind} n = {values[0]}, d = {values[1]}; {check}" + f.assign_raw(destination, bits, quotient)
    expression = f"std::{operation}<{kind}>({values[0]}, {values[1]})"
    if "relu" in i.opcode:
        expression = f"std::max<{kind}>({expression}, 0)"
    return f.assign_raw(destination, bits, expression)


# -- carry chains ------------------------------------------------------------------------------


@emits("addc", "subc", "madc")
def with_carry(f, i):
    return _carry(f, i, i.opcode[-1], carry_in=True)


def _carry(f, i, kind, carry_in):
    """add.cc, addc, sub.cc, subc, mad.lo/hi.cc, madc: the carry flag is a local variable."""
    bits, operation = TYPE_BITS[kind], i.opcode[0].removesuffix("c")
    wide = f"u{2 * bits}"
    x = [f"({wide}){f.raw(s, bits)}" for s in i.operands[1:]]
    extra = "carry" if carry_in else "0"
    if operation == "mad":
        if is_signed(kind) and "hi" in i.opcode:
            raise unsupported(i, "signed high product with carry")
        product = f"(({x[0]} * {x[1]}) >> {bits if 'hi' in i.opcode else 0})"
        total = f"({wide})(u{bits}){product} + {x[2]} + {extra}"
    elif operation == "add":
        total = f"{x[0]} + {x[1]} + {extra}"
    else:
        total = f"{x[0]} - {x[1]} - {extra}"
    code = f"{wide} sum = {total}; " + f.assign_raw(i.operands[0], bits, "sum")
    if "cc" in i.opcode:
        code += f" carry = (u32)(sum >> {bits}) & 1;"
    return code


# -- unary -------------------------------------------------------------------------------------

_SIGN_BITS = {
    "f16": "0x8000",
    "bf16": "0x8000",
    "f16x2": "0x80008000u",
    "bf16x2": "0x80008000u",
    "f32": "0x80000000u",
    "f64": "0x8000000000000000ull",
}


@emits("neg", "abs")
def negate(f, i):
    kind = i.opcode[-1]
    bits = TYPE_BITS[kind]
    raw = f.raw(i.operands[1], bits)
    if kind in _SIGN_BITS:
        sign = _SIGN_BITS[kind]
        expression = f"{raw} ^ {sign}" if i.opcode[0] == "neg" else f"{raw} & ~{sign}"
        if kind == "f32" and "ftz" in i.opcode:
            return f.assign(i.operands[0], kind, f"flush(as_f32({expression}))")
        return f.assign_raw(i.operands[0], bits, expression)
    value = f.value(i.operands[1], kind)
    return f.assign_raw(
        i.operands[0],
        bits,
        f"0 - {raw}" if i.opcode[0] == "neg" else f"{value} < 0 ? 0 - {raw} : {raw}",
    )


_FUNCTIONS = {
    "ex2": "std::exp2(%s)",
    "lg2": "std::log2(%s)",
    "sqrt": "std::sqrt(%s)",
    "sin": "std::sin(%s)",
    "cos": "std::cos(%s)",
    "tanh": "std::tanh(%s)",
    "rcp": "(1 / %s)",
    "rsqrt": "(1 / std::sqrt(%s))",
}


@emits(*_FUNCTIONS)
def special_function(f, i):
    kind = i.opcode[-1]
    template = _FUNCTIONS[i.opcode[0]]
    if kind in HALF_TYPES:
        return _by_halves(f, i, kind, i.operands[1:2], lambda v: template % v[0])
    mode = _rounding(i)
    (value,) = _float_inputs(f, i, i.operands[1:2], kind)
    if mode and kind == "f32" and i.opcode[0] == "rcp":
        expression = f"div_rounded(1.f, {value}, {mode})"
    elif mode:
        raise unsupported(i, "directed rounding")
    else:
        expression = template % value
    return f.assign(i.operands[0], kind, _finish_float(i, expression, kind))


@emits("copysign")
def copysign(f, i):
    kind = i.opcode[-1]
    sign, magnitude = (f.value(x, kind) for x in i.operands[1:3])
    return f.assign(i.operands[0], kind, f"std::copysign({magnitude}, {sign})")


@emits("testp")
def test_property(f, i):
    value = f.value(i.operands[1], i.opcode[-1])
    test = {
        "finite": "std::isfinite(%s)",
        "infinite": "std::isinf(%s)",
        "number": "!std::isnan(%s)",
        "notanumber": "std::isnan(%s)",
        "normal": "std::isnormal(%s)",
        "subnormal": "(std::fpclassify(%s) == FP_SUBNORMAL)",
    }[i.opcode[1]]
    return f.assign(i.operands[0], "pred", test % value)


# -- logic and bits ----------------------------------------------------------------------------


@emits("and", "or", "xor", "not", "cnot")
def logic(f, i):
    kind, operation = i.opcode[-1], i.opcode[0]
    if kind == "pred":
        x = [f.value(s, kind) for s in i.operands[1:]]
        expression = f"!{x[0]}" if operation == "not" else f"{x[0]} {_C_OPERATOR[operation]} {x[1]}"
        return f.assign(i.operands[0], kind, expression)
    bits = TYPE_BITS[kind]
    x = [f.raw(s, bits) for s in i.operands[1:]]
    if operation == "not":
        expression = f"~{x[0]}"
    elif operation == "cnot":
        expression = f"{x[0]} == 0"
    else:
        expression = f"{x[0]} {_C_OPERATOR[operation]} {x[1]}"
    return f.assign_raw(i.operands[0], bits, expression)


@emits("shl", "shr")
def shift(f, i):
    kind, bits = i.opcode[-1], TYPE_BITS[i.opcode[-1]]
    ctype = kind if is_signed(kind) else UINT[bits]
    value = f.value(i.operands[1], kind if is_signed(kind) else f"b{bits}")
    name = "shift_left" if i.opcode[0] == "shl" else "shift_right"
    return f.assign_raw(i.operands[0], bits, f"{name}<{ctype}>({value}, {f.raw(i.operands[2], 32)})")


@emits("shf")
def funnel_shift(f, i):
    low, high, amount = (f.raw(x, 32) for x in i.operands[1:4])
    amount = f"std::min<u32>({amount}, 32)" if "clamp" in i.opcode else f"({amount} & 31)"
    pair = f"((u64){low} | ((u64){high} << 32))"
    expression = f"({pair} << {amount}) >> 32" if i.opcode[1] == "l" else f"{pair} >> {amount}"
    return f.assign_raw(i.operands[0], 32, expression)


@emits("lop3")
def logic3(f, i):
    if "BOOL" in i.name or "|" in i.operands[0]:
        raise unsupported(i)
    return f.assign_raw(i.operands[0], 32, f"lop3({', '.join(f.raw(x, 32) for x in i.operands[1:5])})")


@emits("prmt")
def permute(f, i):
    operands = ", ".join(f.raw(x, 32) for x in i.operands[1:4])
    modes = ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    mode = next((m for m in i.opcode if m in modes), None)
    if mode:
        return f.assign_raw(i.operands[0], 32, f"permute_bytes_mode({operands}, {modes.index(mode)})")
    return f.assign_raw(i.operands[0], 32, f"permute_bytes({operands})")


@emits("bfi")
def bit_insert(f, i):
    bits = TYPE_BITS[i.opcode[-1]]
    a, b = (f.raw(x, bits) for x in i.operands[1:3])
    position, length = (f.raw(x, 32) for x in i.operands[3:5])
    return f.assign_raw(i.operands[0], bits, f"bit_insert<{UINT[bits]}>({a}, {b}, {position}, {length})")


@emits("bfe")
def bit_extract(f, i):
    kind, bits = i.opcode[-1], TYPE_BITS[i.opcode[-1]]
    position, length = (f.raw(x, 32) for x in i.operands[2:4])
    signed = "true" if is_signed(kind) else "false"
    value = f.raw(i.operands[1], bits)
    return f.assign_raw(i.operands[0], bits, f"bit_extract<{UINT[bits]}>({value}, {position}, {length}, {signed})")


@emits("bmsk")
def bit_mask(f, i):
    position, length = (f.raw(x, 32) for x in i.operands[1:3])
    return f.assign_raw(i.operands[0], 32, f"bit_insert<u32>(0xffffffffu, 0u, {position} & 31, {length} & 31)")


@emits("szext")
def sign_or_zero_extend(f, i):
    value, length = f.raw(i.operands[1], 32), f.raw(i.operands[2], 32)
    signed = "true" if is_signed(i.opcode[-1]) else "false"
    return f.assign_raw(i.operands[0], 32, f"bit_extract<u32>({value}, 0, {length} & 31, {signed})")


@emits("popc", "clz", "brev", "bfind")
def count_bits(f, i):
    kind, bits = i.opcode[-1], TYPE_BITS[i.opcode[-1]]
    x = f.raw(i.operands[1], bits)
    if i.opcode[0] == "brev":
        return f.assign_raw(i.operands[0], bits, f"reverse_bits<{UINT[bits]}>({x})")
    if i.opcode[0] == "popc":
        expression = f"__builtin_popcountll({x})"
    elif i.opcode[0] == "clz":
        expression = f"{x} ? __builtin_clzll((u64){x}) - {64 - bits} : {bits}"
    else:
        signed = "true" if is_signed(kind) else "false"
        amount = "true" if "shiftamt" in i.opcode else "false"
        expression = f"find_bit({x}, {bits}, {signed}, {amount})"
    return f.assign_raw(i.operands[0], 32, expression)


@emits("dp4a")
def dot_product(f, i):
    a, b, c = (f.raw(x, 32) for x in i.operands[1:4])
    a_signed, b_signed = ("true" if is_signed(k) else "false" for k in i.opcode[-2:])
    return f.assign_raw(i.operands[0], 32, f"(u32)dot4({a}, {a_signed}, {b}, {b_signed}) + {c}")


@emits("sad")
def absolute_difference(f, i):
    kind, bits = i.opcode[-1], TYPE_BITS[i.opcode[-1]]
    a, b = (f.value(x, kind) for x in i.operands[1:3])
    raw = [f.raw(x, bits) for x in i.operands[1:4]]
    return f.assign_raw(i.operands[0], bits, f"{raw[2]} + ({a} < {b} ? {raw[1]} - {raw[0]} : {raw[0]} - {raw[1]})")


# -- moves and selection -----------------------------------------------------------------------


@emits("mov")
def move(f, i):
    kind, bits = i.opcode[-1], TYPE_BITS[i.opcode[-1]]
    destination, source = i.operands
    if kind == "pred":
        return f.assign(destination, kind, f.value(source, kind))
    if destination.startswith("{"):
        parts = vector(destination)
        width = bits // len(parts)
        code = f"{UINT[bits]} v = {f.raw(source, bits)}; "
        return code + " ".join(f.assign_raw(p, width, f"v >> {n * width}") for n, p in enumerate(parts) if p != "_")
    if source.startswith("{"):
        parts = vector(source)
        width = bits // len(parts)
        pieces = [f"(({UINT[bits]}){f.raw(p, width)} << {n * width})" for n, p in enumerate(parts)]
        return f.assign_raw(destination, bits, " | ".join(pieces))
    return f.assign_raw(destination, bits, f.raw(source, bits))


@emits("selp")
def select(f, i):
    bits = TYPE_BITS[i.opcode[-1]]
    yes, no = (f.raw(x, bits) for x in i.operands[1:3])
    return f.assign_raw(i.operands[0], bits, f"{f.value(i.operands[3], 'pred')} ? {yes} : {no}")


@emits("slct")
def select_by_sign(f, i):
    kind, by = i.opcode[-2:]
    bits = TYPE_BITS[kind]
    yes, no = (f.raw(x, bits) for x in i.operands[1:3])
    return f.assign_raw(i.operands[0], bits, f"{f.value(i.operands[3], by)} >= 0 ? {yes} : {no}")


_COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
_UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_C_LOGIC = {"and": "&&", "or": "||", "xor": "!="}


def _comparison(i, compare, x, y, is_float):
    if compare == "ne" and is_float:
        return f"({x} < {y} || {x} > {y})"
    if compare in _COMPARE:
        return f"({x} {_COMPARE[compare]} {y})"
    if compare == "num":
        return f"!(std::isnan({x}) || std::isnan({y}))"
    if compare == "nan":
        return f"(std::isnan({x}) || std::isnan({y}))"
    if compare == "equ":
        return f"!({x} < {y} || {x} > {y})"
    if compare == "neu":
        return f"!({x} == {y})"
    if compare in _UNORDERED:
        return f"!({x} {_UNORDERED[compare]} {y})"
    raise unsupported(i)


@emits("setp", "set")
def compare(f, i):
    kind, comparison = i.opcode[-1], i.opcode[1]
    combine = next((m for m in i.opcode[2:] if m in _C_LOGIC), None)

    def combined(expression):
        if not combine:
            return expression
        return f"({expression} {_C_LOGIC[combine]} {f.value(i.operands[3], 'pred')})"

    if kind in ("f16x2", "bf16x2"):
        return _compare_pairs(f, i, kind, comparison, combined)
    x, y = (f.value(v, kind) for v in i.operands[1:3])
    if "ftz" in i.opcode and kind == "f32":
        x, y = f"flush({x})", f"flush({y})"
    result = _comparison(i, comparison, x, y, kind in FLOAT_TYPES)
    if i.opcode[0] == "set":
        to = i.opcode[-2]
        true = {"f32": "0x3f800000u", "f16": "0x3c00", "bf16": "0x3f80"}.get(to, f"({UINT[TYPE_BITS[to]]})~0ull")
        return f.assign_raw(i.operands[0], TYPE_BITS[to], f"{combined(result)} ? {true} : 0")
    names = i.operands[0].split("|")
    code = f"bool yes = {result}; "
    if len(names) == 2:
        code += f"bool no = {combined('!yes')}; "
    code += f.assign(names[0], "pred", combined("yes"))
    return code + (" " + f.assign(names[1], "pred", "no") if len(names) == 2 else "")


def _compare_pairs(f, i, kind, comparison, combined):
    read = f"from_{kind.removesuffix('x2')}"
    raw = [f.raw(v, 32) for v in i.operands[1:3]]
    low = _comparison(i, comparison, *[f"{read}((u16){x})" for x in raw], True)
    high = _comparison(i, comparison, *[f"{read}((u16)({x} >> 16))" for x in raw], True)
    if i.opcode[0] == "setp":
        names = i.operands[0].split("|")
        code = f"bool low = {combined(low)}, high = {combined(high)}; " + f.assign(names[0], "pred", "low")
        return code + (" " + f.assign(names[1], "pred", "high") if len(names) == 2 else "")
    to = i.opcode[-2]
    one = {"f16x2": "0x3c00u", "bf16x2": "0x3f80u"}.get(to, "0xffffu")
    return f.assign_raw(i.operands[0], 32, f"({low} ? {one} : 0) | ({high} ? {one} << 16 : 0)")


# -- conversions -------------------------------------------------------------------------------

_INTEGER_ROUNDING = ("rni", "rzi", "rmi", "rpi")


@emits("cvt")
def convert(f, i):
    if i.opcode[-1] not in TYPE_BITS or i.opcode[-2] not in TYPE_BITS:
        raise unsupported(i)
    to, source = i.opcode[-2:]
    if len(i.operands) == 3:
        return _convert_pack(f, i, to, source)
    if source in ("e4m3x2", "e5m2x2") or to in ("e4m3x2", "e5m2x2"):
        return _convert_fp8(f, i, to, source)
    if to == "tf32":
        return _convert_tf32(f, i)
    if source in FLOAT_TYPES and to in FLOAT_TYPES:
        return _convert_float(f, i, to, source)
    if source in FLOAT_TYPES:
        mode = next((_INTEGER_ROUNDING.index(m) for m in i.opcode if m in _INTEGER_ROUNDING), 1)
        ctype = to.replace("b", "u")
        (value,) = _float_inputs(f, i, i.operands[1:2], source)
        nan = f", (({ctype})1 << 63)" if TYPE_BITS[to] == 64 else ""
        return f.assign(i.operands[0], to, f"to_integer<{ctype}>({value}, {mode}{nan})")
    value = f.value(i.operands[1], source)
    if to in FLOAT_TYPES:
        mode = _rounding(i)
        if mode and (to != "f32" or TYPE_BITS[source] > 32):
            raise unsupported(i, "directed rounding")
        if mode:
            return f.assign(i.operands[0], to, f"to_f32_rounded((double){value}, {mode})")
        return f.assign(i.operands[0], to, f"({'float' if to == 'f32' else 'double'}){value}")
    ctype = to.replace("b", "u")
    if "sat" in i.opcode:
        low, high = (f"(s128)std::numeric_limits<{ctype}>::{m}()" for m in ("min", "max"))
        return f.assign(i.operands[0], to, f"({ctype})std::min(std::max((s128){value}, {low}), {high})")
    return f.assign(i.operands[0], to, f"({ctype}){value}")


def _convert_float(f, i, to, source):
    (value,) = _float_inputs(f, i, i.operands[1:2], source)
    integral = next((_INTEGER_ROUNDING.index(m) for m in i.opcode if m in _INTEGER_ROUNDING), None)
    if integral is not None:
        value = f"round_to_integer({value}, {integral})"
    mode = _rounding(i)
    if mode and TYPE_BITS[to] < TYPE_BITS[source]:
        if to in ("f16", "bf16") and mode == "kRoundZero" and source == "f32":
            if "relu" in i.opcode:
                value = f"relu({value})"
            return f.assign_raw(i.operands[0], 16, f"to_{to}_truncated({value})")
        if to == "f32":
            return f.assign(i.operands[0], to, _finish_float(i, f"to_f32_rounded({value}, {mode})", to))
        raise unsupported(i, "directed rounding")
    if to == "f32":
        value = f"(float)({value})"
    return f.assign(i.operands[0], to, _finish_float(i, value, to))


def _convert_pack(f, i, to, source):
    """cvt d, a, b: a goes to the upper half of d, b to the lower."""
    if source != "f32" or to not in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2"):
        raise unsupported(i)
    high, low = (f.value(x, "f32") for x in i.operands[1:3])
    if "relu" in i.opcode:
        high, low = f"relu({high})", f"relu({low})"
    element = to.removesuffix("x2")
    if to[0] == "e":
        return f.assign_raw(i.operands[0], 16, f"(u16)to_{element}({low}) | ((u16)to_{element}({high}) << 8)")
    if "satfinite" in i.opcode:
        raise unsupported(i)
    name = f"to_{element}_truncated" if "rz" in i.opcode else f"to_{element}"
    return f.assign_raw(i.operands[0], 32, f"(u32){name}({low}) | ((u32){name}({high}) << 16)")


def _convert_fp8(f, i, to, source):
    if to in ("f16x2", "bf16x2"):
        element, read = to.removesuffix("x2"), f"from_{source.removesuffix('x2')}"
        raw = f.raw(i.operands[1], 16)
        low, high = f"{read}((u8){raw})", f"{read}((u8)({raw} >> 8))"
        if "relu" in i.opcode:
            low, high = f"relu({low})", f"relu({high})"
        return f.assign_raw(i.operands[0], 32, f"(u32)to_{element}({low}) | ((u32)to_{element}({high}) << 16)")
    if source not in ("f16x2", "bf16x2"):
        raise unsupported(i)
    element, read = to.removesuffix("x2"), f"from_{source.removesuffix('x2')}"
    raw = f.raw(i.operands[1], 32)
    low, high = f"{read}((u16){raw})", f"{read}((u16)({raw} >> 16))"
    if "relu" in i.opcode:
        low, high = f"relu({low})", f"relu({high})"
    return f.assign_raw(i.operands[0], 16, f"(u16)to_{element}({low}) | ((u16)to_{element}({high}) << 8)")


def _convert_tf32(f, i):
    raw = f.raw(i.operands[1], 32)
    if "relu" in i.opcode:
        raw = f"bits(relu(as_f32({raw})))"
    if "rna" in i.opcode:
        return f.assign_raw(i.operands[0], 32, f"to_tf32({raw})")
    if "rz" in i.opcode:
        return f.assign_raw(i.operands[0], 32, f"{raw} & 0xffffe000u")
    if "rn" in i.opcode:
        return f.assign_raw(i.operands[0], 32, f"({raw} + 0xfffu + ({raw} >> 13 & 1)) & 0xffffe000u")
    raise unsupported(i)
