"""Threads that share samples: each portion is passed over twice, and what is in between comes between."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.device_code import CSRC, compiler

SOURCE = Path(__file__).resolve().parents[2] / "support" / "team.cpp"
FLAGS = "-std=c++17 -O1 -Wall -Wextra -Werror -pthread"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if (command := compiler()) is None:
        pytest.skip("no C++ compiler was found")
    built = tmp_path_factory.mktemp("team") / "team"
    subprocess.run([*shlex.split(command), *FLAGS.split(), f"-I{CSRC}", str(SOURCE), "-o", str(built)], check=True)
    return built


@pytest.mark.parametrize("begin", ["together", "late", "one by one"])
@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_every_portion_is_passed_over_twice(members, begin, program):
    """Also by one thread, in which all members do their parts one after the other."""
    done = subprocess.run([program, str(members), begin], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
