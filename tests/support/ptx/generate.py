"""Makes Python functions of a kernel's basic blocks.

A function gets the wave and those of its threads that run the block (a slice of all, or an array of their places), and
returns which of them go on at which block. ``registers[slot]`` is an array over the wave's threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tests.support.ptx import movements, opcodes
from tests.support.ptx.operands import EVERY_THREAD, Names, Writer
from tests.support.ptx.parse import COLLECTIVE, ENDS, WARP_COLLECTIVE, Instruction, Kernel, Module

HANDLERS = {**opcodes.HANDLERS, **movements.HANDLERS}


class Code:
    """A kernel's functions, one for each basic block. Each is compiled when it is run first."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.waits = [_waits(block) for block in kernel.blocks]
        """For whom a block's threads wait before it: "cluster", "block", "warp", or "" for nobody."""
        self.sizes = [len(block) for block in kernel.blocks]
        """How many instructions the blocks have."""
        self._names = Names(kernel, {"np": np, EVERY_THREAD: slice(None)})
        self._texts = ["\n".join(_lines_of_block(self._names, number)) for number in range(len(kernel.blocks))]
        self._functions: dict[int, Callable] = {}

    def block(self, number: int) -> Callable:
        """Return a basic block's function."""
        if number not in self._functions:
            values = self._names.values
            exec(compile(self._texts[number], f"{self.kernel.name}, block {number}", "exec"), values)
            self._functions[number] = values[f"block_{number}"]
        return self._functions[number]


def code_of(module: Module, name: str) -> Code:
    """Make the functions of a module's kernel."""
    return Code(module.parse(name))


def _waits(block: list[Instruction]) -> str:
    if not block or block[0].root not in COLLECTIVE:
        return ""
    if block[0].opcode.startswith("barrier.cluster."):
        return "cluster"
    return "warp" if block[0].root in WARP_COLLECTIVE or block[0].opcode == "bar.warp.sync" else "block"


def _lines_of_block(names: Names, number: int) -> list[str]:
    lines = [f"def block_{number}(wave, threads):", " registers = wave.registers"]
    block = names.kernel.blocks[number]
    for instruction in block:
        if instruction.root in ENDS:
            return lines + [f" {line}" for line in _end(names, instruction, number + 1)]
        lines += [f" {line}" for line in _lines_of(names, instruction)]
    if number + 1 == len(names.kernel.blocks):
        return [*lines, " return wave.leave(threads)"]
    return [*lines, f" return (({number + 1}, threads),)"]


def _end(names: Names, instruction: Instruction, following: int) -> list[str]:
    """Write a branch or a return, which end a block."""
    writer = Writer(names, instruction)
    predicate = _predicate(writer)
    if instruction.root == "brx":
        return [_end_by_index(names, writer)]
    if instruction.root != "bra":
        return [f"return wave.leave(threads, {predicate}, {following})" if predicate else "return wave.leave(threads)"]
    if instruction.opcode not in ("bra", "bra.uni") or instruction.operands[0] not in names.kernel.labels:
        raise writer.unknown()
    target = names.kernel.labels[instruction.operands[0]]
    if predicate is None:
        return [f"return (({target}, threads),)"]
    return [f"return wave.split(threads, {predicate}, {target}, {following})"]


def _end_by_index(names: Names, writer: Writer) -> str:
    """Write a branch to one of several labels."""
    kernel, instruction = names.kernel, writer.instruction
    labels = kernel.targets.get(instruction.operands[1], ("",))
    if (
        instruction.opcode not in ("brx.idx", "brx.idx.uni")
        or instruction.predicate
        or not {*labels} <= {*kernel.labels}
    ):
        raise writer.unknown()
    targets = tuple(kernel.labels[label] for label in labels)
    return f"return wave.choose(threads, {writer.read_text(instruction.operands[0], np.uint32)}, {targets})"


def _predicate(writer: Writer) -> str | None:
    instruction = writer.instruction
    if instruction.predicate is None:
        return None
    value = writer.read_text(instruction.predicate, np.bool_)
    return f"~{value}" if instruction.negated else value


def _lines_of(names: Names, instruction: Instruction) -> list[str]:
    writer = Writer(names, instruction)
    handler, predicate = HANDLERS.get(instruction.root), _predicate(writer)
    if handler is None or (predicate is not None and instruction.root in COLLECTIVE):
        raise writer.unknown()
    try:
        if predicate is None:
            return handler(writer)
        lines = handler(replace(writer, threads="some"))
    except IndexError:  # too few operands or modifiers
        raise writer.unknown() from None
    return [f"some = wave.where(threads, {predicate})", "if some is not None:", *(f" {line}" for line in lines)]
