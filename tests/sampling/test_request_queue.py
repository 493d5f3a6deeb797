"""Test the example of the documentation that serves a queue of requests, with two processes of torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_of_torchrun_answer_a_queue():
    """The example itself compares the bits with those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(ROOT / "docs/examples/request_queue.py")],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    answered = re.findall(r"^rank (\d) has answered (\d+) requests$", run.stdout, re.M)
    assert [rank for rank, _ in answered] == ["0", "1"]
    assert sum(int(count) for _, count in answered) == 12
    assert min(int(count) for _, count in answered) >= 4  # each goes to who has the most free slots
