"""A callback, or a pipeline, may hand a loop's sample back in another layout: the loop goes on from it."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, pair, randn, set_steps, steps_of

NAMES = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "IPNDMScheduler",
    "EulerDiscreteScheduler",
    "SASolverScheduler",
    "CogVideoXDPMScheduler",
]


def with_gaps(x):
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "gaps": with_gaps,
    "a part": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "contiguous": torch.Tensor.contiguous,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_layouts_change_from_step_to_step(name, dtype):
    results = []
    for scheduler in pair(name):
        set_steps(scheduler, 8)
        x, samples, old, generator = randn(*SHAPE), [], None, torch.Generator().manual_seed(0)
        x = LAYOUTS["transposed"](x)
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for number, (t, change) in enumerate(zip(steps_of(scheduler), [*LAYOUTS.values()] * 3, strict=False)):
            output = torch.tanh(0.5 * x).to(dtype)
            if name.startswith("Cog"):
                back = scheduler.timesteps[number - 1] if number else None
                x, old = scheduler.step(output, old, t, back, x, return_dict=False, **options)
            else:
                x = scheduler.step(output, t, x, return_dict=False, **options)[0]
            samples.append(x)
            x = change(x)
        results.append(torch.stack(samples))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert (results[0] - results[1]).norm() <= tolerance * results[1].norm()


@pytest.mark.parametrize("name", [name for name in NAMES if name[:4] in ("Heun", "LMSD", "PNDM", "SASo")])
def test_a_copy_goes_on_in_another_layout(name):
    results = []
    for scheduler in pair(name, **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})):
        set_steps(scheduler, 5)
        scheduler.is_scale_input_called = True
        x, generator = randn(*SHAPE), torch.Generator().manual_seed(0)
        options = {"generator": generator} if name.startswith("SA") else {}
        for number, t in enumerate(steps_of(scheduler)):
            if number == 2:
                scheduler, x = copy.deepcopy(scheduler), LAYOUTS["transposed"](x)
            x = scheduler.step(torch.tanh(0.5 * x), t, x, return_dict=False, **options)[0]
        results.append(x)
    assert (results[0] - results[1]).norm() <= 1e-4 * results[1].norm()
