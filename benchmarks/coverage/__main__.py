"""The command ``python -m benchmarks.coverage``: say which of diffusers' pipelines are served and fused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers

from . import page
from .rows import installed_rows, served_names, shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process.

    Returns:
        The exit status: 2 for an option that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description="Say which of diffusers' pipelines have a default scheduler that is served and guidance that is "
        "fused, by reading their source: fifteen seconds.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    parser.add_argument(
        "--also", nargs="+", metavar="SCHEDULER", default=[], help="count these classes of diffusers as served, too"
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options.json, options.also)
    except (ValueError, OSError) as error:
        print(f"benchmarks.coverage: {error}", file=sys.stderr)
        return 2


def _run(file: Path | None, also: Sequence[str]) -> int:
    for name in also:
        if not isinstance(getattr(diffusers, name, None), type):
            raise ValueError(f"--also: expected a scheduler of diffusers', got {name!r}")
    if file is not None:
        file.touch()
    rows = installed_rows({*served_names(), *also})
    print(page.report(rows))
    if file is not None:
        found = {
            "diffusers": diffusers.__version__,
            "shares": dataclasses.asdict(shares(rows)),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
