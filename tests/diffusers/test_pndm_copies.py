"""PNDM repeats a timestep: a loop that begins at a copy of that may begin at either. Its calls are counted from 0."""

from __future__ import annotations

import pytest
import torch

from tests.support.scheduler_pair import SHAPE, pair, randn


@pytest.mark.parametrize("take", [torch.Tensor.clone, torch.Tensor.int, int], ids=["copy", "another dtype", "number"])
@pytest.mark.parametrize("begin", [0, 1, 2, 3])
def test_loops_begin_where_diffusers_do(begin, take):
    """At the last of them again from the beginning, which is fused."""
    ours, theirs = pair("PNDMScheduler", skip_prk_steps=True, steps_offset=1)
    for first in (begin, begin, 0):
        found = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(8)
            x = randn(*SHAPE)
            for t in scheduler.timesteps[first:]:
                x = scheduler.step(torch.tanh(x), take(t), x, return_dict=False)[0]
            found.append(x)
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert ours._counted.table is not None


@pytest.mark.parametrize("begin", [0, 4, 8])
@pytest.mark.parametrize("again", [0, -1])
def test_a_step_after_the_last_is_refused(begin, again):
    """diffusers goes on with its earlier outputs, which a fused loop has not left there."""
    ours, _ = pair("PNDMScheduler", skip_prk_steps=True)
    ours.set_timesteps(8)
    x = randn(*SHAPE)
    for t in ours.timesteps[begin:]:
        x = ours.step(torch.tanh(x), t, x, return_dict=False)[0]
    for timestep in (ours.timesteps[again], 3):
        with pytest.raises(IndexError, match=f"no more than the {9 - begin} of this loop, .* set_timesteps begins"):
            ours.step(torch.tanh(x), timestep, x)
