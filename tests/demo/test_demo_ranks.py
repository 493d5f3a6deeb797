"""Test the demo by two processes: its sampling is shared, and the first one alone prints and writes."""

from __future__ import annotations

import json
import socket

import pytest

for package in ("matplotlib", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(package)

from tests.support import rank_demo, ranks  # noqa: E402

pytestmark = pytest.mark.xdist_group("ranks")  # one server forks the processes of all


def test_two_processes_share_the_sampling_of_the_demo(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (printed, rows), (nothing, as_many) = ranks.run(2, rank_demo.demo, tmp_path, port)
    assert "sampling: shared by 2 process(es)" in printed
    assert "classifier-free" in printed
    assert nothing == ""
    assert rows == as_many == 2 * 120 // 2  # two predictions, half of the samples
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == 2
    assert [row["family"] for row in results["methods"]] == ["none", "classifier, epsilon form", "classifier-free"]
    assert (tmp_path / "trade-off.png").stat().st_size > 10_000
