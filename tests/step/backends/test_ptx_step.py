"""The native library's GPU kernels, interpreted from their PTX: right to the bit, and without races.

A subset of all cases, which ``python -m tests.support.ptx`` runs.
"""

from __future__ import annotations

import re

import pytest

from tests.support import device_code
from tests.support.ptx import listed
from tests.support.ptx.cases import NOISES
from tests.support.ptx.far import FarCase, FarStep, run_far
from tests.support.ptx.faults import FAULTS
from tests.support.ptx.memory import Memory
from tests.support.ptx.placement import Placement
from tests.support.ptx.step import Comparison

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
FEW = listed.few()


@pytest.fixture(scope="module")
def memory():
    return Memory()


def failures(comparison: Comparison) -> str:
    return "\n".join(f"{case}\n    {wrong[0]}" for case, wrong in comparison.totals.failures)


@pytest.mark.parametrize("noise", NOISES)
def test_steps_are_right(library, memory, noise):
    comparison = Comparison(library.prepare, memory=memory)
    for case in FEW:
        if case.noise == noise and case.cursor != "per sample":
            comparison.run(case)
    assert not comparison.totals.failures, failures(comparison)
    assert comparison.totals.compared_with_host > 0 or noise == "torch"


def test_steps_with_a_cursor_of_each_sample_are_right(library, memory):
    comparison = Comparison(library.prepare, memory=memory)
    for case in FEW:
        if case.cursor == "per sample":
            comparison.run(case)
    assert not comparison.totals.failures, failures(comparison)


def test_these_cases_run_every_kernel(library, memory):
    assert {library.prepare(Placement(memory, case).arguments, case).name for case in FEW} == library.kernels


@pytest.mark.parametrize(
    "case",
    [
        FarCase(2**32 + 1029),
        FarCase(1029, 3, 2**30 + 5, "given"),
        FarCase(2**34 + 4104, noise="portable", channels=8),
        FarCase(2**31 - 8, noise="torch"),
        FarCase(2**31 + 2056, noise="torch"),
    ],
    ids=str,
)
def test_elements_far_from_the_beginning(library, memory, case):
    assert run_far(memory, library, case) == []


def test_a_product_of_32_bits_is_found(library, memory):
    """Where a tile begins is more than 32 bits count."""
    case = FarCase(2**32 + 1029)
    kernel = device_code.record(FarStep(memory, case).plain).kernel
    narrow = r"\1{ .reg .b32 %narrow; mul.lo.u32 %narrow, \3, \4; cvt.u64.u32 \2, %narrow; }"
    product = re.compile(r"(shl\.b32 %r\d+, %r\d+, 10;\s+)mul\.wide\.u32 (%rd\d+), (%r\d+), (%r\d+);")
    assert product.search(library.module.sources[library.mangled[kernel]])
    changed = library.changed(kernel, lambda text: product.sub(narrow, text))
    assert "written 0 to 1 times" in run_far(memory, changed, case)[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_is_found(library, memory, fault):
    """The case is right without it."""
    comparison = Comparison(library.prepare, memory=memory)
    assert comparison.run(fault.case) == []
    kernel = library.prepare(Placement(memory, fault.case).arguments, fault.case).name
    wrong = Comparison(library.changed(kernel, fault.change).prepare, memory=memory).run(fault.case)
    assert wrong
    assert any(fault.found in text for text in wrong), wrong
    assert not any(text.startswith("error") for text in wrong), wrong


def test_a_fault_that_cannot_be_planted_is_an_error():
    with pytest.raises(ValueError, match="the PTX has no"):
        FAULTS[0].change(".visible .entry kernel() { ret; }")
