"""Follows one thread of a kernel through its machine code, with the parameters that a launch gives it."""

from __future__ import annotations

from typing import NamedTuple

from . import floats, memory  # noqa: F401  (floats enters its handlers)
from .sass import Instruction, Kernel
from .semantics import CONTROL, END, HANDLERS, SIZE
from .thread import Access, Constants, Memory, Thread, cannot_follow

MOST = 100_000  # instructions; a kernel's loop that goes on is an error of the trace


class Trace(NamedTuple):
    """What a thread executed. Instructions whose guard is false are counted: they take an issue slot."""

    path: tuple[int, ...]  # addresses of the instructions
    loads: tuple[Access, ...]
    stores: tuple[Access, ...]
    in_flight: int  # bytes of elements whose loads are issued before the first use of any of them

    @property
    def instructions(self) -> int:
        """The number of instructions that were issued."""
        return len(self.path)


def follow(kernel: Kernel, constants: Constants, memory: Memory, block: int, thread: int) -> Trace:
    """Follow a thread to its end."""
    state, path, address = Thread(constants, memory, block, thread, kernel.jump_table), [], 0
    while address != END:
        instruction = kernel.at(address)
        path.append(address)
        state.begin()
        following = execute(state, instruction)
        address = address + SIZE if following is None else following
        if len(path) > MOST:
            raise cannot_follow(instruction, f"{MOST} instructions, and no end")
    first = len(path) + 1 if state.first_use is None else state.first_use
    in_flight = sum(load.size for load in state.loads if load.data and load.issued < first)
    return Trace(tuple(path), tuple(state.loads), tuple(state.stores), in_flight)


def execute(state: Thread, instruction: Instruction) -> int | None:
    """Execute an instruction; return the next one's address if it is not the following."""
    handler = HANDLERS.get(instruction.opcode)
    if handler is None:
        raise cannot_follow(instruction, "this opcode has no semantics")
    executed = state.predicate(instruction.guard)
    if executed is None and (instruction.opcode in CONTROL or instruction.opcode in memory.MEMORY):
        raise cannot_follow(instruction, "its guard depends on an unknown value")
    if executed is False:
        return None
    try:
        following = handler(state, instruction)
    except ValueError as error:
        raise cannot_follow(instruction, f"operands of an unknown form: {error}") from error
    if executed is None:
        state.forget_written()
    return following
