"""Emits what the runtime needs to see accesses to registers that an unfinished wgmma still reads or writes.

Tracked are the registers that some ``wgmma.mma_async`` of the function takes, and those that plain ``mov`` connects
with them: compilers insert such moves freely, and they only rename a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..parser import Instruction


@dataclass(frozen=True)
class Use:
    """An instruction at a line of the C++, and the C++ names of the registers in each of its operands."""

    line: int
    id: int
    instruction: Instruction
    operands: tuple[tuple[str, ...], ...]

    @property
    def is_product(self):
        return self.instruction.opcode[:2] == ["wgmma", "mma_async"]

    @property
    def is_move(self):
        plain = not any(x.startswith("{") for x in self.instruction.operands)
        return self.instruction.opcode[0] == "mov" and plain and len(self.operands[0]) == 1

    @property
    def taken(self):
        """Registers of results, and of A where it is in registers."""
        in_registers = self.instruction.operands[1].startswith("{")
        return self.operands[0], self.operands[1] if in_registers else ()


def names_in(operand):
    return re.findall(r"%?[A-Za-z_$][\w$]*", operand)


def instrument(lines, uses):
    """Adds calls to lines of C++. Returns how many registers are tracked."""
    tracked = {name for use in uses if use.is_product for names in use.taken for name in names}
    moves = [{*use.operands[0], *use.operands[1]} for use in uses if use.is_move]
    while added := {name for names in moves if names & tracked for name in names} - tracked:
        tracked |= added
    number = {name: n for n, name in enumerate(sorted(tracked))}
    for use in uses:
        call = _call(use, number)
        if call:
            lines[use.line] = lines[use.line].replace(f"PTX_COUNT({use.id});", f"PTX_COUNT({use.id}); {call}", 1)
    return len(number)


def _call(use, number):
    def numbers(names):
        return "{" + ", ".join(f"{number[name]}u" for name in names if name in number) + "}"

    if use.is_product:
        results, operands = use.taken
        return f"wgmma_registers_taken(t, wgmma_state, {numbers(results)}, {numbers(operands)}, {use.id});"
    if use.instruction.opcode[:2] == ["wgmma", "fence"] and number:
        return f"wgmma_fence(t, wgmma_state, {len(number)}u);"
    if not any(name in number for names in use.operands for name in names):
        return ""
    if use.is_move:
        source = next((number[name] for name in use.operands[1] if name in number), -1)
        return f"wgmma_register_moved(t, wgmma_state, {number[use.operands[0][0]]}u, {source}, {use.id});"
    stores = use.instruction.operands[0].startswith("[")
    used = numbers(name for names in use.operands for name in names)
    written = numbers(() if stores else use.operands[0])
    return f"wgmma_registers_used(t, wgmma_state, {used}, {written}, {use.id});"
