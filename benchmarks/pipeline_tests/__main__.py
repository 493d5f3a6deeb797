"""The command ``python -m benchmarks.pipeline_tests``: run diffusers' pipeline tests accelerated, and report."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage.sources import pipeline_classes
from benchmarks.report.machine import machine

from .findings import examined
from .hub import write_hub
from .runs import Setting, run
from .summaries import brief, reached, summary, with_setting

_IN_ORDER_OF_USE = """
    stable_diffusion stable_diffusion_2 stable_diffusion_xl stable_diffusion_3 flux flux2 wan qwenimage ltx ltx2 sana
    pixart_alpha hunyuan_video hunyuan_video1_5 hunyuandit cogvideo z_image lumina lumina2 aura_flow kandinsky
    kandinsky2_2 kandinsky3 kandinsky5 stable_audio latent_consistency_models
"""
_FIRST = _IN_ORDER_OF_USE.split()
_EXPRESSION = (
    "(inference or batch or callback or save_load_local or dict_tuple or num_images or cfg or test_output) "
    "and not offload and not float16 and not half_precision"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process.

    Returns:
        The exit status: 1 if a test fails accelerated alone, or outputs, errors or counts of steps differ; 2 for an
        option that cannot be used.
    """
    options = _parser().parse_args(arguments)
    tests = options.diffusers / "tests" / "pipelines"
    if not tests.is_dir():
        print(f"benchmarks.pipeline_tests: expected a checkout of diffusers, got no folder {tests}", file=sys.stderr)
        return 2
    present = sorted(path.name for path in tests.iterdir() if any(path.glob("test_*.py")))
    wanted = options.folders or sorted(present, key=lambda name: (name not in _FIRST, present.index(name)))
    if not set(wanted) <= set(present):
        print(f"benchmarks.pipeline_tests: expected folders of {present}, got {options.folders}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as hub:
        write_hub(Path(hub))
        setting = Setting(options.diffusers.resolve(), Path(hub), options.k, options.limit)
        report = _report(setting, wanted, options)
    print(json.dumps({name: value for name, value in report["summary"].items() if name != "not called"}, indent=1))
    if options.brief is not None:
        options.brief.write_text(json.dumps(brief(report), indent=1) + "\n")
    found = report["summary"]
    differ = (found[f"{what} that differ"] for what in ("calls", "errors", "counts"))
    return int(bool(found["tests"].get("broken") or any(differ)))


def _report(setting: Setting, wanted: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run what the file has not yet, and write it after each process."""
    kept = json.loads(options.json.read_text()) if options.json.exists() else {}
    folders = reached(kept.get("folders", {}))
    made = [cls.__name__ for cls in pipeline_classes()]
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")) | _versions()}
    report |= {"expression": setting.expression, "folders": folders}
    missing = [name for name in wanted if name not in folders or options.again]
    for start in range(0, len(missing), options.together):
        group = [f"tests/pipelines/{name}" for name in missing[start : start + options.together]]
        found = examined(functools.partial(run, setting), group, plain_too=options.plain_too)
        named = {path.rpartition("/")[2]: findings for path, findings in found.items()}
        folders |= with_setting(named, report["machine"], setting.expression)
        report["summary"] = summary(folders, made)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{', '.join(group)}: {summary(found, made)['tests']}", file=sys.stderr, flush=True)
    report["summary"] = summary(folders, made)
    return report


def _versions() -> dict[str, str]:
    """Return the versions of what makes and changes the models of the tests."""
    return {package: importlib.metadata.version(package) for package in ("transformers", "peft")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline_tests",
        description="Run diffusers' pipeline tests with accelerated pipelines, and compare with plain ones.",
    )
    parser.add_argument("diffusers", type=Path, help="a checkout of diffusers, of the installed version")
    parser.add_argument("--folders", nargs="+", metavar="FOLDER", help="of tests/pipelines; by default all of them")
    parser.add_argument("-k", default=_EXPRESSION, metavar="EXPRESSION", help="choose tests, as pytest's -k does")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="run N folders in a process (1)")
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="of each process (900)")
    parser.add_argument("--plain-too", action="store_true", help="run all tests plain, not only those that fail")
    parser.add_argument("--again", action="store_true", help="run folders again that the file has already")
    parser.add_argument(
        "--json", type=Path, default=Path("pipeline-tests.json"), metavar="FILE", help="the report, which goes on there"
    )
    parser.add_argument("--brief", type=Path, metavar="FILE", help="write each folder's numbers, without its tests")
    return parser


if __name__ == "__main__":
    sys.exit(main())
