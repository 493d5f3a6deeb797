"""Triton's kernel, interpreted from the PTX that Triton compiles of it: right, and without races.

A subset of all cases, which ``python -m tests.support.ptx --triton`` runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.processes import ROOT

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.xdist_group("triton code"),
    pytest.mark.skipif(torch.version.hip is not None, reason="torch is AMD's, and so is what Triton compiles"),
]


def test_steps_are_right():
    """In a process that does not interpret: this one does."""
    command = [sys.executable, "-m", "tests.support.ptx", "--triton", "--few"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"^(\d+) kernels were compiled and run", result.stdout, flags=re.M)[1]) >= 15
    assert re.search(r": 0 failed$", result.stdout.strip())
