"""Triton's kernels, interpreted from the PTX that Triton compiles of them: right, and without races.

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


def output_of(*command):
    """What a process prints that does not interpret: this one does."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", *command]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_steps_are_right():
    output = output_of("tests.support.ptx", "--triton", "--few")
    assert int(re.search(r"^(\d+) kernels were compiled and run", output, flags=re.M)[1]) >= 15
    assert re.search(r": 0 failed$", output.strip())


def test_weights_are_right():
    """In any order of the programs, and in any batch."""
    assert len(re.findall(r"^right: ", output_of("tests.support.ptx.triton_moments"), flags=re.M)) == 3


def test_steps_with_weights_of_groups_are_right():
    """Likewise, and of samples alone."""
    assert len(re.findall(r"^right: ", output_of("tests.support.ptx.triton_groups"), flags=re.M)) == 4
