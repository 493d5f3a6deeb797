"""Run test files in processes of their own, with a time limit, and read what the plugin recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .calls import Record

_ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Setting:
    """What all runs have in common."""

    diffusers: Path
    """The checkout with the tests."""
    hub: Path
    """The cache in the place of the model hub's."""
    expression: str
    """Which tests, as pytest's ``-k`` takes it."""
    limit: float
    """The seconds that a process may take."""


def run(setting: Setting, mode: str, tests: Sequence[str]) -> tuple[list[Record], str]:
    """Run tests, files or folders in a mode of the plugin.

    Returns:
        The records, and what went wrong with the process as a whole: empty if nothing did.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, listed = Path(folder, "records"), Path(folder, "tests")
        file.touch()
        listed.write_text("\n".join(tests))
        options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "--rootdir", ".", "-p", f"{__package__}.plugin"]
        options += ["--pipelines", mode, "--record", str(file), "-k", setting.expression, f"@{listed}"]
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "pytest", *options],
                cwd=setting.diffusers,
                env=_environment(setting.hub),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=setting.limit,
            )
        except subprocess.TimeoutExpired:
            wrong = f"stopped after {setting.limit:g} s"
        else:
            ran = ended.returncode in (0, 1, 5)  # passed, some failed, none selected
            wrong = "" if ran else f"pytest exited {ended.returncode}: {ended.stdout.decode(errors='replace')[-500:]}"
        lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")], wrong


def _environment(hub: Path) -> dict[str, str]:
    """Return the environment in which the tests find fastguide, this plugin, and the stand-in for the hub alone."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    given = {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**os.environ, **given}


def outcomes(records: Sequence[Record]) -> dict[str, Record]:
    """Return the last outcome of each test: of its call, or of what failed after it."""
    return {record["test"]: record for record in records if "outcome" in record}


def calls(records: Sequence[Record]) -> list[Record]:
    """Return the records of pipelines' calls."""
    return [record for record in records if "pipeline" in record]
