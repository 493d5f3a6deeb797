"""Writes Python for the operands of an instruction: registers, numbers, addresses and special registers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED
from tests.support.ptx.parse import DTYPES, Instruction, Kernel, PtxError, split_operands

PARAMETERS = 0x7A00_0000_0000_0000
"""The address of the kernel's parameters."""
SHARED = 0x400
"""The address of the block's shared memory."""
SPECIAL = {
    **{"%tid.x": "thread", "%ctaid.x": "block", "%ntid.x": "block_size", "%nctaid.x": "grid_size", "%laneid": "lane"},
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), "zero"),
    **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"), "one"),
}
"""The arrays of a wave that hold them."""
EVERY_THREAD = "every"
"""The name of all threads of a wave in the code."""

Dtype = type[np.generic]


@dataclass
class Names:
    """The names that a kernel's code uses: the functions that it calls, and constants."""

    kernel: Kernel
    values: dict[str, object] = field(default_factory=dict)
    constants: dict[object, str] = field(default_factory=dict)

    def constant(self, value: object) -> str:
        """Name a value; the same one has the same name."""
        key = (type(value), value.tobytes() if isinstance(value, np.generic) else value)
        if key not in self.constants:
            self.constants[key] = f"constant{len(self.constants)}"
            self.values[self.constants[key]] = value
        return self.constants[key]

    def function(self, function: Callable) -> str:
        known = self.values.setdefault(function.__name__, function)
        if known is not function:
            raise PtxError(f"two functions are called {function.__name__}")
        return function.__name__


@dataclass(frozen=True)
class Writer:
    """Writes the code of one instruction, for the threads that a variable of the code holds."""

    names: Names
    instruction: Instruction
    threads: str = "threads"

    @property
    def modifiers(self) -> list[str]:
        return self.instruction.modifiers

    @property
    def operands(self) -> tuple[str, ...]:
        return self.instruction.operands

    @property
    def dtype(self) -> Dtype:
        """Return the dtype that the opcode ends in."""
        if not self.modifiers or self.modifiers[-1] not in DTYPES:
            raise self.unknown()
        return DTYPES[self.modifiers[-1]]

    @property
    def is_float(self) -> bool:
        return self.dtype in (np.float32, np.float64)

    def unknown(self) -> PtxError:
        return PtxError(f"not known to the interpreter: {self.instruction.text}")

    def only(self, *allowed: str) -> None:
        """Refuse other modifiers than these and a dtype at the end."""
        *modifiers, dtype = self.modifiers
        if dtype not in DTYPES or not set(modifiers) <= set(allowed):
            raise self.unknown()

    def constant(self, value: object) -> str:
        return self.names.constant(value)

    def call(self, function: Callable, *arguments: object) -> str:
        return f"{self.names.function(function)}({', '.join(map(str, arguments))})"

    def list_of(self, position: int) -> tuple[str, ...]:
        """Return the parts of an operand in braces, or the one that has none."""
        text = self.operands[position]
        return split_operands(text[1:-1]) if text.startswith("{") else (text,)

    # -- Reading --

    def read(self, position: int, dtype: Dtype | None = None) -> str:
        if position >= len(self.operands):
            raise self.unknown()
        return self.read_text(self.operands[position], dtype or self.dtype)

    def read_text(self, text: str, dtype: Dtype, narrow: bool = False) -> str:
        """Read an operand; ``narrow``: a wider register may be given, of which the lower bits are read."""
        if text in self.names.kernel.registers:
            return self._register(text, dtype, narrow)
        if text in SPECIAL:
            if np.dtype(dtype).itemsize != 4 or dtype is np.float32:
                raise self.unknown()
            return f"wave.{SPECIAL[text]}[{self.threads}].view({self.constant(dtype)})"
        if text in self.names.kernel.parameters:
            return self.constant(dtype(PARAMETERS + self.names.kernel.parameters[text]))
        if text in self.names.kernel.shared:
            return self.constant(dtype(SHARED + self.names.kernel.shared[text]))
        return self.constant(self._number("32" if text == "WARP_SZ" else text, dtype))

    def _register(self, name: str, dtype: Dtype, narrow: bool) -> str:
        slot, own = self.names.kernel.registers[name]
        value = f"registers[{slot}][{self.threads}]"
        if own is dtype:
            return value
        size, own_size = np.dtype(dtype).itemsize, np.dtype(own).itemsize
        if np.bool_ not in (own, dtype) and size == own_size:
            return f"{value}.view({self.constant(dtype)})"
        if narrow and size < own_size and dtype is not np.float32:
            return f"{value}.astype({self.constant(dtype)})"
        raise self.unknown()

    def _number(self, text: str, dtype: Dtype) -> np.generic:
        if re.fullmatch(r"0f[0-9a-fA-F]{8}|0d[0-9a-fA-F]{16}", text):
            bits = np.uint32(int(text[2:], 16)) if text.startswith("0f") else np.uint64(int(text[2:], 16))
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text) and dtype not in (np.float32, np.float64):
            number = int(text.rstrip("U"), 0)
            if dtype is np.bool_:
                return np.bool_(number != 0)
            size = np.dtype(dtype).itemsize
            bits = UNSIGNED[size](number % 2 ** (8 * size))
        else:
            raise self.unknown()
        if bits.itemsize != np.dtype(dtype).itemsize:
            raise self.unknown()
        return bits.view(dtype)

    # -- Writing --

    def write(self, value: str, dtype: Dtype | None = None) -> list[str]:
        return [self.write_text(self.operands[0], value, dtype or self.dtype)]

    def write_text(self, name: str, value: str, dtype: Dtype, widen: bool = False) -> str:
        """Assign to a register; ``widen``: it may be a wider one, for which the value is extended."""
        if name == "_":
            return f"_ = {value}"
        if name not in self.names.kernel.registers:
            raise self.unknown()
        slot, own = self.names.kernel.registers[name]
        if own is dtype:
            return f"registers[{slot}][{self.threads}] = {value}"
        size, own_size = np.dtype(dtype).itemsize, np.dtype(own).itemsize
        if np.bool_ not in (own, dtype) and size == own_size:
            return f"registers[{slot}].view({self.constant(dtype)})[{self.threads}] = {value}"
        if widen and size < own_size and np.issubdtype(dtype, np.integer):
            return f"registers[{slot}][{self.threads}] = np.asarray({value}).astype({self.constant(own)})"
        raise self.unknown()

    # -- Addresses --

    def address(self, position: int, threads: str | None = None) -> tuple[str, str]:
        """Return which memory an operand in brackets names itself (parameters, shared, or any), and the address."""
        found = re.fullmatch(r"\[\s*([%\w$.]+?)\s*(?:\+\s*(-?\w+))?\s*\]", self.operands[position])
        if found is None:
            raise self.unknown()
        base, offset = found[1], int(found[2] or "0", 0)
        kernel = self.names.kernel
        if base in kernel.parameters:
            return "parameters", self.constant(np.uint64(PARAMETERS + kernel.parameters[base] + offset))
        if base in kernel.shared:
            return "shared", self.constant(np.uint64(SHARED + kernel.shared[base] + offset))
        if base not in kernel.registers or np.dtype(kernel.registers[base][1]).itemsize not in (4, 8):
            raise self.unknown()
        slot, own = kernel.registers[base]
        value = f"registers[{slot}][{threads or self.threads}]"
        if np.dtype(own).itemsize == 4:
            value = f"{value}.view(np.uint32).astype(np.uint64)"
        else:
            value = f"{value}.view(np.uint64)"
        return "any", f"({value} + {self.constant(np.uint64(offset % 2**64))})" if offset else value
