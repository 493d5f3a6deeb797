"""Callbacks that edit the latents in the middle of a loop: by tensors of their own, or in place."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.support.counted_loops import CASES, first_of, largest_error, loop
from tests.support.scheduler_pair import SHAPE, pair, randn, set_steps

EDITED = (3, 4, 7)
"""The steps after which a callback edits: two that follow each other, and one of another parity."""


def blended(x, number):
    """Exchange the latents by a tensor of its own."""
    return 0.8 * x + 0.2 * randn(*SHAPE, seed=9).to(x) if number in EDITED else x


def in_place(x, number):
    if number in EDITED:
        x.mul_(0.8).add_(0.2 * randn(*SHAPE, seed=9).to(x))
    return x


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("edit", [blended, in_place])
@pytest.mark.parametrize("case", CASES)
def test_edited_latents_are_as_with_diffusers(case, edit, inference):
    """Solvers that go back find the sample that they wrote, not what it has become."""
    name, config, options = CASES[case]
    results = []
    for scheduler in pair(name, **config):
        with torch.inference_mode() if inference else contextlib.nullcontext():
            set_steps(scheduler)
            generator = torch.Generator().manual_seed(3)
            results.append(loop(scheduler, first_of(scheduler), edit=edit, generator=generator, options=options))
    samples = [[(x, None) for x, _ in result] for result in results]
    assert largest_error(*samples) < 1e-5
