"""Parses the machine code that cuobjdump prints: instructions with their guards, opcodes and operands."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from tests.support.machine_code import cuobjdump, demangled, disassembly

ZERO = -1  # the number of the registers that are always 0 and of the predicates that are always true


class ParseError(ValueError):
    """The text is not as this parser knows it."""


class Operand(NamedTuple):
    """An operand; ``kind`` is R, UR, P, UP, integer, float, constant, memory, barrier or special.

    ``signs`` are the characters ``! - ~ |`` before it. ``terms`` are summed to an address, for memory and constants.
    """

    kind: str
    value: int = 0  # of an integer; the number of a register, bank or barrier
    number: float = 0.0  # of a float
    name: str = ""
    signs: str = ""
    suffix: str = ""
    terms: tuple[Operand, ...] = ()


class Instruction(NamedTuple):
    """One instruction: ``opcode`` is the name before the first dot, ``modifiers`` the names behind it."""

    address: int
    guard: Operand | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str


class Kernel:
    """A kernel's code, parsed as far as it is looked at, and constant bank 2: where its switches go on."""

    def __init__(self, lines: dict[int, str], jump_table: bytes = b"") -> None:
        self._lines, self.jump_table = lines, jump_table
        self._parsed: dict[int, Instruction] = {}

    def at(self, address: int) -> Instruction:
        """Return the instruction at an address."""
        if address not in self._parsed:
            self._parsed[address] = instruction(self._lines[address])
        return self._parsed[address]


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_REGISTER = re.compile(r"(UR|R|UP|P)(\d+|Z|T)((?:\.\w+)*)$")
_SIGNED = re.compile(r"([!~-]?\|?)(.*?)\|?((?:\.\w+)*)$")
_FLOAT = re.compile(r"[+-]?(?:\d[\d.]*(?:e[+-]?\d+)?|INF|QNAN|SNAN)$")


def operand(text: str) -> Operand:
    """Parse one operand."""
    text = text.replace(".reuse", "")
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Operand("integer", int(text, 16))
    if _FLOAT.match(text):
        return Operand("float", number=float(re.sub("[QS]NAN", "nan", text)))
    match = _SIGNED.match(text)
    signs, core, suffix = match.groups() if match else ("", text, "")
    if found := _REGISTER.match(core):
        return Operand(found[1], ZERO if found[2] in "ZT" else int(found[2]), signs=signs, suffix=suffix)
    if found := re.fullmatch(r"c\[(0x\w+)\]\[(.+)\]", core):
        return Operand("constant", int(found[1], 16), signs=signs, suffix=suffix, terms=_terms(found[2]))
    if found := re.fullmatch(r"(?:desc\[UR\d+\])?\[(.+)\]", core):
        return Operand("memory", terms=_terms(found[1]), suffix=suffix)
    if found := re.fullmatch(r"B(\d+)", core):
        return Operand("barrier", int(found[1]))
    if re.fullmatch(r"SRZ|SR_\w+|U?PR", core):
        return Operand("special", name=core + suffix)
    raise ParseError(f"an operand of unknown form: {text!r}")


def _terms(text: str) -> tuple[Operand, ...]:
    return tuple(operand(part) for part in re.sub(r"\+-", "+ -", text).replace("+ ", "+").split("+") if part)


def instruction(line: str) -> Instruction:
    """Parse a line of cuobjdump's that holds an instruction."""
    match = _LINE.match(line)
    if match is None:
        raise ParseError(f"a line of unknown form: {line!r}")
    address, guard, name, rest = match.groups()
    opcode, *modifiers = name.split(".")
    operands = tuple(operand(part) for part in re.split(r",\s*|\s+", rest) if part)
    text = " ".join(line[line.index("*/") + 2 : line.index(";")].split())
    return Instruction(int(address, 16), operand(guard) if guard else None, opcode, tuple(modifiers), operands, text)


def parse(text: str) -> dict[str, dict[int, str]]:
    """Divide what ``cuobjdump -sass`` prints: by a function's mangled name, the lines of its instructions."""
    found: dict[str, dict[int, str]] = {}
    for name, body in re.findall(r"^\s+Function : (\S+)\n(.*?)(?=^\s+Function : |\Z)", text, re.M | re.S):
        found[name] = {int(line[1], 16): line[0] for line in re.finditer(r"^\s+/\*([0-9a-f]{4,})\*/.*$", body, re.M)}
    return found


def names(library: Path, architecture: str) -> dict[str, str]:
    """Return the mangled name of each kernel, by its name without namespaces."""
    listed = re.findall(r"Function (\S+):", cuobjdump("-res-usage", "-arch", architecture, library))
    return dict(zip(demangled(listed), listed, strict=True))


def read_kernels(library: Path, architecture: str, kernels: list[str]) -> dict[str, Kernel]:
    """Read the code of kernels, by their names without namespaces."""
    mangled = names(library, architecture)
    if missing := set(kernels) - set(mangled):
        raise LookupError(f"{library} was built of other sources: it has no {', '.join(sorted(missing))}")
    chosen = {mangled[kernel]: kernel for kernel in kernels}
    text = disassembly(library, architecture)
    found = parse(text)
    tables = jump_tables(_elf(library, architecture)) if " BRX" in text else {}
    read = {}
    for name, lines in found.items():
        table = [content for beginning, content in tables.items() if name.startswith(beginning)]
        if name in chosen:
            read[chosen[name]] = Kernel(lines, *table)
    return read


def jump_tables(elf: str) -> dict[str, bytes]:
    """Parse what ``cuobjdump -elf`` prints of constant bank 2, by the kernel's mangled name, which it may cut off."""
    found = re.findall(r"^\.nv\.constant2\.(\S+)\n((?:0x[0-9a-f]{8}\s+)+)", elf, re.M)
    return {name: b"".join(int(word, 16).to_bytes(4, "little") for word in words.split()) for name, words in found}


def compiler(library: Path, architecture: str) -> str:
    """Return the version of the compiler that made an architecture's code, from the note that it left there."""
    match = re.search(r"Tool Version: (.+)", _elf(library, architecture))
    return match[1].strip() if match else "unknown"


@functools.cache
def _elf(library: Path, architecture: str) -> str:
    return cuobjdump("-elf", "-arch", architecture, library)
