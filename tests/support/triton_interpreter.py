"""Triton's interpreter for this process, where there is no GPU; to be imported before anything imports Triton."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def start() -> None:
    """Interpret Triton's kernels on the CPU: rounded to bfloat16 as by hardware, not cut off; and in half the time."""
    if not INTERPRETED:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    _convert_as_hardware_does(interpreter)
    _patch_once_a_launch(interpreter)


def _convert_as_hardware_does(interpreter: ModuleType) -> None:
    plain = interpreter._convert_float

    def convert(data, input_dtype, output_dtype, rounding_mode):
        names = (input_dtype.name, output_dtype.name)
        if names == ("fp32", "bf16"):
            rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16").reshape(data.shape)
        if names == ("bf16", "fp32"):
            values = torch.from_numpy(data.view("int16").copy()).view(torch.bfloat16)
            return values.float().numpy().view("uint32").reshape(data.shape)
        return plain(data, input_dtype, output_dtype, rounding_mode)

    interpreter._convert_float = convert


def _patch_once_a_launch(interpreter: ModuleType) -> None:
    """Exchange Triton's language once for each module in a launch, and not at each call of a function in it.

    The first call of a module's functions exchanges all that is visible in it; the others search it in vain.
    """
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module in patched:
            return None  # of a call within the launch, which does not look at it
        patched.add(module)
        return patch(fn)

    def launch_anew(*arguments, **named):
        patched.clear()
        return launch(*arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
