"""Runs an operator's step on a GPU for tensors of the CPU, so that every test with a backend serves the GPU's too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastguide.step.operator import THRESHOLD_WORDS, StepArguments

NO_GPU = None if torch.cuda.is_available() else "there is no GPU"
WRITTEN = ("out", "original", "staged", "cursor", "timestep")


class StepOnGpu:
    """The same memory on the GPU: offsets, strides and what shares memory stay as they are."""

    def __init__(self, step):
        self.step = step

    def __call__(self, *arguments):
        storages = {}

        def moved(value):
            if isinstance(value, list):
                return [moved(v) for v in value]
            if not isinstance(value, Tensor):
                return value
            if value.dtype == torch.float64:
                pytest.skip("the GPU kernels take no float64")
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.cuda()
            there = torch.empty(0, dtype=value.dtype, device="cuda")
            return there.set_(storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride())

        step = StepArguments(*[moved(a) for a in arguments])
        if step.inverse_thresholds is not None and self.step is torch.ops.fastguide.guided_step.default:
            words = torch.zeros(step.sample.shape[0], THRESHOLD_WORDS, device="cuda")
            step = step._replace(inverse_thresholds=words)
        self.step(*step)
        names = [argument.name for argument in torch.ops.fastguide.guided_step.default._schema.arguments]
        for name, tensor in zip(names, arguments, strict=False):
            if name in WRITTEN and tensor is not None:
                tensor.untyped_storage().copy_(storages[tensor.untyped_storage().data_ptr()])
