"""A step with a history writes the next model input on the way: not a bit of the rest changes by that."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, History, guided_step

SHAPE = (3, 2, 700)  # several blocks of the CPU's kernel a sample, of which the last is short


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("staged_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("predictions", [1, 2])
def test_staged_inputs_of_a_history(predictions, copies, dtype, staged_dtype, backend, generator):
    table = fastguide.lms(fastguide.NoiseSchedule.scaled_linear(), 6)
    guidance = ClassifierFree(3.0) if predictions == 2 else None
    in_scales = table.in_scales[1:]
    sample = torch.randn(SHAPE, dtype=dtype, generator=generator)
    alone, beside = History(table, sample), History(table, sample)
    staged = torch.empty(copies * SHAPE[0], *SHAPE[1:], dtype=staged_dtype)
    for call in range(len(table)):
        outputs = torch.randn(predictions, *SHAPE, dtype=dtype, generator=generator).unbind()
        expected = guided_step(table, call, sample, outputs, guidance, history=alone, backend=backend)
        sample = guided_step(table, call, sample, outputs, guidance, history=beside, staged=staged, backend=backend)
        assert torch.equal(sample, expected)
        assert torch.equal(beside.entries, alone.entries)
        scale = torch.tensor(in_scales[call], dtype=dtype)
        assert torch.equal(staged, (scale * sample).to(staged_dtype).repeat(copies, 1, 1))
