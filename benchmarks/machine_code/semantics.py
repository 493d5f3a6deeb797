"""What integer, predicate and control instructions do to a thread. NVIDIA documents names only: a test has each effect.

A handler returns the address of the next instruction if that is not the following one, and END after an EXIT.
"""

from __future__ import annotations

from collections.abc import Callable

from .sass import Instruction, Operand
from .thread import WORD, Thread, both, cannot_follow

END = -1
SIZE = 16  # bytes of an instruction
PREDICATES = ("P", "UP")
CONTROL = frozenset({"BRA", "CALL", "BRX", "BRXU", "RET", "BSYNC", "EXIT"})
"""The opcodes that decide where the thread goes on."""

Handler = Callable[[Thread, Instruction], "int | None"]
HANDLERS: dict[str, Handler] = {}
"""By opcode."""


def handles(*opcodes: str) -> Callable[[Handler], Handler]:
    """Enter a handler into the table."""

    def enter(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return enter


def parts(i: Instruction) -> tuple[Operand, list[Operand], list[Operand], list[Operand]]:
    """Split operands: the destination, predicates that are written, sources, and predicates that are read."""
    rest, out, sources = list(i.operands[1:]), [], []
    while rest and rest[0].kind in PREDICATES:
        out.append(rest.pop(0))
    while rest and rest[0].kind not in PREDICATES:
        sources.append(rest.pop(0))
    return i.operands[0], out, sources, rest


def signed(value: int, bits: int = 32) -> int:
    """Read an unsigned number as two's complement."""
    return value - (1 << bits) if value >> (bits - 1) else value


def carries(thread: Thread, predicates: list[Operand]) -> int | None:
    """Add predicates that are read as carries."""
    values = [thread.predicate(p) for p in predicates]
    return None if None in values else sum(map(bool, values))


def set_carries(thread: Thread, predicates: list[Operand], total: int | None, bits: int = 32) -> None:
    """Write what goes beyond a sum's bits: each predicate holds one carry."""
    for number, predicate in enumerate(predicates):
        thread.set_predicate(predicate, None if total is None else (total >> bits) > number)


# ---- Sums and products ----


def addend(thread: Thread, operand: Operand) -> int | None:
    """Return a term of a sum with its sign: -b is the complement and 1, which carries if b is 0."""
    if operand.signs != "-":
        return thread.read(operand)
    value = thread.read_magnitude(operand)
    return None if value is None else (~value & WORD) + 1


@handles("IADD3", "UIADD3", "VIADD", "IADD")
def _add(thread: Thread, i: Instruction) -> None:
    destination, out, sources, into = parts(i)
    terms = [addend(thread, source) for source in sources]
    terms.append(carries(thread, into) if "X" in i.modifiers else 0)
    total = None if None in terms else sum(t for t in terms if t is not None)
    set_carries(thread, out, total)
    thread.write(destination, None if total is None else total & WORD)


@handles("IMAD", "UIMAD")
def _multiply_add(thread: Thread, i: Instruction) -> None:
    destination, out, (a, b, c), into = parts(i)
    if "MOV" in i.modifiers and not c.signs:
        thread.set_bits(destination.kind, destination.value, *thread.read_bits(c))
        return
    wide = "WIDE" in i.modifiers or "HI" in i.modifiers
    factors = thread.read(a), thread.read(b)
    added = thread.read_wide(c) if wide else thread.read(c)
    carry = carries(thread, into) if "X" in i.modifiers else 0
    if 0 in factors:
        product: int | None = 0
    elif factors[0] is None or factors[1] is None:
        product = None
    elif wide and "U32" not in i.modifiers:
        product = signed(factors[0]) * signed(factors[1]) & (WORD << 32 | WORD)
    else:
        product = factors[0] * factors[1]
    total = None if product is None or added is None or carry is None else product + added + carry
    set_carries(thread, out, total, 64 if wide else 32)
    if "WIDE" in i.modifiers:
        thread.write_wide(destination, None if total is None else total & (WORD << 32 | WORD))
    else:
        thread.write(destination, None if total is None else total >> (32 if wide else 0) & WORD)


@handles("LEA", "ULEA")
def _shift_add(thread: Thread, i: Instruction) -> None:
    destination, out, sources, into = parts(i)
    high = "HI" in i.modifiers
    a, b, shift = (thread.read(source) for source in (sources[0], sources[1], sources[-1]))
    if high and "SX32" in i.modifiers:
        above = None if a is None else WORD * (a >> 31)
    else:
        above = thread.read(sources[2]) if high else 0
    carry = carries(thread, into) if "X" in i.modifiers else 0
    if out and (sources[0].signs or sources[1].signs):
        raise cannot_follow(i, "the carry of a difference")
    if a is None or b is None or shift is None or above is None or carry is None:
        total = None
    else:
        shifted = (above << 32 | a) << shift
        total = (shifted >> (32 if high else 0) & WORD) + b + carry
    set_carries(thread, out, total)
    thread.write(destination, None if total is None else total & WORD)


@handles("VIMNMX", "UIMNMX", "IMNMX")
def _minimum(thread: Thread, i: Instruction) -> None:
    destination, _, (first, second), (least,) = parts(i)
    a, b, smaller = thread.read(first), thread.read(second), thread.predicate(least)
    if a is None or b is None or smaller is None:
        thread.write(destination, None)
        return
    choose: Callable[..., int] = min if smaller else max
    thread.write(destination, choose(a, b, key=(lambda v: v) if "U32" in i.modifiers else signed))


@handles("IABS")
def _absolute(thread: Thread, i: Instruction) -> None:
    value = thread.read(i.operands[1])
    thread.write(i.operands[0], None if value is None else abs(signed(value)) & WORD)


# ---- Bits ----


def _lookup(table: int, inputs: list[tuple[int, int]]) -> tuple[int, int]:
    """Combine three words bit by bit: bit 4a + 2b + c of the table. Return bits, and which depend on unknown ones."""

    def combine(words: tuple[int, ...]) -> int:
        result = 0
        for number in range(8):
            if table >> number & 1:
                chosen = WORD
                for place, word in enumerate(words):
                    chosen &= word if number >> (2 - place) & 1 else ~word
                result |= chosen
        return result & WORD

    every: list[tuple[int, ...]] = [()]
    for bits, unknown in inputs:
        every = [(*words, word) for words in every for word in ({bits, bits | unknown})]
    results = [combine(words) for words in every]
    different = 0
    for result in results:
        different |= result ^ results[0]
    return results[0] & ~different, different


@handles("LOP3", "ULOP3")
def _logic(thread: Thread, i: Instruction) -> None:
    operands = list(i.operands)
    out = operands.pop(0) if operands[0].kind in PREDICATES else None
    destination, *sources, table, into = operands
    inputs = []
    for source in sources:
        bits, unknown = thread.read_bits(source)
        inputs.append(((~bits if "~" in source.signs else bits) & ~unknown & WORD, unknown))
    bits, unknown = _lookup(table.value, inputs)
    thread.set_bits(destination.kind, destination.value, bits, unknown)
    if out is not None:
        nonzero = True if bits else (None if unknown else False)
        given = thread.predicate(into)
        if "PAND" in i.modifiers:
            thread.set_predicate(out, both(nonzero, given))
        else:
            thread.set_predicate(out, _not(both(_not(nonzero), _not(given))))


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


@handles("PLOP3", "UPLOP3")
def _predicate_logic(thread: Thread, i: Instruction) -> None:
    *outs, a, b, c, first, second = i.operands
    inputs = []
    for source in (a, b, c):
        value = thread.predicate(source)
        inputs.append((0, WORD) if value is None else (WORD * value, 0))
    for out, table in zip(outs, (first, second), strict=True):
        bits, unknown = _lookup(table.value, inputs)
        thread.set_predicate(out, None if unknown else bool(bits))


@handles("SHF", "USHF")
def _shift(thread: Thread, i: Instruction) -> None:
    destination, low, by, high = i.operands
    size = 64 if {"U64", "S64"} & set(i.modifiers) else 32
    shift, words = thread.read(by), [thread.read(low), thread.read(high)]
    if shift is None or words[0] is None or words[1] is None:
        thread.write(destination, None)
        return
    shift = shift % size if "W" in i.modifiers else min(shift, size)
    value = words[1] << 32 | words[0]
    if {"S32", "S64"} & set(i.modifiers):
        value = signed(value, 64)
    value = value << shift if "L" in i.modifiers else value >> shift
    thread.write(destination, (value >> 32 if "HI" in i.modifiers else value) & WORD)


@handles("PRMT", "UPRMT")
def _permute(thread: Thread, i: Instruction) -> None:
    destination, low, selector, high = i.operands
    chosen = thread.read(selector)
    words = [thread.read_bits(low), thread.read_bits(high)]
    if chosen is None or {"F4E", "B4E", "RC8", "ECL", "ECR", "RC16"} & set(i.modifiers):
        raise cannot_follow(i, "this mode or selector")
    result = []
    for kind in range(2):  # bits, and which are unknown
        source, value = words[0][kind] | words[1][kind] << 32, 0
        for byte in range(4):
            nibble = chosen >> 4 * byte & 15
            found = source >> 8 * (nibble & 7) & 255
            value |= (255 * (found >> 7) if nibble & 8 else found) << 8 * byte
        result.append(value)
    thread.set_bits(destination.kind, destination.value, *result)


# ---- Choices and moves ----


@handles("MOV", "UMOV", "R2UR", "MOV32I")
def _move(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands[:2]
    thread.set_bits(destination.kind, destination.value, *thread.read_bits(source))


@handles("SEL", "USEL")
def _select(thread: Thread, i: Instruction) -> None:
    destination, a, b, condition = i.operands
    chosen = thread.predicate(condition)
    first, second = thread.read(a), thread.read(b)
    same = first if first == second else None
    thread.write(destination, same if chosen is None else (first if chosen else second))


@handles("P2R", "UP2UR")
def _predicates_to_register(thread: Thread, i: Instruction) -> None:
    destination, predicates, source, mask = i.operands
    bits, unknown = thread.read_bits(source)
    for index in range(7):
        if mask.value >> index & 1:
            value = thread.predicate(Operand(predicates.name.removesuffix("R"), index))
            bits = bits & ~(1 << index) | bool(value) << index
            unknown = unknown & ~(1 << index) | (value is None) << index
    thread.set_bits(destination.kind, destination.value, bits, unknown)


@handles("R2P")
def _register_to_predicates(thread: Thread, i: Instruction) -> None:
    _, source, mask = i.operands
    bits, unknown = thread.read_bits(source)
    for index in range(7):
        if mask.value >> index & 1:
            known = not unknown >> index & 1
            thread.set_predicate(Operand("P", index), bool(bits >> index & 1) if known else None)


@handles("S2R", "S2UR", "CS2R")
def _special(thread: Thread, i: Instruction) -> None:
    destination, source = i.operands
    values = {"SR_TID.X": thread.thread, "SR_CTAID.X": thread.block, "SR_LANEID": thread.thread % 32}
    values |= dict.fromkeys(("SRZ", "SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"), 0)
    if i.opcode == "CS2R" and "32" not in i.modifiers:
        thread.write_wide(destination, values.get(source.name))
    else:
        thread.write(destination, values.get(source.name))


@handles("VOTEU", "VOTE")
def _vote(thread: Thread, i: Instruction) -> None:
    """Know what one's own vote decides."""
    *outs, source = i.operands
    own = thread.predicate(source)
    decided = own is not None and own == ("ANY" in i.modifiers)
    for operand in outs:
        if operand.kind in PREDICATES:
            thread.set_predicate(operand, own if decided else None)
        else:
            thread.write(operand, None)


# ---- Comparisons ----

COMPARE: dict[str, Callable[[float, float], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}


def set_comparison(thread: Thread, i: Instruction, result: bool | None, given: bool | None) -> None:
    """Write a comparison's result, combined with a predicate, and that of its opposite."""
    for out, value in zip(i.operands[:2], (result, _not(result)), strict=True):
        if "AND" in i.modifiers:
            thread.set_predicate(out, both(value, given))
        elif "OR" in i.modifiers:
            thread.set_predicate(out, _not(both(_not(value), _not(given))))
        elif "XOR" in i.modifiers:
            thread.set_predicate(out, None if value is None or given is None else value != given)
        else:
            raise cannot_follow(i, "how are its predicates combined?")


@handles("ISETP", "UISETP")
def _compare(thread: Thread, i: Instruction) -> None:
    _, _, a, b, given, *low = i.operands
    first, second = thread.read(a), thread.read(b)
    result: bool | None = None
    if first is not None and second is not None:
        if "EX" in i.modifiers and first == second:  # these are the high words; `low` compares the others
            result = thread.predicate(low[0])
        elif "U32" in i.modifiers:
            result = COMPARE[i.modifiers[0]](first, second)
        else:
            result = COMPARE[i.modifiers[0]](signed(first), signed(second))
    set_comparison(thread, i, result, thread.predicate(given))


# ---- Control ----


@handles("BRA", "CALL", "BRX", "BRXU", "RET")
def _branch(thread: Thread, i: Instruction) -> int | None:
    if {"DIV", "CONV", "ABS"} & set(i.modifiers):
        raise cannot_follow(i, "this kind of branch")
    *conditions, target = i.operands
    taken = both(*(thread.predicate(c) for c in conditions if c.kind in PREDICATES))
    registers = [c for c in conditions if c.kind not in PREDICATES]
    if taken is None:
        raise cannot_follow(i, "its condition depends on an unknown value")
    if not taken:
        return None
    if not registers:
        return target.value
    base = thread.read(registers[0])
    if base is None:
        raise cannot_follow(i, "it goes to an unknown place")
    return (base + target.value + (i.address + SIZE if i.opcode in ("BRX", "BRXU") else 0)) & WORD


@handles("BSSY")
def _open(thread: Thread, i: Instruction) -> None:
    barrier, target = i.operands
    thread.targets[barrier.value] = target.value


@handles("BSYNC")
def _close(thread: Thread, i: Instruction) -> int:
    return thread.targets[i.operands[0].value]


@handles("EXIT")
def _exit(thread: Thread, i: Instruction) -> int:
    return END


@handles("BAR")
def _barrier(thread: Thread, i: Instruction) -> None:
    """Keep what the thread gives to a vote of the block."""
    thread.vote = thread.predicate(i.operands[1]) if "RED" in i.modifiers else None


@handles("B2R")
def _result_of_vote(thread: Thread, i: Instruction) -> None:
    """Take it that all threads of the block gave the same, as they do in blocks that are not the last."""
    destination, *predicates = i.operands
    thread.write(destination, None)
    for predicate in predicates:
        thread.set_predicate(predicate, thread.vote)


@handles("NOP", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "WARPSYNC", "BREAK", "DEPBAR", "FENCE", "YIELD")
def _nothing(thread: Thread, i: Instruction) -> None:
    """Do nothing: a single thread waits for nobody."""
