"""How tests are dealt out to the processes of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("xdist")

from tests.support.packets import SIZE, PacketScheduling


def test_a_group_s_files_are_one_scope_and_other_tests_go_in_packets():
    scheduling = PacketScheduling.__new__(PacketScheduling)
    scheduling.config, scheduling._packets = SimpleNamespace(rootpath=Path(__file__).parents[1]), {}
    for file in ("test_ptx_step.py", "test_backward_kernel.py"):
        assert scheduling._split_scope(f"tests/step/backends/{file}::test_it[{file}]") == "ptx"
    others = [f"tests/test_packets.py::test_{number}" for number in range(SIZE + 1)]
    assert [scheduling._split_scope(each) for each in others] == ["packet 0"] * SIZE + ["packet 1"]
    assert scheduling._split_scope(others[3]) == "packet 0"
    assert scheduling._split_scope("fastguide/guidance/weights.py::fastguide.guidance.weights") == "packet 1"
