"""PTX text -> module variables, functions and their statements.

The parser knows the block structure of PTX (directives, functions, nested scopes, labels,
statements) and leaves the meaning of instructions to :mod:`ptxemu.translate`.  Every statement
keeps its PTX line and, where ``.loc`` directives are present, the source line it came from.

Debug sections (``.section``) are skipped.  Not parsed: ``.alias``, ``.branchtargets`` and
``.calltargets`` (indirect branches and calls are unsupported).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from .errors import ParseError

# Width in bits of every fundamental and packed type.
TYPE_BITS = {
    "pred": 1,
    **dict.fromkeys(("b8", "s8", "u8"), 8),
    **dict.fromkeys(("b16", "s16", "u16", "f16", "bf16", "e4m3x2", "e5m2x2"), 16),
    **dict.fromkeys(("b32", "s32", "u32", "f32", "f16x2", "bf16x2", "tf32", "s16x2", "u16x2"), 32),
    **dict.fromkeys(("b64", "s64", "u64", "f64", "f32x2"), 64),
    "b128": 128,
}


@dataclass(frozen=True)
class Location:
    """Where an instruction comes from."""

    ptx_line: int
    text: str = ""
    source: str = ""  # "file:line" of the innermost inlined function
    inlined_at: str = ""  # "file:line" of the call that was inlined, if any

    def describe(self):
        out = f"PTX line {self.ptx_line}"
        if self.text:
            out += f" `{self.text}`"
        if self.source:
            out += f", {self.source}"
        if self.inlined_at:
            out += f" (inlined at {self.inlined_at})"
        return out


@dataclass
class Instruction:
    opcode: list[str]  # ["ld", "global", "v4", "b32"]
    operands: list[str]
    predicate: str  # register name or ""
    negated: bool
    location: Location

    @property
    def name(self):
        return ".".join(self.opcode)


@dataclass
class Label:
    name: str


@dataclass
class Scope:
    """``opening`` is True for ``{`` and False for ``}``."""

    opening: bool


@dataclass
class Declaration:
    """.reg, .local, .shared or .param inside a function body."""

    text: str
    line: int


@dataclass
class Parameter:
    name: str
    size: int
    align: int
    kind: str  # the PTX type, "b8" for byte arrays
    register: bool = False  # an old-style .reg parameter of a .func


@dataclass
class Function:
    name: str
    is_kernel: bool
    parameters: list[Parameter]
    results: list[Parameter]
    body: list
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    line: int = 0


@dataclass
class Variable:
    """A module- or function-level variable."""

    space: str  # shared, global, const, local, param
    name: str
    kind: str
    align: int
    size: int
    dynamic: bool  # extern shared array sized at launch
    initial: list[str] | None


@dataclass
class Module:
    version: str
    target: str
    variables: list[Variable]
    functions: list[Function]


def split_operands(text, separator=","):
    """Splits at top-level separators, respecting (), [] and {}."""
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        if ch in "[{(":
            depth += 1
        elif ch in "]})":
            depth -= 1
        elif ch == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _blank_comments(text):
    """Replaces comments by spaces, keeping line numbers."""

    def blank(match):
        found = match.group(0)
        return found if found[0] == '"' else re.sub(r"[^\n]", " ", found)

    return re.sub(r'"[^"\n]*"|//[^\n]*|/\*.*?\*/', blank, text, flags=re.S)


# Directives that end at the end of their line instead of at a semicolon.
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|loc|file)\b")
_LABEL = re.compile(r"[A-Za-z_$%][\w$]*\s*:(?!:)")


def _chunks(text):
    """Yields (kind, text, line); kind: 'directive', 'open', 'close', 'label', 'head' or 'stmt'."""
    position, line, size = 0, 1, len(text)
    while position < size:
        ch = text[position]
        if ch == "\n":
            line += 1
            position += 1
        elif ch.isspace() or ch == ";":
            position += 1
        elif ch in "{}":
            yield ("open" if ch == "{" else "close"), ch, line
            position += 1
        elif text.startswith(".section", position):
            end = text.find("}", position)
            end = size if end < 0 else end + 1
            line += text.count("\n", position, end)
            position = end
        elif _LINE_DIRECTIVE.match(text, position):
            end = text.find("\n", position)
            end = size if end < 0 else end
            yield "directive", text[position:end].strip(), line
            position = end
        else:
            label = _LABEL.match(text, position)
            if label:
                yield "label", label.group(0)[:-1].strip(), line
                position = label.end()
                continue
            end, depth = position, 0
            kind = "stmt"
            while end < size:
                c = text[end]
                if c == ";" and depth == 0:
                    break
                if c == "{" and depth == 0 and re.search(r"\.(entry|func)\b", text[position:end]):
                    kind = "head"
                    break
                depth += (c in "([{") - (c in ")]}")
                end += 1
            yield kind, text[position:end].strip(), line
            line += text.count("\n", position, end)
            position = end


_INSTRUCTION = re.compile(r"(?:@(!?)\s*(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_PARAMETER = re.compile(
    r"\.(param|reg)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s*(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([%\w$]+)\s*(?:\[(\d+)\])?$",
    re.S,
)
_VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local|param)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?((?:\.align\s+\d+\s+)?)(?:\.ptr\s+)?\.(\w+)\s+([%\w$]+)\s*"
    r"((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
    re.S,
)


def parse_parameter(text):
    match = _PARAMETER.match(text.strip())
    if not match:
        raise ParseError(f"cannot parse parameter `{text.strip()}`")
    space, align, kind, name, count = match.groups()
    size = max(TYPE_BITS[kind] // 8, 1)
    return Parameter(name, size * int(count or 1), int(align or size), kind, space == "reg")


def parse_variable(text):
    """Parses a variable declaration; several names may share one declaration."""
    match = _VARIABLE.match(text.strip())
    if not match:
        raise ParseError(f"cannot parse declaration `{text.strip()[:120]}`")
    space, align, kind, name, dimensions, initial = match.groups()
    element = TYPE_BITS[kind] // 8
    count, dynamic = 1, False
    for n in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        if n:
            count *= int(n)
        else:
            dynamic = True
    values = None
    if initial is not None:
        initial = initial.strip()
        values = split_operands(initial[1:-1]) if initial.startswith("{") else [initial]
        values = [v for item in values for v in (split_operands(item[1:-1]) if item[0] == "{" else [item])]
    if dynamic and values:
        count, dynamic = len(values), False
    align = int(re.search(r"\d+", align).group()) if align else element
    dynamic = dynamic or (space == "shared" and text.lstrip().startswith(".extern"))
    return Variable(space, name, kind, align, 0 if dynamic else count * element, dynamic, values)


def _parse_head(text, line):
    """`.visible .func (result) name (parameters) directives` -> Function without a body."""
    is_kernel = ".entry" in text
    match = re.search(r"\.(?:entry|func)\s*(?:\(([^)]*)\))?\s*([\w$]+)\s*(?:\(([^)]*)\))?(.*)$", text, re.S)
    if not match:
        raise ParseError(f"line {line}: cannot parse function header `{text[:120]}`")
    results, name, parameters, rest = match.groups()
    directives = {}
    for key, values in re.findall(r"\.(maxntid|reqntid|minnctapersm|maxnreg|reqnctapercluster)\s+([\d, ]+)", rest):
        directives[key] = tuple(int(v) for v in re.findall(r"\d+", values))
    return Function(
        name,
        is_kernel,
        [parse_parameter(p) for p in split_operands(parameters or "")],
        [parse_parameter(p) for p in split_operands(results or "")],
        [],
        directives,
        line,
    )


class _SourceLines:
    """Tracks .file and .loc directives."""

    def __init__(self, text):
        self.files = {}
        for number, name in re.findall(r'^\s*\.file\s+(\d+)\s+("[^\n]*)$', text, re.M):
            # Two quoted strings mean directory and file name.
            self.files[int(number)] = os.path.join(*re.findall(r'"([^"]*)"', name)[:2])
        self.source = ""
        self.inlined_at = ""

    def _name(self, file, line):
        return f"{os.path.basename(self.files.get(int(file), f'file {file}'))}:{line}"

    def directive(self, text):
        match = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        if not match or match.group(2) == "0":
            return
        self.source = self._name(*match.groups())
        inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", text)
        self.inlined_at = self._name(*inlined.groups()) if inlined else ""


def parse(text):
    """Parses a PTX module."""
    text = _blank_comments(text)
    lines = _SourceLines(text)
    module = Module("", "", [], [])
    function, depth = None, 0
    for kind, chunk, line in _chunks(text):
        if kind == "directive":
            key, _, value = chunk.partition(" ")
            key, value = key.split("\t")[0], (chunk.split(None, 1)[1] if " " in chunk or "\t" in chunk else "")
            if key == ".version":
                module.version = value.strip()
            elif key == ".target":
                module.target = value.split(",")[0].strip()
            elif key == ".loc":
                lines.directive(chunk)
        elif kind == "head":
            function = _parse_head(chunk, line)
            lines.source = lines.inlined_at = ""
            module.functions.append(function)
        elif function is None:
            if kind == "stmt":
                _parse_top_level(module, chunk, line)
        elif kind == "open":
            depth += 1
            if depth > 1:
                function.body.append(Scope(True))
        elif kind == "close":
            depth -= 1
            if depth == 0:
                function = None
            else:
                function.body.append(Scope(False))
        elif kind == "label":
            function.body.append(Label(chunk))
        elif re.match(r"\.(reg|local|shared|param|global|const)\b", chunk):
            function.body.append(Declaration(chunk, line))
        elif not chunk.startswith("."):
            function.body.append(_parse_instruction(chunk, line, lines))
    return module


def _parse_top_level(module, chunk, line):
    if re.match(r"(\.(extern|visible|weak|common)\s+)*\.(shared|global|const)\b", chunk):
        try:
            module.variables.append(parse_variable(chunk))
        except ParseError as error:
            raise ParseError(f"line {line}: {error}") from None
    # Function prototypes (`.extern .func name (...);`) carry nothing that is needed.


def _parse_instruction(chunk, line, lines):
    match = _INSTRUCTION.match(chunk)
    if not match:
        raise ParseError(f"PTX line {line}: cannot parse `{chunk[:120]}`")
    negated, predicate, opcode, rest = match.groups()
    short = " ".join(chunk.split())
    location = Location(line, short if len(short) <= 100 else short[:97] + "...", lines.source, lines.inlined_at)
    return Instruction(opcode.split("."), split_operands(rest), predicate or "", bool(negated), location)
