"""Runs the GPU kernels on the host: compiles device_code.cpp once for each version of it, and steps CPU tensors."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import fastguide  # noqa: F401  (defines the operator)
from tests.support.machine_code import demangled

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
NAME = "fastguide_device_code"
FLAGS = (
    "-std=c++17 -Og -g0 -ffp-contract=off -fno-strict-aliasing -fPIC -shared -fvisibility=hidden "
    "-Wall -Wextra -Werror=switch"
)
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/maths/element.h
NAMES = [argument.name for argument in torch.ops.fastguide.guided_step.default._schema.arguments]


class Float64Error(TypeError):
    """An argument is float64, which only a CPU's kernel takes."""


def compiler() -> str | None:
    """Find the C++ compiler's command, as setup.py does."""
    return os.environ.get("CXX") or next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def why_not() -> str | None:
    """Name what this machine lacks to compile the code; None: nothing."""
    if sys.platform != "linux":
        return "it is compiled on Linux only"
    if compiler() is None:
        return "no C++ compiler was found"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"{header} is not there"


def module() -> ModuleType:
    """Return the compiled module; wrong sources are compiled once, and are an error at every call."""
    found = _module()
    if isinstance(found, str):
        raise RuntimeError(f"the GPU's code does not compile for the host:\n{found}")
    return found


@functools.cache
def _module() -> ModuleType | str:
    """Load the module from a temporary folder; compile it if sources, flags or torch changed; or return the error."""
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
    with _alone(folder / "lock"):
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                built = Path(place) / library.name
                run = subprocess.run([*command, "-o", str(built)], stderr=subprocess.PIPE, text=True)
                if run.returncode != 0:
                    return run.stderr
                built.replace(library)
    spec = importlib.util.spec_from_file_location(NAME, library)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds the lock: the tests run in several, of which one compiles for all."""
    import fcntl  # of Unix alone; why_not says so

    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def arguments_of(*arguments: object) -> dict:
    """Make plain data of the operator's arguments, as csrc/binding/operator.cpp does; the tensors have to outlive it.

    Those left out at the end are None. ``philox`` is seed and offset, or, with a third value, the state that the kernel
    advances.
    """
    assert len(arguments) <= len(NAMES)
    a = SimpleNamespace(**dict(itertools.zip_longest(NAMES, arguments)))
    elementwise = {name: getattr(a, name) for name in (*module().inputs, *module().outputs)}
    tensors = [t for t in (*elementwise.values(), *a.predictions) if t is not None]
    if any(t.dtype not in ELEMENTS for t in (*tensors, a.rows, a.weights)) or a.rows.dtype != torch.float32:
        raise Float64Error("the GPU kernel takes no float64")
    batch, numel = a.out.shape[0], a.out.numel()
    for t in tensors:
        assert numel == 0 or _same_layout(t, a.out.shape[1:], a.out.stride()[1:])
    stacked = a.weights.shape[2] - 1
    predictions = list(a.predictions[0].tensor_split(stacked)) if len(a.predictions) == 1 < stacked else a.predictions
    assert a.weights.shape[2] == max(len(predictions), 1) + 1
    assert a.rows.is_contiguous()
    assert a.weights.stride(2) == 1
    plain = {name: described(t) for name, t in elementwise.items() if t is not None}
    plain |= {
        "predictions": [described(p) for p in predictions],
        "staged_copies": a.staged.shape[0] // batch if a.staged is not None and batch else 0,
        "history_slots": a.history.shape[0] // batch if a.history is not None and batch else 0,
        "batch": batch,
        "elements_per_sample": a.out[:1].numel(),
        "rows": a.rows.data_ptr(),
        "steps": a.rows.shape[0],
        "weights": a.weights.data_ptr(),
        "weights_step_stride": a.weights.stride(0) if a.weights.shape[0] > 1 else 0,
        "weights_batch_stride": a.weights.stride(1) if a.weights.shape[1] > 1 else 0,
        "index": a.index,
    }
    if a.inverse_thresholds is not None:
        plain |= {
            "inverse_thresholds": a.inverse_thresholds.data_ptr(),
            "inverse_thresholds_stride": a.inverse_thresholds.stride(0),
        }
    return plain | _position_of(a) | _noise_of(a) | _program_of(a, len(predictions))


def described(t: Tensor) -> tuple[int, int, int]:
    """Return a tensor's address, batch stride and dtype."""
    return t.data_ptr(), t.stride(0), ELEMENTS[t.dtype]


def _per_sample(name: str, t: Tensor | None) -> dict:
    return {} if t is None else {name: t.data_ptr(), f"{name}_stride": t.stride(0) if t.dim() else 0}


def _position_of(a: SimpleNamespace) -> dict:
    plain = _per_sample("indices", a.indices)
    if a.cursor is not None:
        plain |= {"cursor": a.cursor.data_ptr(), "cursor_stride": a.cursor.stride(0) if len(a.cursor) > 1 else 0}
    if a.timestep is not None:
        element = [torch.int64, torch.float32].index(a.timestep.dtype)
        plain |= {"timestep": a.timestep.data_ptr(), "timestep_element": element, "timestep_count": a.timestep.numel()}
    return plain


def _program_of(a: SimpleNamespace, predictions: int) -> dict:
    if a.program is None:
        return {}
    steps, samples, numbers = a.parameters.shape
    return {
        "program": a.program.data_ptr(),
        "program_words": a.program.shape[1],
        "program_stride": a.program.stride(0) if len(a.program) > 1 else 0,
        "parameters": a.parameters.data_ptr(),
        "num_parameters": numbers,
        "parameters_step_stride": a.parameters.stride(0) if steps > 1 else 0,
        "parameters_batch_stride": a.parameters.stride(1) if samples > 1 else 0,
        "made": a.made.data_ptr(),
        "weighs_sample": a.made.shape[1] > predictions + 1,
        "scratch": a.scratch.data_ptr(),
        "groups": max(len(a.made) // max(len(a.out), 1), 1),
    }


def _noise_of(a: SimpleNamespace) -> dict:
    plain = _per_sample("seeds", a.seeds)
    if a.philox is not None:
        plain["threads"] = a.philox_threads
        if len(a.philox) == 3:
            plain["state"] = a.philox.data_ptr()
        else:
            seed, plain["offset"] = a.philox.tolist()
            plain["seed"] = seed % 2**64
    if (a.seeds is not None or a.philox is not None) and a.out.numel() and not a.out[0].is_contiguous():
        assert a.out[0].movedim(0, -1).is_contiguous()
        plain["channels"] = a.out.shape[1]
    return plain


def guided_step(*arguments: object, order: int = 1, **how: object) -> int:
    """Step CPU tensors with the operator's arguments; return the number of accesses of 16 bytes.

    ``order`` is the seed of the order in which blocks and threads run; ``how`` is as ``record_all`` takes it.
    """
    plain = {**arguments_of(*arguments), **how}
    return module().launch(plain, order, None) if plain["batch"] * plain["elements_per_sample"] else 0


class Recorded(NamedTuple):
    """A launch of a GPU kernel: its name as in machine_code.py, its grid, the bytes of its parameters, its clusters."""

    kernel: str
    blocks: int
    threads: int
    parameters: bytes
    cluster: int = 1
    """The blocks of one."""


def record(plain: dict) -> Recorded:
    """Return the launch that a step makes of ``arguments_of``'s data, and run nothing."""
    return record_all(plain)[-1]


def record_all(plain: dict) -> list[Recorded]:
    """Return all launches that a step makes: before its own, that of what makes its weights, unless one makes both.

    ``plain`` may name a ``device`` of cuda_runtime.h, ``most_parts`` of a sample for which one launch makes both, and
    whether one does of groups: ``step_groups``.
    """
    return [as_recorded(launch) for launch in module().record(plain)]


def as_recorded(launch: tuple) -> Recorded:
    """Name the kernel of a launch that the module has recorded."""
    offset, *how = launch
    return Recorded(_kernels()[offset], *how)


@functools.cache
def _kernels() -> dict[int, str]:
    """Name the kernels by their places in the module's library."""
    listed = subprocess.run(["nm", module().__file__], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"^([0-9a-f]+) [tT] (\S+_kernel\S+)$", listed, flags=re.M)
    names = demangled([name for _, name in symbols])
    return {int(place, 16): name for (place, _), name in zip(symbols, names, strict=True)}


def _same_layout(tensor: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> bool:
    pairs = zip(shape, tensor.stride()[1:], strides, strict=True)
    return tensor.shape[1:] == shape and all(size <= 1 or ours == theirs for size, ours, theirs in pairs)
