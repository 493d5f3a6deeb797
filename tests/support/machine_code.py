"""Reads the GPU kernels' machine code with cuobjdump, which the Triton wheel or the CUDA toolkit brings."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest


def tool() -> str | None:
    """Find cuobjdump."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(bundled) if bundled is not None and bundled.exists() else shutil.which("cuobjdump")


def cuobjdump(*arguments: str | Path) -> str:
    command = tool()
    if command is None:
        pytest.skip("there is no cuobjdump: neither Triton nor a CUDA toolkit that has it is installed")
    return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@functools.lru_cache(maxsize=1)  # tens of megabytes
def disassembly(file: Path, architecture: str) -> str:
    """Disassemble the kernels of one architecture; what was asked for last is kept."""
    return cuobjdump("-sass", "-arch", architecture, file)


def demangled(names: list[str]) -> list[str]:
    """Demangle names and remove namespaces; c++filt leaves what it cannot demangle."""
    out = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"fastguide::|cuda::|\(anonymous namespace\)::|^void ", "", name) for name in out.splitlines()]


class Usage(NamedTuple):
    registers: int
    stack: int
    shared: int
    local: int


def resource_usage(file: Path) -> list[tuple[str, str, Usage]]:
    """List each kernel in each architecture's code: architecture, name, registers and memory of its own."""
    found, architecture, names = [], "", []
    for line in cuobjdump("-res-usage", file).splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            names.append(match[1])
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            found.append((architecture, Usage(*map(int, match.groups()))))
    return [(arch, name, usage) for (arch, usage), name in zip(found, demangled(names), strict=True)]


def instructions(file: Path, architecture: str | None = None) -> dict[str, Counter[str]]:
    """Count each kernel's instructions, by name with suffixes and without operands."""
    code = disassembly(file, architecture) if architecture else cuobjdump("-sass", file)
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in code.splitlines():
        if match := re.match(r"\s+Function : (\S+)", line):
            current = counts.setdefault(match[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.a-z]+)", line):
            current[match[1]] += 1
    return dict(zip(demangled(list(counts)), counts.values(), strict=True))
