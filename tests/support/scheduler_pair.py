"""Make a drop-in scheduler and diffusers' own, and run loops over either."""

from __future__ import annotations

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import fastguide.diffusers as fused  # noqa: E402

served = fused.served
NAMES = list(served.schedulers.__all__)
"""Those whose rows are training timesteps."""
PLACED = [*served.cogvideox_schedulers.__all__, *served.unclip_schedulers.__all__]
"""Those whose steps go by the timestep and by what they are given."""
_OWN = (served.piflow_schedulers, served.repaint_schedulers, served.rfd4_schedulers, served.ve_schedulers)
APART = [name for module in _OWN for name in module.__all__]
"""Those whose models' outputs, or whose steps' arguments, are like no other's."""
COUNTED = [name for name in fused.__all__ if name.endswith("Scheduler") and name not in NAMES + PLACED + APART]
"""Those that count their steps."""
STEPS = 12
SHAPE = (2, 3, 8, 8)


def set_steps(scheduler, steps=STEPS, **how):
    """Set a number of steps; SCM's scheduler has a default of two only."""
    if type(scheduler).__name__ == "SCMScheduler":
        how["intermediate_timesteps"] = None
    scheduler.set_timesteps(steps, **how)


def steps_of(scheduler):
    """Return the timesteps of the steps; SCM's last one is where the last step ends."""
    return scheduler.timesteps[:-1] if type(scheduler).__name__ == "SCMScheduler" else scheduler.timesteps


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
