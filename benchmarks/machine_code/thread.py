"""The state of one thread that is followed: registers, predicates, memory, and what it has loaded and stored.

A value that depends on the tensors' elements is unknown, and so is what is computed of it: None. A register holds its
bits and which of them are unknown.
"""

from __future__ import annotations

import ctypes
import struct
from typing import NamedTuple

from .sass import ZERO, Instruction, Operand

WORD = 0xFFFFFFFF
UNKNOWN = 0, WORD
REGISTERS = frozenset({"R", "UR"})
PARAMETERS = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380, "sm_120": 0x380}
"""Where a kernel's parameters begin in constant bank 0, by architecture. Its block and grid are at 0x0 and 0xc."""


class CannotFollowError(Exception):
    """The way of the thread depends on what is not known, or on an instruction that has no semantics here."""


class Region(NamedTuple):
    """Memory of a tensor; that of ``data`` is read and written element by element, and its values are unknown."""

    name: str
    begin: int
    size: int
    data: bool


class Access(NamedTuple):
    """A load or store: what of memory it touches, and how many instructions were issued before it."""

    region: str
    address: int
    size: int
    data: bool
    issued: int


class Constants:
    """Constant bank 0 of a launch."""

    def __init__(self, architecture: str, blocks: int, threads: int, parameters: bytes) -> None:
        self._begin, self._parameters = PARAMETERS[architecture], parameters
        self._grid = struct.pack("<6I", threads, 1, 1, blocks, 1, 1)

    def read(self, offset: int, size: int) -> int | None:
        """Return a little-endian number; None outside of the parameters, the block and the grid."""
        for begin, content in ((self._begin, self._parameters), (0, self._grid)):
            if begin <= offset and offset + size <= begin + len(content):
                return int.from_bytes(content[offset - begin :][:size], "little")
        return None


class Memory:
    """Global memory: the tensors of a launch, which are on the CPU."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions

    def region(self, address: int, size: int) -> Region:
        """Find the tensor that holds these bytes; tensors that share memory are the first of them."""
        for region in self.regions:
            if region.begin <= address and address + size <= region.begin + region.size:
                return region
        raise CannotFollowError(f"{size} bytes at {address:#x} are in no tensor")

    def read(self, address: int, size: int) -> int:
        """Read a little-endian number of the tensor's memory."""
        return int.from_bytes(ctypes.string_at(address, size), "little")


class Thread:
    """One thread's state, with the accesses of operands that the semantics of instructions are made of."""

    def __init__(self, constants: Constants, memory: Memory, block: int, thread: int, jump_table: bytes = b"") -> None:
        self.constants, self.memory, self.block, self.thread = constants, memory, block, thread
        self.jump_table = jump_table
        self.issued = 0
        self.loads: list[Access] = []
        self.stores: list[Access] = []
        self.first_use: int | None = None  # the number of instructions before the first that needs an element
        self.shared: dict[int, tuple[int, int]] = {}
        self.targets: dict[int, int] = {}  # of convergence barriers
        self.vote: bool | None = None  # what the thread gave to the block's last vote
        self._registers: dict[tuple[str, int], tuple[int, int]] = {}
        self._predicates: dict[tuple[str, int], bool | None] = {}
        self._loaded: set[tuple[str, int]] = set()  # registers that hold elements as they were loaded
        self._written: list[tuple[str, int]] = []

    # ---- Registers ----

    def bits(self, kind: str, index: int) -> tuple[int, int]:
        """Return a register's bits, and which are unknown."""
        if index == ZERO:
            return 0, 0
        register = kind, index
        if self.first_use is None and register in self._loaded:
            self.first_use = self.issued
        return self._registers.get(register, UNKNOWN)

    def set_bits(self, kind: str, index: int, bits: int, unknown: int) -> None:
        """Write a register."""
        if index != ZERO:
            register = kind, index
            self._registers[register] = bits & WORD & ~unknown, unknown & WORD
            self._written.append(register)
            self._loaded.discard(register)

    def mark_loaded(self, operand: Operand, words: int) -> None:
        """Let registers hold elements: the next instruction that reads one is the first use."""
        self._loaded |= {(operand.kind, operand.value + word) for word in range(words) if operand.value != ZERO}

    def forget_written(self) -> None:
        """Make unknown what the last instruction wrote: whether it was executed is unknown."""
        for kind, index in self._written:
            if kind in ("P", "UP"):
                self._predicates[kind, index] = None
            else:
                self._registers[kind, index] = 0, WORD

    def begin(self) -> None:
        """Count one more instruction."""
        self.issued += 1
        self._written.clear()

    # ---- Operands ----

    def read_bits(self, operand: Operand) -> tuple[int, int]:
        """Return an operand's bits, and which are unknown; its sign is left to the caller."""
        if operand.kind in REGISTERS:
            return self.bits(operand.kind, operand.value)
        value = self._unsigned(operand, 4)
        return (0, WORD) if value is None else (value & WORD, 0)

    def read(self, operand: Operand) -> int | None:
        """Return an integer of 32 bits, unsigned; None if any bit is unknown."""
        value = self.read_magnitude(operand)
        return value if value is None or not operand.signs else _signed(value, operand.signs) & WORD

    def read_magnitude(self, operand: Operand) -> int | None:
        """Return the same without the operand's sign, which is left to the caller."""
        if operand.kind in REGISTERS:
            bits, unknown = self.bits(operand.kind, operand.value)
            return None if unknown else bits
        value = self._unsigned(operand, 4)
        return None if value is None else value & WORD

    def read_wide(self, operand: Operand) -> int | None:
        """Return an integer of 64 bits, unsigned, of two neighbouring registers, a constant or a number."""
        if operand.kind in REGISTERS:
            above = operand.value if operand.value == ZERO else operand.value + 1
            (low, unknown), (high, more) = (self.bits(operand.kind, index) for index in (operand.value, above))
            value = None if unknown or more else low | high << 32
        else:
            value = self._unsigned(operand, 8)
        return None if value is None else _signed(value, operand.signs) & (WORD << 32 | WORD)

    def _unsigned(self, operand: Operand, size: int) -> int | None:
        if operand.kind == "integer":
            return operand.value & (1 << 8 * size) - 1
        if operand.kind == "float":
            return int.from_bytes(struct.pack("<f", operand.number), "little")
        if operand.kind == "constant":
            return self.constant(operand, size)
        raise CannotFollowError(f"an operand of kind {operand.kind} has no value")

    def constant(self, operand: Operand, size: int) -> int | None:
        """Read a constant; None where its value is not known."""
        offset = self.address(operand)
        if offset is None:
            raise CannotFollowError("a constant at an unknown place")
        if operand.value == 2 and offset + size <= len(self.jump_table):
            return int.from_bytes(self.jump_table[offset:][:size], "little")
        return self.constants.read(offset, size) if operand.value == 0 else None

    def address(self, operand: Operand) -> int | None:
        """Return the sum of an address' terms."""
        total = 0
        for term in operand.terms:
            value = self.read_wide(term) if ".64" in term.suffix else self.read(term)
            if value is None:
                return None
            total += term.value if term.kind == "integer" else value
        return total

    def write(self, operand: Operand, value: int | None) -> None:
        """Write a register; None is an unknown value."""
        self.set_bits(operand.kind, operand.value, value or 0, WORD if value is None else 0)

    def write_wide(self, operand: Operand, value: int | None) -> None:
        """Write two neighbouring registers."""
        if operand.value == ZERO:
            return
        unknown = WORD if value is None else 0
        for word in range(2):
            self.set_bits(operand.kind, operand.value + word, (value or 0) >> 32 * word & WORD, unknown)

    # ---- Predicates ----

    def predicate(self, operand: Operand | None) -> bool | None:
        """Return a predicate, or its opposite if it is negated; a missing one is true."""
        if operand is None:
            return True
        value = True if operand.value == ZERO else self._predicates.get((operand.kind, operand.value))
        return None if value is None else value != ("!" in operand.signs)

    def set_predicate(self, operand: Operand, value: bool | None) -> None:
        """Write a predicate."""
        if operand.value != ZERO:
            self._predicates[operand.kind, operand.value] = value
            self._written.append((operand.kind, operand.value))


def _signed(value: int, signs: str) -> int:
    if "~" in signs:
        return ~value
    return -value if "-" in signs else value


def both(*values: bool | None) -> bool | None:
    """Return whether all are true; None if that depends on unknown ones."""
    if any(value is False for value in values):
        return False
    return None if any(value is None for value in values) else True


def cannot_follow(instruction: Instruction, why: str) -> CannotFollowError:
    """Make an error that shows the instruction."""
    return CannotFollowError(f"/*{instruction.address:04x}*/ {instruction.text}: {why}")
