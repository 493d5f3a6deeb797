"""Make a drop-in scheduler and diffusers' own, and run loops over either."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import fastguide.diffusers as fused  # noqa: E402
from fastguide.diffusers import schedulers  # noqa: E402

NAMES = list(schedulers.__all__)
"""Those whose rows are training timesteps."""
COUNTED = [name for name in fused.__all__ if name.endswith("Scheduler") and name not in NAMES]
"""Those that count their steps."""
STEPS = 12
SHAPE = (2, 3, 8, 8)


def pair(name, **config):
    """Return the drop-in and diffusers' own."""
    return getattr(fused, name)(**config), getattr(diffusers, name)(**config)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def model(x, t):
    return torch.tanh(0.4 * x + 0.001 * t)


def loop(scheduler, x, *, learned=False, dtype=None, generator=None, **options):
    """Return a picture, and the predicted originals of all steps."""
    originals = []
    for t in scheduler.timesteps:
        output = model(x, t)
        output = torch.cat([output, output.flip(1) * 0.9], 1) if learned else output
        result = scheduler.step(output if dtype is None else output.to(dtype), t, x, generator=generator, **options)
        x = result.prev_sample
        originals.append(result.pred_original_sample)
    return x, torch.stack(originals)


def assert_close(ours, theirs, tolerance=1e-5):
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
