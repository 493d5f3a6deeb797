"""The Triton kernel compiled ahead of time, without a GPU: wide accesses, no spills, no contraction where it harms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.machine_code import instructions, resource_usage

pytest.importorskip("triton")

pytestmark = pytest.mark.xdist_group("triton code")  # one process compiles for all

MAX_REGISTERS = 128
CASES = {  # of compile_triton.py: the least 16-byte loads and stores of a thread's eight elements, two for float32
    "a mixed pair of predictions": (2 + 1 + 1, 2),
    "16 bits throughout": (4, 1),
    "a ragged sample": (2 + 1 + 1 + 2, 2),
    "portable noise": (2 + 1, 2),
    "torch's noise, one by one": (2 + 1 + 1, 2),
    "torch's noise, shared": (4 * (2 + 1 + 1), 4 * 2),
    "everything": (2 + 4 + 2 + 2, 2 + 2 + 1),
    "float16": (3, 2),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Everything compiled once, in a process that does not interpret."""
    folder = tmp_path_factory.mktemp("triton")
    script = Path(__file__).parents[2] / "support" / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@cache
def counts_of(cubin):
    (counts,) = instructions(cubin).values()
    return counts


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("architecture", [80, 90, 100, 120])
def test_cuda_code(folder, architecture, name):
    cubin = folder / f"{name}.{architecture}.cubin"
    ((_, _, used),) = resource_usage(cubin)
    assert used.registers <= MAX_REGISTERS
    assert used.stack == used.local == 0
    counts = counts_of(cubin)
    assert not any(i.startswith(("LDL", "STL")) for i in counts)
    loads, stores = CASES[name]
    assert sum(n for i, n in counts.items() if re.match(r"LDG\.E(\.\w+)*\.128", i)) >= loads
    assert sum(n for i, n in counts.items() if re.match(r"STG\.E(\.\w+)*\.128", i)) >= stores

    ptx = (folder / f"{name}.{architecture}.ptx").read_text()
    approximations = set(re.findall(r"\b\w+\.approx[.\w]*", ptx)) - {"ex2.approx.ftz.f32"}  # corrected, inside of exp
    of_torch = {"sin.approx.ftz.f32", "cos.approx.ftz.f32"} if name.startswith("torch") else set()
    assert approximations == of_torch
    assert not re.search(r"\b(div|sqrt)\.full", ptx)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("torch")])
@pytest.mark.parametrize("architecture", ["gfx90a", "gfx942"])
def test_amd_code(folder, architecture, name):
    code = (folder / f"{name}.{architecture}.amdgcn").read_text()
    assert "scratch_store" not in code
    assert len(re.findall(r"(?:global|buffer)_load_dwordx4", code)) >= 1
    assert len(re.findall(r"(?:global|buffer)_store_dwordx4", code)) >= 1


JOINED = {  # how many products and sums of an element the formula joins; those of exp and of torch's noise are others
    "a mixed pair of predictions": 4,  # guidance, x0, the next sample twice
    "16 bits throughout": 5,  # and noise
    "a ragged sample": 5,
    "portable noise": 5,  # one prediction; an exact product of the noise
    "a loop's": 6,
    "float16": 6,
    "a known image": 7,  # its level, and the blend
}
ROOTS = {"portable noise": 20, "a loop's": 20, "float16": 20}  # are made of multiply-adds: so many, at most


@pytest.mark.parametrize("name", JOINED)
def test_products_and_sums_are_joined_where_the_formula_says(folder, name):
    """Or a step's bits would depend on its variant, and the portable stream's on the device."""
    least = 8 * JOINED[name]
    for architecture in (80, 90, 100, 120):
        counts = counts_of(folder / f"{name}.{architecture}.cubin")
        joined = sum(n * (2 if i.startswith("FFMA2") else 1) for i, n in counts.items() if i.startswith("FFMA"))
        assert least <= joined <= least + ROOTS.get(name, 0), architecture
    for architecture in ("gfx90a", "gfx942"):
        code = (folder / f"{name}.{architecture}.amdgcn").read_text()
        packed = [bool(p) for p in re.findall(r"\bv_(pk_)?(?:fma|fmac|mac|mad)_f32", code)]
        assert least <= len(packed) + sum(packed) <= least + ROOTS.get(name, 0), architecture
