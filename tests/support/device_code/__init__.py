"""The GPU kernels on the host: compiles device_code.cpp once for each version of it, and steps CPU tensors with it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
NAME = "fastguide_device_code"
FLAGS = "-std=c++17 -O2 -g0 -ffp-contract=off -fno-strict-aliasing -fPIC -shared -fvisibility=hidden -Wall -Wextra"
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/arguments.h


class Float64Error(TypeError):
    """Of arguments that only a CPU's kernel takes."""


def compiler() -> str | None:
    """The C++ compiler's command, as setup.py finds it."""
    return os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def why_not() -> str | None:
    """What is missing here to compile it; None: nothing."""
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    if compiler() is None:
        return "no C++ compiler was found"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"{header} is not there"


def module() -> ModuleType:
    """The compiled module; an error, compiled for only once, if its sources are wrong."""
    found = _module()
    if isinstance(found, str):
        raise RuntimeError(f"the GPU's code does not compile for the host:\n{found}")
    return found


@functools.cache
def _module() -> ModuleType | str:
    """From a folder of temporary files that keeps it until its sources, flags or torch change; or what was wrong."""
    includes = [
        HERE,
        CSRC,
        Path(torch.__file__).parent / "include",
        sysconfig.get_paths()["include"],
    ]
    flags = [*FLAGS.split(), *(f"-I{path}" for path in includes[:2]), *(f"-isystem{path}" for path in includes[2:])]
    command = [*shlex.split(compiler() or ""), *flags, str(HERE / "device_code.cpp")]
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cu")])
    key = hashlib.sha256(repr((command, version, torch.__version__, sysconfig.get_platform())).encode())
    for source in sources:
        key.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"{NAME}_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    library = folder / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as place:  # another process may be doing the same
            built = Path(place) / library.name
            run = subprocess.run([*command, "-o", str(built)], stderr=subprocess.PIPE, text=True)
            if run.returncode != 0:
                return run.stderr
            built.replace(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def arguments_of(
    out: Tensor,
    original: Tensor | None,
    staged: Tensor | None,
    sample: Tensor,
    predictions: list[Tensor],
    rows: Tensor,
    weights: Tensor,
    index: int,
    indices: Tensor | None = None,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    philox: Tensor | None = None,
    philox_threads: int = 0,
    cursor: Tensor | None = None,
    timestep: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
) -> dict:
    """The operator's arguments as csrc/binding/operator.cpp makes plain data of them; the tensors have to outlive it.

    ``philox`` is seed and offset, or, with a third value, the state that the kernel moves on.
    """
    tensors = [out, original, staged, sample, gradient, variance, noise, rows, weights, *predictions]
    tensors += [mask, known, known_noise]
    if any(t is not None and t.dtype not in ELEMENTS for t in tensors) or rows.dtype != torch.float32:
        raise Float64Error("the GPU kernel takes no float64")
    batch, inner = out.shape[0], out.stride()[1:]
    for t in (out, original, staged, sample, gradient, variance, noise, mask, known, known_noise, *predictions):
        assert t is None or out.numel() == 0 or _same_layout(t, out.shape[1:], inner)

    def plain(t: Tensor) -> tuple[int, int, int]:
        return t.data_ptr(), t.stride(0), ELEMENTS[t.dtype]

    together = weights.shape[2] - 1
    if len(predictions) == 1 and together > 1:
        predictions = list(predictions[0].tensor_split(together))
    assert weights.shape[2] == max(len(predictions), 1) + 1
    assert rows.is_contiguous()
    assert weights.stride(2) == 1
    arguments = {
        "predictions": [plain(p) for p in predictions],
        "batch": batch,
        "elements_per_sample": out[:1].numel(),
        "rows": rows.data_ptr(),
        "steps": rows.shape[0],
        "weights": weights.data_ptr(),
        "weights_step_stride": weights.stride(0) if weights.shape[0] > 1 else 0,
        "weights_batch_stride": weights.stride(1) if weights.shape[1] > 1 else 0,
        "index": index,
    }
    named = {"out": out, "original": original, "staged": staged, "sample": sample, "gradient": gradient}
    named |= {"variance": variance, "noise": noise, "mask": mask, "known": known, "known_noise": known_noise}
    for name, t in named.items():
        if t is not None:
            arguments[name] = plain(t)
    if cursor is not None:
        arguments["cursor"] = cursor.data_ptr()
        arguments["cursor_stride"] = cursor.stride(0) if len(cursor) > 1 else 0
    if timestep is not None:
        arguments["timestep"] = timestep.data_ptr()
        arguments["timestep_element"] = [torch.int64, torch.float32].index(timestep.dtype)
        arguments["timestep_count"] = timestep.numel()
    if staged is not None:
        arguments["staged_copies"] = staged.shape[0] // batch if batch else 0
    for name, t in (("indices", indices), ("seeds", seeds)):
        if t is not None:
            arguments[name] = t.data_ptr()
            arguments[f"{name}_stride"] = t.stride(0) if t.dim() else 0
    if philox is not None:
        arguments["threads"] = philox_threads
        if len(philox) == 3:
            arguments["state"] = philox.data_ptr()
        else:
            seed, arguments["offset"] = philox.tolist()
            arguments["seed"] = seed % 2**64
    if (seeds is not None or philox is not None) and out.numel() and not out[0].is_contiguous():
        assert out[0].movedim(0, -1).is_contiguous()
        arguments["channels"] = out.shape[1]
    return arguments


def guided_step(*arguments: object, order: int = 1) -> int:
    """One step on CPU tensors with the operator's arguments; returns how many accesses of 16 bytes it made.

    Blocks and threads run in an order that follows from ``order``.
    """
    plain = arguments_of(*arguments)
    return module().launch(plain, order, None) if plain["batch"] * plain["elements_per_sample"] else 0


def _same_layout(tensor: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> bool:
    pairs = zip(shape, tensor.stride()[1:], strides, strict=True)
    return tensor.shape[1:] == shape and all(size <= 1 or ours == theirs for size, ours, theirs in pairs)
