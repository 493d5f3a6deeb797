"""Steps that are nothing but their noise, so that tests see what a kernel drew."""

from __future__ import annotations

import torch

import fastguide

STEPS = 40
TABLE = fastguide.StepTable.from_columns(
    torch.arange(STEPS).flip(0), {"out_noise": torch.ones(STEPS, dtype=torch.float64)}, name="pure noise"
)


def drawn(seeds, shape, index=0, *, sample=None, **arguments):
    """The noise of a step: the sample is zero, of float32 unless it is given."""
    sample = torch.zeros(shape) if sample is None else sample
    seeds = seeds if isinstance(seeds, torch.Tensor) else torch.tensor(seeds)
    return fastguide.guided_step(TABLE, index, sample, [], seeds=seeds, **arguments)
