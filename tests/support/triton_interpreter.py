"""Triton's interpreter for this process, where there is no GPU; to be imported before anything imports Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def start() -> None:
    """Interpret Triton's kernels on the CPU, with the hardware's rounding to bfloat16 instead of a truncation."""
    if not INTERPRETED:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

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
