"""Triton's compiled launcher, over a stand-in for CUDA's driver, gets the pointers of each step, repeated or not."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fastguide.step.backends import native
from tests.test_structure import ROOT

HEADER = Path(sysconfig.get_path("include")) / "Python.h"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(shutil.which("gcc") is None or not HEADER.exists(), reason="Triton compiles its launcher with gcc")
@pytest.mark.skipif(not native.LIBRARY.exists(), reason="the native library is not built; fastguide info says why")
def test_each_step_is_one_launch_with_its_tensors():
    command = [sys.executable, "-m", "benchmarks.triton_host", "--number", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == 3
    for row in found.values():
        assert (row["launches"], row["pointers"]) == (60, True)
