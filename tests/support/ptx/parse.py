"""Reads PTX text: the kernels' parameters, registers and shared memory, and basic blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

DTYPES: dict[str, type[np.generic]] = {
    **{"b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "pred": np.bool_},
    **{"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64},
    **{"f32": np.float32, "f64": np.float64},
}
COLLECTIVE = ("bar", "barrier", "shfl", "vote", "stmatrix", "ldmatrix")
"""Instructions that threads make together: each begins a basic block, at which its threads wait for the others."""
WARP_COLLECTIVE = ("shfl", "vote", "stmatrix", "ldmatrix")
ENDS = ("bra", "brx", "ret", "exit")


class PtxError(Exception):
    """The interpreter does not know something of the text, or a launch does not fit its kernel."""


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``predicate`` is the register that it depends on, if any."""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str

    @cached_property
    def root(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass
class Kernel:
    """A kernel's text, taken apart. Places of symbols are in bytes."""

    name: str
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_sizes: list[tuple[int, int]] = field(default_factory=list)  # place and size, in the order of the text
    parameter_bytes: int = 0
    max_threads: int | None = None
    registers: dict[str, tuple[int, type[np.generic]]] = field(default_factory=dict)  # slot and dtype
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # labels to choose from, by a label of them all


class Module:
    """The kernels of a text, by their names in it; each is parsed when it is asked for."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r"^[ \t]*\.(loc|file)\b[^\n]*$", "", text, flags=re.M)
        self.extern_shared = re.findall(r"^\.extern\s+\.shared\s+[^;]*?(\w+)\[\]", text, flags=re.M)
        entries = re.split(r"^(?=(?:\.visible\s+)?\.entry\b)", text, flags=re.M)[1:]
        self.sources = {re.search(r"\.entry\s+([\w$]+)", entry)[1]: entry for entry in entries}

    def parse(self, name: str) -> Kernel:
        """Take a kernel apart; shared memory whose size the launch says begins at 0."""
        parser = _Parser(self.sources[name])
        parser.kernel.shared.update(dict.fromkeys(self.extern_shared, 0))
        return parser.parsed()


def split_operands(text: str) -> tuple[str, ...]:
    """Split at commas that are in no bracket."""
    if not any(bracket in text for bracket in "[{("):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    parts, depth, begin = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    return tuple(part for part in (*parts, text[begin:].strip()) if part)


def _rounded_up(place: int, multiple: int) -> int:
    return -(-place // multiple) * multiple


class _Parser:
    """Parses one kernel. Braces within it open scopes, whose registers hide others of the same name."""

    def __init__(self, source: str) -> None:
        self.head, _, self.body = source.partition("{")
        self.kernel = Kernel(re.search(r"\.entry\s+([\w$]+)", self.head)[1])
        self.scopes: list[dict[str, str]] = []
        self.arrived = False  # whether the wait at a cluster's barrier is due, which stands for both
        self.scoped = 0
        self.label = ""

    def parsed(self) -> Kernel:
        self._parameters()
        position, closed = 0, False
        token = re.compile(r"\s*(?:(?P<brace>[{}])|(?P<label>[$\w.]+)\s*:(?!:)|(?P<statement>[^;{}]*(?:\{[^;]*)?);)")
        while not closed:
            found = token.match(self.body, position)
            if found is None:
                raise PtxError(f"{self.kernel.name}: {self.body[position : position + 80]!r}")
            position = found.end()
            if found["brace"] == "{":
                self.scopes.append({})
            elif found["brace"] == "}":
                closed = not self.scopes
                del self.scopes[-1:]
            elif found["label"]:
                self._end_block()
                self.label = found["label"]
                self.kernel.labels[self.label] = len(self.kernel.blocks) - 1
            else:
                self._statement(" ".join(found["statement"].split()))
        if not self.kernel.blocks[-1] and len(self.kernel.blocks) - 1 not in self.kernel.labels.values():
            self.kernel.blocks.pop()
        return self.kernel

    def _parameters(self) -> None:
        pattern = r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.(?!align)\w+\s+)?(?:\.align\s+\d+\s+)?)?"
        for align, kind, name, count in re.findall(pattern + r"([\w$]+)(?:\[(\d+)\])?", self.head):
            size = np.dtype(DTYPES[kind]).itemsize
            place = _rounded_up(self.kernel.parameter_bytes, int(align or size))
            self.kernel.parameters[name] = place
            self.kernel.parameter_sizes.append((place, size * int(count or 1)))
            self.kernel.parameter_bytes = place + size * int(count or 1)
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", self.head)
        self.kernel.max_threads = int(threads[1]) if threads else None

    def _end_block(self) -> None:
        if self.kernel.blocks[-1]:
            self.kernel.blocks.append([])

    def _statement(self, text: str) -> None:
        if text.startswith(".reg "):
            self._registers(text)
        elif text.startswith(".shared "):
            self._shared(text)
        elif text.startswith(".branchtargets "):
            self.kernel.targets[self.label] = split_operands(text.partition(" ")[2])
        elif text and not text.startswith(".pragma "):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(" ", 2)
        for item in names.split(","):
            many = re.fullmatch(r"([%\w$]+)<(\d+)>", item.strip())
            for name in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [item.strip()]:
                if self.scopes:
                    self.scoped += 1
                    self.scopes[-1][name] = name = f"{name}.scoped{self.scoped}"
                self.kernel.registers[name] = (len(self.kernel.registers), DTYPES[kind[1:]])

    def _shared(self, text: str) -> None:
        found = re.fullmatch(r"\.shared (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?", text)
        if found is None:
            raise PtxError(text)
        size = np.dtype(DTYPES[found[2]]).itemsize
        place = _rounded_up(self.kernel.shared_bytes, int(found[1] or size))
        self.kernel.shared[found[3]] = place
        self.kernel.shared_bytes = place + size * int(found[4] or 1)

    def _instruction(self, text: str) -> None:
        for scope in reversed(self.scopes):
            for name, own in scope.items():
                text = re.sub(rf"(?<![\w$%.]){re.escape(name)}(?![\w$.])", lambda _, own=own: own, text)
        predicate = re.match(r"@(!?)([%\w.]+)\s+", text)
        opcode, _, operands = text[predicate.end() if predicate else 0 :].partition(" ")
        depends, negated = (predicate[2], bool(predicate[1])) if predicate else (None, False)
        instruction = Instruction(opcode, split_operands(operands), depends, negated, text)
        if self.arrived != opcode.startswith("barrier.cluster.wait"):
            raise PtxError(
                f"{self.kernel.name}: expected a wait behind each arrival at a cluster's barrier, got {text}"
            )
        self.arrived = opcode.startswith("barrier.cluster.arrive")
        if self.arrived:
            if depends is not None or "relaxed" in opcode:
                raise PtxError(f"{self.kernel.name}: {text}")
            return
        if instruction.root in COLLECTIVE:
            self._end_block()
        self.kernel.blocks[-1].append(instruction)
        if instruction.root in ENDS:
            self._end_block()
