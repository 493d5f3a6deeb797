"""Loops whose timesteps are on a device: steps read none of its values, and copy nothing to it.

The device is torch's ``meta``, whose values cannot be read; samples are on the CPU, where kernels run.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.counted_loops import CASES
from tests.support.scheduler_pair import SHAPE, diffusers, fused, randn, set_steps, steps_of

SERVED = [case for case in CASES if not case.startswith(("dpm sde", "cosine"))]
"""But those of Brownian motion, whose noise is torchsde's."""
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_to_copy", "copy_", "lift_fresh", "scalar_tensor")


class Note(TorchDispatchMode):
    """Note torch's operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))

    def waits(self):
        return [name for name in self.names if name.split("::")[1].split(".")[0] in WAITS]


def run(scheduler, options, note=None):
    """Return a loop's last sample; ``note``: the steps but the first, which makes the loop's table."""
    set_steps(scheduler, 8, device="meta")
    x, generator = randn(*SHAPE), torch.Generator().manual_seed(0)
    options = dict(options)
    if "generator" in scheduler.step.__code__.co_varnames:
        options["generator"] = generator
    for number, t in enumerate(steps_of(scheduler)):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        output = torch.tanh(torch.cat([x, 0.5 * x]))
        if note is None or number == 0:
            x = scheduler.step(output, t, x, return_dict=False, guidance_scale=3.0, **options)[0]
        else:
            with note:
                x = scheduler.step(output, t, x, return_dict=False, guidance_scale=3.0, **options)[0]
    return x


@pytest.mark.parametrize("case", SERVED)
def test_steps_do_not_wait(case):
    name, config, options = CASES[case]
    scheduler = getattr(fused, name)(**config)
    with torch.no_grad():
        first = run(scheduler, options)
        note = Note()
        assert torch.equal(run(scheduler, options, note), first)
    assert any(each.startswith("fastguide::") for each in note.names)
    assert not note.waits()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler", "LCMScheduler"])
def test_diffusers_would(name):
    """So the test above has teeth."""
    scheduler = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    set_steps(scheduler, 8)
    scheduler.timesteps = scheduler.timesteps.to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):
        scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE))


def test_a_copy_would_be_noted():
    note = Note()
    with note:
        torch.zeros(3).to(torch.float64)
        torch.zeros(1).item()
    assert len(note.waits()) == 2
