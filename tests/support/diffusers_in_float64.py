"""diffusers' own schedulers in float64, and whole loops over one beside a step table of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import fastguide

diffusers = pytest.importorskip("diffusers", reason="diffusers is the specification, and is not installed")

SHAPE = (2, 3, 6, 5)
SCALE = 3.0
TOLERANCE = 1e-10


class _InFloat64:
    """A module in whose names float32 is float64."""

    def __init__(self, module, wide):
        self._module = module
        self.float32 = wide

    def __getattr__(self, name):
        return getattr(self._module, name)


@contextmanager
def in_float64(scheduler_class: type) -> Iterator[None]:
    """Let a scheduler's module compute in float64: its torch.float32 and np.float32, and torch's default dtype."""
    module, default = sys.modules[scheduler_class.__module__], torch.get_default_dtype()
    names = {"torch": _InFloat64(torch, torch.float64), "np": _InFloat64(np, np.float64)}
    before = {name: getattr(module, name) for name in names if hasattr(module, name)}
    for name in before:
        setattr(module, name, names[name])
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for name, value in before.items():
            setattr(module, name, value)


def model(x, t, condition):
    """A fixed nonlinear model of sample, timestep and condition."""
    return torch.tanh(0.7 * x + 0.3 * condition + torch.sin(torch.as_tensor(t, dtype=torch.float64) / 50)) - 0.2 * x


def relative(ours, theirs):
    """The relative error in the L2 norm."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)).item()


def largest_error(table, name, config, set_timesteps, *, step=None, begin=0, draws_at_the_end=False, unused_draws=()):
    """Run the scheduler of that name and our table over the same model, noise and guidance; compare all that both see.

    Every model input, every timestep, every sample, and the predicted x_0 where the scheduler gives one. The first
    sample is ``init_noise_sigma`` times a standard normal one, or, from call ``begin`` on, an arbitrary one; the
    table is of all calls, or of those from there on.
    ``draws_at_the_end``: the last call draws noise, multiplies it by 0, and so leaves the generator further on than a
    table does, whose last row adds none. ``unused_draws``: the calls of the table that draw and do not use it.
    """
    scheduler_class = getattr(diffusers, name)
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    noise = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with in_float64(scheduler_class):
        scheduler = scheduler_class(**config)
        scheduler.set_timesteps(**set_timesteps)
        if begin:
            scheduler.set_begin_index(begin)
        start = float(getattr(scheduler, "init_noise_sigma", 1.0))
        reference = _run_theirs(scheduler, start * noise, begin, theirs, step or {})
    if len(table) == len(scheduler.timesteps):
        assert table.init_noise_sigma == pytest.approx(start, rel=1e-12)
        table = table[begin:]
    assert table.init_noise_sigma == pytest.approx(1.0 if begin else start, rel=1e-12)
    assert len(table) == len(scheduler.timesteps) - begin
    mine = _run_ours(table, start * noise, ours, unused_draws)
    if draws_at_the_end:
        torch.randn(SHAPE, dtype=torch.float64, generator=ours)
    assert torch.equal(ours.get_state(), theirs.get_state()), "the generators are not at the same place"
    assert len(mine) == len(reference)
    told = [abs(ours[1] - theirs[1]) / max(abs(theirs[1]), 1) for ours, theirs in zip(mine, reference, strict=True)]
    seen = [
        relative(ours[part], theirs[part])
        for ours, theirs in zip(mine, reference, strict=True)
        for part in (0, 2, 3)
        if theirs[part] is not None
    ]
    return max(told + seen)


def _run_theirs(scheduler, x, begin, generator, options):
    seen = []
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps[begin:]:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        uncond, cond = model(given, t, 0.0), model(given, t, 1.0)
        prediction = uncond + SCALE * (cond - uncond)
        more = {"generator": generator} if takes_generator else {}
        output = scheduler.step(prediction, t, x, **more, **options)
        x = output.prev_sample
        seen.append((given, float(t), x, output.get("pred_original_sample")))
    return seen


def _run_ours(table, x, generator, unused_draws):
    seen, given = [], table.first_in_scale * x
    guidance = fastguide.ClassifierFree(SCALE)
    history = fastguide.History(table, x) if table.history_slots else None
    for call, t in enumerate(table.host_timesteps):
        predictions, staged, original = [model(given, t, 0.0), model(given, t, 1.0)], *torch.empty(2, *x.shape).to(x)
        outputs = {"original": original, "staged": staged}
        x = fastguide.guided_step(
            table, call, x, predictions, guidance, generator=generator, **outputs, history=history, backend="reference"
        )
        if call in unused_draws:
            torch.randn(SHAPE, dtype=torch.float64, generator=generator)
        seen.append((given, t, x, original))
        given = staged
    return seen
