"""The compiled backend: loads ``_native.so``, the operator for the CPU and for GPUs, or explains why it cannot."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...guidance.encoded import MOST_TERMS, MOST_VALUES
from ...guidance.symbols import OPERATIONS
from ...solvers.table import ROW_COLUMNS
from ..call import Call, Facts, Objects
from ..operator import THRESHOLD_WORDS, StepArguments
from .registry import Backend

LIBRARY = Path(__file__).parents[2] / "_native.so"
NOT_BUILT_NOTE = LIBRARY.with_suffix(".txt")
"""The file that ``setup.py`` writes instead of the library, with the reason."""

CAPABILITIES = ("baseline", "avx2", "avx512")
CAPABILITY_VARIABLE = "FASTGUIDE_CPU_CAPABILITY"

GRADIENT_TILE = 1024
"""Elements of a sample whose part of the gradients of weights the CUDA kernel adds up: csrc/kernels/gpu/backward.h."""

_EXPORTS = (
    "fastguide_row_columns",
    "fastguide_arguments",
    "fastguide_gradients",
    "fastguide_gradient_tile",
    "fastguide_operations",
    "fastguide_program_terms",
    "fastguide_program_values",
    "fastguide_group_elements",
    "fastguide_group_terms",
    "fastguide_threshold_words",
    "fastguide_cpu_capability",
    "fastguide_cuda_code",
    "fastguide_driver_too_old",
    "fastguide_gpu_predictions",
    "fastguide_record_bytes",
    "fastguide_python_functions",
    "fastguide_call",
    "fastguide_facts",
    "fastguide_objects",
)
_ARGUMENT_TYPES = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "OptionalTensor",
    "List[Tensor]": "TensorList",
    "int": "Integer",
}
"""The schema's types of the operator's arguments, and what ``csrc/kernels/arguments.h`` calls them."""

_library: ctypes.CDLL | None = None


def backend() -> Backend:
    """Load the library and describe the backend; without the library, it serves no device."""
    global _library
    if not LIBRARY.exists() and NOT_BUILT_NOTE.exists():
        return _unavailable(f"not built: {NOT_BUILT_NOTE.read_text().strip()}")
    try:
        _library = _load()
    except OSError as error:
        problem = "there, but cannot be loaded" if LIBRARY.exists() else "not there"
        reason = f"{problem}: {_explain(str(error.__cause__ or error))}"
        warnings.warn(f"fastguide: the native backend is {reason}", stacklevel=2)
        return _unavailable(reason, broken=True)
    _library.fastguide_cuda_code.restype = ctypes.c_char_p
    wanted = os.environ.get(CAPABILITY_VARIABLE)
    if wanted is not None:
        if wanted in CAPABILITIES:
            set_cpu_capability(wanted)
        else:
            message = f"{CAPABILITY_VARIABLE}: expected one of {CAPABILITIES}, got {wanted!r}; nothing is bounded"
            warnings.warn(f"fastguide: {message}", stacklevel=2)
    bound = f" (bounded by {CAPABILITY_VARIABLE}={wanted})" if wanted in CAPABILITIES else ""
    code = cuda_code()
    on_gpus = not code.startswith("none") and torch.version.hip is None
    if on_gpus and _library.fastguide_driver_too_old():
        on_gpus = False
        code += ", of no use here: the driver is older than its CUDA runtime; update it, or take the Triton backend"
    return Backend(
        name="native",
        step=torch.ops.fastguide.guided_step.default,
        devices=("cpu", "cuda") if on_gpus else ("cpu",),
        status=f"C++, instruction set {cpu_capability()}{bound}; CUDA code: {code}",
        torch_stream=on_gpus,
        makes_weights=("cpu", "cuda") if on_gpus else ("cpu",),
        group_elements=_library.fastguide_group_elements() if on_gpus else 0,
        group_terms=_library.fastguide_group_terms() if on_gpus else 0,
        checks_overlap=True,
        backward=guided_step_backward,
        clipped=torch.ops.fastguide.guided_step_clipped.default,
        squares=torch.ops.fastguide.guided_step_squares.default,
        repeats=True,
        most_predictions=_library.fastguide_gpu_predictions(),
    )


def guided_step_backward(*arguments: Any, **gradients: Any) -> None:
    """Write the gradients of a step's inputs; the arguments are those of the operator of this name.

    What the tiles of a GPU's kernel leave for the weights, torch adds up, on one GPU in the same order each time.
    """
    operator, columns = torch.ops.fastguide.guided_step_backward.default, gradients.get("grad_weights")
    out = StepArguments(*arguments).out
    if columns is None or out.device.type == "cpu":
        operator(*arguments, **gradients)
        return
    tiles = -(-out[:1].numel() // GRADIENT_TILE)
    parts = columns.new_empty(len(columns), tiles, columns.shape[1])
    operator(*arguments, **gradients | {"grad_weights": parts})
    torch.sum(parts, 1, out=columns)


def _load() -> ctypes.CDLL:
    """Load the library and register its operator in torch.

    Raises:
        OSError: it is damaged, another library, or of another version.
    """
    size = LIBRARY.stat().st_size
    with LIBRARY.open("rb") as file:
        head = file.read(64)
    if head[:6] == b"\x7fELF\x02\x01":  # 64 bits, little-endian; the section headers are last
        whole = 64
        if len(head) == 64:
            start, (entry, count) = struct.unpack_from("<Q", head, 40)[0], struct.unpack_from("<HH", head, 58)
            whole = start + entry * count
        if size < whole:  # loading it would end the process
            raise OSError(f"{LIBRARY}: file too short: {size} bytes of {whole}")
    found = ctypes.CDLL(str(LIBRARY))
    missing = [name for name in _EXPORTS if not hasattr(found, name)]
    if missing:
        raise OSError(f"{LIBRARY}: another library, or another version: it has no {missing[0]}")
    _check_list(found.fastguide_row_columns, ROW_COLUMNS)
    arguments = torch.ops.fastguide.guided_step.default._schema.arguments
    _check_list(found.fastguide_arguments, [f"{_ARGUMENT_TYPES[str(a.type)]} {a.name}" for a in arguments])
    backward = torch.ops.fastguide.guided_step_backward.default._schema.arguments[len(arguments) :]
    _check_list(found.fastguide_gradients, [f"{_ARGUMENT_TYPES[str(a.type)]} {a.name}" for a in backward])
    _check_list(found.fastguide_operations, tuple(OPERATIONS))
    _check_number(found.fastguide_program_terms, MOST_TERMS)
    _check_number(found.fastguide_program_values, MOST_VALUES)
    _check_number(found.fastguide_threshold_words, THRESHOLD_WORDS)
    _check_number(found.fastguide_gradient_tile, GRADIENT_TILE)
    _check_list(found.fastguide_call, Call._fields)
    _check_list(found.fastguide_facts, Facts._fields)
    _check_list(found.fastguide_objects, Objects._fields)
    torch.ops.load_library(str(LIBRARY))
    return found


def _check_list(exported: Any, expected: Sequence[str]) -> None:
    """Compare a list of this package with that of the library, whose kernels read memory by it.

    Raises:
        OSError: they differ.
    """
    exported.restype = ctypes.c_char_p
    got = exported().decode().removesuffix(",").split(",")
    for ours, theirs in itertools.zip_longest(expected, got):
        if ours != theirs:
            raise OSError(
                f"{LIBRARY}: another library, or another version: "
                f"{exported.__name__}: expected {ours or 'nothing more'}, got {theirs or 'nothing more'}"
            )


def _check_number(exported: Any, expected: int) -> None:
    got = exported()
    if got != expected:
        raise OSError(
            f"{LIBRARY}: another library, or another version: {exported.__name__}: expected {expected}, got {got}"
        )


def cuda_code() -> str:
    """Name what the library's GPU kernels were compiled for, such as ``sm_80 PTX 80``; or ``none: `` and the reason."""
    code: bytes = _loaded().fastguide_cuda_code()
    return code.decode()


def cpu_capability() -> str:
    """Name the instruction set that the CPU kernel uses: ``baseline``, ``avx2`` or ``avx512``."""
    return CAPABILITIES[_loaded().fastguide_cpu_capability(-1)]


def set_cpu_capability(capability: str) -> str:
    """Choose the CPU kernel's instruction set, for tests and comparisons.

    The environment variable ``FASTGUIDE_CPU_CAPABILITY`` does the same at import.

    Args:
        capability: one of ``CAPABILITIES``.

    Returns:
        The one in use: at most the best that the processor has.

    Raises:
        ValueError: ``capability`` is another name.
        RuntimeError: the native backend is not available.
    """
    if capability not in CAPABILITIES:
        raise ValueError(f"capability: expected one of {CAPABILITIES}, got {capability!r}")
    return CAPABILITIES[_loaded().fastguide_cpu_capability(CAPABILITIES.index(capability))]


def record_words(predictions: int) -> int:
    """Return how long a record of so many predictions is, in words of 64 bits."""
    size: int = _loaded().fastguide_record_bytes(predictions)
    return -(-size // 8)


class PythonFunctions(NamedTuple):
    """The functions of csrc/binding/repeat.cpp and draw.cpp, which get Python's objects."""

    attach: Callable[..., Any]
    describe: Callable[..., Any]
    repeat: Callable[..., Any]
    follow: Callable[..., Any]
    is_watched: Callable[[], Any]
    fill_normals: Callable[[Any, Any, bool], Any]
    pass_normals: Callable[[Any, int, bool], Any]
    trust_draws: Callable[[bool], Any]


class _Definition(ctypes.Structure):
    """``PyMethodDef`` of Python's C API."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("documentation", ctypes.c_char_p),
    )


def python_functions() -> PythonFunctions | None:
    """Return the library's functions for Python; ``None`` without the library."""
    if _library is None:
        return None
    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    make = kind(("PyCFunction_NewEx", ctypes.pythonapi))
    definitions = (_Definition * len(PythonFunctions._fields)).in_dll(_library, "fastguide_python_functions")
    named = {definition.name.decode(): make(ctypes.addressof(definition), None, None) for definition in definitions}
    return PythonFunctions(**named)


def _loaded() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError("the native backend is not available; fastguide info says why")
    return _library


def _explain(error: str) -> str:
    """Put what a loader's error means before the error."""
    if "undefined symbol" in error:
        meaning = (
            f"torch {torch.__version__} lacks what it was built for, or this file was altered; "
            "install fastguide again, with a torch that its wheel names"
        )
    elif "GLIBC" in error or "CXXABI" in error:  # and GLIBCXX
        meaning = (
            "it was built on a newer system than this; build it here, in a checkout: "
            "pip install --no-build-isolation -e ."
        )
    elif "file too short" in error:
        meaning = "it was not copied whole; install fastguide again"
    elif "ELF" in error or "mach-o" in error:
        meaning = f"it is no library for {platform.system()} on {platform.machine()}; install fastguide again"
    else:
        meaning = "install fastguide again (in a checkout: pip install --no-build-isolation -e .)"
    return f"{meaning} ({error})"


def _unavailable(status: str, *, broken: bool = False) -> Backend:
    return Backend("native", torch.ops.fastguide.guided_step.default, (), status, broken=broken)
