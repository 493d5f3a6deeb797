"""What loads, stores and exchanges do to a thread: the elements of tensors are unknown, all other memory is read."""

from __future__ import annotations

from .sass import ZERO, Instruction, Operand
from .semantics import handles, signed
from .thread import WORD, Access, Thread, cannot_follow

SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes of an access; 4 without any of these


def size_of(i: Instruction) -> int:
    """Return the bytes that an access moves."""
    return next((SIZES[name] for name in i.modifiers if name in SIZES), 4)


def _write(thread: Thread, i: Instruction, destination: Operand, size: int, value: int | None) -> None:
    """Write what was loaded to as many registers as it needs."""
    if value is not None and {"S8", "S16"} & set(i.modifiers):
        value = signed(value, 8 * size) & WORD
    if destination.value == ZERO:
        return
    for word in range(max(size // 4, 1)):
        bits, unknown = (0, WORD) if value is None else (value >> 32 * word & WORD, 0)
        thread.set_bits(destination.kind, destination.value + word, bits, unknown)


@handles("LDC", "ULDC", "LDCU")
def _load_constant(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands
    _write(thread, i, destination, size_of(i), thread.constant(source, size_of(i)))


def _access(thread: Thread, i: Instruction, operand: Operand) -> Access:
    address, size = thread.address(operand), size_of(i)
    if address is None:
        raise cannot_follow(i, "its address is unknown")
    if address % size != 0:
        raise cannot_follow(i, f"its address {address:#x} is no multiple of {size}")
    region = thread.memory.region(address, size)
    return Access(region.name, address, size, region.data, thread.issued)


@handles("LDG", "LD")
def _load(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands
    access = _access(thread, i, source)
    thread.loads.append(access)
    if access.data:
        _write(thread, i, destination, access.size, None)
        thread.mark_loaded(destination, max(access.size // 4, 1))
        return
    if any(s.address < access.address + access.size and access.address < s.address + s.size for s in thread.stores):
        raise cannot_follow(i, "it loads what the thread has stored")
    _write(thread, i, destination, access.size, thread.memory.read(access.address, access.size))


@handles("STG", "ST")
def _store(thread: Thread, i: Instruction) -> None:
    target, source = i.operands
    access = _access(thread, i, target)
    for word in range(max(access.size // 4, 1) if source.value != ZERO else 0):
        thread.bits(source.kind, source.value + word)
    thread.stores.append(access)


@handles("ATOMG", "ATOM")
def _count(thread: Thread, i: Instruction) -> None:
    """Add to memory, whose value before is that of the tensor: no other block is there."""
    done, destination, target, _ = i.operands
    if "ADD" not in i.modifiers:
        raise cannot_follow(i, "this operation")
    access = _access(thread, i, target)
    thread.loads.append(access)
    _write(thread, i, destination, access.size, thread.memory.read(access.address, access.size))
    thread.set_predicate(done, None)


@handles("SHFL")
def _exchange(thread: Thread, i: Instruction) -> None:
    """Know what a lane gets of itself."""
    done, destination, source, lane, _ = i.operands
    value = thread.read(source)
    own = "IDX" in i.modifiers and thread.read(lane) == thread.thread % 32
    thread.write(destination, value if own else None)
    thread.set_predicate(done, None)


# ---- Shared memory, of which a thread reads what it wrote ----


@handles("STS")
def _store_shared(thread: Thread, i: Instruction) -> None:
    target, source = i.operands
    address = thread.address(target)
    if address is None or size_of(i) < 4:
        raise cannot_follow(i, "its address is unknown, or its size")
    for word in range(size_of(i) // 4):
        index = source.value if source.value == ZERO else source.value + word
        thread.shared[address + 4 * word] = thread.bits(source.kind, index)


@handles("LDS")
def _load_shared(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands
    address = thread.address(source)
    if address is None or size_of(i) < 4:
        raise cannot_follow(i, "its address is unknown, or its size")
    for word in range(size_of(i) // 4):
        bits = thread.shared.get(address + 4 * word, (0, WORD))
        thread.set_bits(destination.kind, destination.value + word, *bits)


MEMORY = frozenset({"LDG", "LD", "STG", "ST", "ATOMG", "ATOM", "SHFL", "STS", "LDS"})
"""The opcodes that may not be executed in doubt."""
