"""The command ``fastguide``: ``info`` tells what this installation can do, and ``demo`` shows it."""

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
from .step.torch_normals import is_torch_s

_DEMO_MODULES = ("sklearn", "matplotlib", "tqdm", "safetensors", "numpy")
_OPTIONAL_PACKAGES = ("diffusers", "scikit-learn", "matplotlib", "tqdm", "safetensors", "triton")


def info() -> str:
    """Return the versions, the backends with their state on each device, and the optional packages, as text."""
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
    lines += ["", f"torch's noise on the CPU: drawn by {'the library' if is_torch_s() else 'torch'}"]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments, by default those of the process, and return the exit status."""
    parser = argparse.ArgumentParser(prog="fastguide", description="Guided diffusion sampling in one fused kernel.")
    parser.add_argument("--version", action="version", version=f"fastguide {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="show the versions, the backends and the optional packages")
    demo = commands.add_parser("demo", help="train on scikit-learn's digits, and sample each class with each guidance")
    demo.add_argument("--quick", action="store_true", help="train for less time and sample less: half a minute")
    demo.add_argument("--output", type=Path, default=Path("fastguide-demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument(
        "--without-training", action="store_true", help="only the figures of problems in closed form: a few seconds"
    )
    demo.add_argument("--retrain", action="store_true", help="train even if trained models are in the cache")
    demo.add_argument("--seed", type=int, default=0, help="seed of the sampling noise (default: %(default)s)")
    demo.add_argument("--backend", choices=tuple(BACKENDS), help="default: the fastest on this CPU")
    options = parser.parse_args(arguments)

    if options.command == "info":
        print(info())
        return 0
    return _demo(options)


def _demo(options: argparse.Namespace) -> int:
    try:
        from .demo.ranks import is_first, started
        from .demo.run import closed_form, run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _DEMO_MODULES:
            raise
        needed = "matplotlib and scikit-learn"
        print(f"fastguide: the demo needs more packages ({error}): install {needed}", file=sys.stderr)
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
        with started() as mesh:
            if not options.without_training:
                run(
                    options.output,
                    quick=options.quick,
                    retrain=options.retrain,
                    seed=options.seed,
                    backend=options.backend,
                    mesh=mesh,
                )
            elif is_first(mesh):
                closed_form(options.output)
    except KeyboardInterrupt:
        print(
            "\nfastguide: interrupted; finished models stay in the cache, finished pictures in --output",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
