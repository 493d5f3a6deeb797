"""The command ``fastguide``: ``info`` says what this installation can do, ``demo`` shows it, ``bench`` measures it."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ._version import __version__
from .step.backends.registry import BACKENDS, default_backend

_DEMO_MODULES = ("sklearn", "matplotlib", "tqdm", "safetensors", "numpy")
_OPTIONAL_PACKAGES = ("diffusers", "scikit-learn", "matplotlib", "tqdm", "safetensors", "triton")


def info() -> str:
    """Versions, which backends serve which devices and why others do not, and which optional packages are there."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = [
        f"fastguide {__version__}, torch {torch.__version__} ({torch.get_num_threads()} threads), "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "",
        "backends:",
    ]
    for backend in BACKENDS.values():
        served = ", ".join(d for d in devices if backend.serves(d)) or "nothing here"
        lines.append(f"  {backend.name:<10} serves {served}: {backend.status}")
    lines += ["", "default:", *(f"  {device:<10} {_default(device)}" for device in devices)]
    lines += ["", "optional packages:"]
    for package in _OPTIONAL_PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"  {package:<12} {version}")
    return "\n".join(lines)


def _default(device: str) -> str:
    try:
        return default_backend(device)
    except ValueError as error:
        return f"none: {error}"


def _bench(options: argparse.Namespace) -> int:
    from benchmarks import run

    try:
        unknown = [suite for suite in options.only if suite not in run.SUITES]
        if unknown:
            raise ValueError(f"--only: expected some of {', '.join(run.SUITES)}, got {unknown[0]!r}")
        return run.main(
            options.device,
            full=options.full,
            suites=options.only,
            names=options.workload,
            json=options.json,
            compare=options.compare,
            output=options.output,
        )
    except (ValueError, OSError) as error:
        print(f"fastguide: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfastguide: interrupted", file=sys.stderr)
        return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with the given arguments (those of the process by default); returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastguide", description="Guided diffusion sampling in one fused kernel.")
    parser.add_argument("--version", action="version", version=f"fastguide {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which backends there are and why others are not")
    demo = commands.add_parser("demo", help="train on scikit-learn's digits, sample every class with every guidance")
    demo.add_argument("--quick", action="store_true", help="smaller models and fewer samples: half a minute")
    demo.add_argument("--output", type=Path, default=Path("fastguide-demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--retrain", action="store_true", help="train again, even if trained weights are in the cache")
    demo.add_argument("--seed", type=int, default=0, help="of the sampling noise (default: %(default)s)")
    demo.add_argument("--backend", choices=tuple(BACKENDS), help="default: the best for the CPU")
    bench = commands.add_parser("bench", help="time it beside others on this machine: two minutes, and a report")
    bench.add_argument("--full", action="store_true", help="every shape, dtype, solver and guidance: eight minutes")
    bench.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    bench.add_argument("--only", nargs="+", metavar="SUITE", default=[], help="steps, loops, accuracy, growth, methods")
    bench.add_argument("--workload", nargs="+", metavar="NAME", default=[], help="steps and loops whose names begin so")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    bench.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="with an earlier run's numbers, by their ratios"
    )
    bench.add_argument(
        "--output", type=Path, default=Path("fastguide-bench"), metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)

    if options.command == "info":
        print(info())
        return 0
    if options.command == "bench":
        return _bench(options)
    try:
        from .demo.run import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _DEMO_MODULES:
            raise
        print(f'fastguide: the demo needs more packages ({error}): pip install "fastguide[demo]"', file=sys.stderr)
        return 1
    if options.backend is not None and not BACKENDS[options.backend].serves("cpu"):
        print(f"fastguide: backend {options.backend}: {BACKENDS[options.backend].status}", file=sys.stderr)
        return 1
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"fastguide: --output: expected a folder that can be written, got {error}", file=sys.stderr)
        return 1
    try:
        run(
            options.output,
            quick=options.quick,
            retrain=options.retrain,
            seed=options.seed,
            backend=options.backend,
        )
    except KeyboardInterrupt:
        print("\nfastguide: interrupted; what is finished stays in the cache and the output folder", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
