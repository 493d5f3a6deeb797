"""Python processes of their own, and copies of the package, for tests of what an installation finds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT / "tests",
    )


def copied_package(folder: Path) -> None:
    """The Python part of the package alone, as an installation without a compiler leaves it."""
    shutil.copytree(ROOT / "fastguide", folder / "fastguide", ignore=shutil.ignore_patterns("_native.*", "__pycache__"))


CODE = """
import torch, fastguide
from fastguide.__main__ import info
print(fastguide.__file__)
table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 5)
x = torch.ones(1, 2)
print(fastguide.guided_step(table, 0, x, [x]).tolist())
print(info())
try:
    fastguide.guided_step(table, 0, x, [x], backend="native")
except ValueError as error:
    print(error)
"""
