"""The hot launches execute no more instructions than was committed, and have enough bytes in flight."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from benchmarks.machine_code import figures
from benchmarks.machine_code.__main__ import table, why_not
from benchmarks.machine_code.launches import HOT
from benchmarks.machine_code.sass import compiler
from fastguide.step.backends import native

pytestmark = pytest.mark.xdist_group("machine code")


@cache
def now():
    return figures.measure(native.LIBRARY)


@pytest.fixture
def committed():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"nothing can be counted: {reason}")
    before = figures.committed()
    used = compiler(native.LIBRARY, before["architecture"])
    if used != before["compiler"]:
        pytest.skip(f"counts depend on the compiler: they are those of {before['compiler']}, the library's is {used}")
    return before


def test_no_hot_launch_executes_more_than_was_committed(committed):
    """After a change that should cost more: ``python -m benchmarks.machine_code --write``."""
    found = figures.worse(now(), committed)
    assert not found, "\n".join(found)


def test_hot_launches_spill_nothing_and_access_16_bytes(committed):
    for label, found in now().items():
        assert (found.spilled, found.narrowest) == (0, 16), label


def test_what_is_committed_is_of_the_launches_of_today():
    assert list(figures.committed()["launches"]) == [launch.label for launch in HOT]


def test_the_documentation_shows_these_figures(committed):
    """The committed ones, of which counts may have fallen since."""
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text()
    assert figures.record(native.LIBRARY, now()) == committed, "renew: python -m benchmarks.machine_code --write"
    assert table(now()).partition("\n\n")[0] in page, "renew the table in docs/performance.md"


def test_what_is_worse_is_named():
    """Five percent are allowed; 48 kB are needed, or what there was if that is less."""
    label = "2 predictions, no noise, float32"
    base = figures.Figures("kernel", 1000, 8, 96, 16, 62, 0, 0, 8, 60 * 1024, {})
    before = {"launches": {label: {"instructions": 2000, "elements": 16, "registers": 62, "in_flight": 60 * 1024}}}
    assert figures.worse({label: base._replace(instructions=1050)}, before) == []
    slow = figures.worse({label: base._replace(instructions=1051)}, before)
    assert slow == [
        f"{label}: 1051 instructions for 8 elements, 5.1% above 1000",
        "if that is as it should be: python -m benchmarks.machine_code --write",
    ]
    few = figures.worse({label: base._replace(registers=128, in_flight=40 * 1024)}, before)
    assert few[0] == f"{label}: 128 registers leave 40 kB in flight, less than 48 kB"
    before["launches"][label]["in_flight"] = 30 * 1024
    assert figures.worse({label: base._replace(in_flight=30 * 1024)}, before) == []
    assert "less than 30 kB" in figures.worse({label: base._replace(in_flight=29 * 1024)}, before)[0]
    assert figures.worse({}, before)[0] == f"other launches are committed: ['{label}']"


def test_figures_are_written_and_read(committed, tmp_path):
    file = tmp_path / "counts.json"
    figures.write(native.LIBRARY, now(), file)
    assert figures.committed(file).keys() == committed.keys()
    assert figures.worse(now(), json.loads(file.read_text())) == []
