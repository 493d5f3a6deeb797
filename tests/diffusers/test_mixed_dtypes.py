"""Latents and models of different dtypes: results have diffusers' dtypes, and generators end where diffusers' do."""

from __future__ import annotations

import pytest
import torch

from tests.support.counted_loops import CASES, first_of, loop
from tests.support.scheduler_pair import pair, set_steps

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}


def outcome(scheduler, case, state, model_dtype):
    """Return the samples of a loop and its generator's state, or the error that diffusers refuses with."""
    _, _, options = CASES[case]
    generator = torch.Generator().manual_seed(3)
    set_steps(scheduler)
    try:
        done = loop(
            scheduler, first_of(scheduler).to(state), dtype=model_dtype, generator=generator, options=options, steps=5
        )
    except RuntimeError as error:
        return error, None
    return done, generator.get_state()


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_dtypes_values_and_generators_are_diffusers(case, state, model_dtype):
    """In 16 bits, diffusers rounds where these do not; noise of another dtype would be another noise."""
    name, config, _ = CASES[case]
    (got, mine), (expected, theirs) = (outcome(each, case, state, model_dtype) for each in pair(name, **config))
    if isinstance(expected, RuntimeError):
        return
    assert not isinstance(got, RuntimeError), got
    tolerance = max(TOLERANCES[state], TOLERANCES[model_dtype])
    for (x, x_0), (y, y_0) in zip(got, expected, strict=True):
        assert x.dtype == y.dtype
        assert x_0 is None or x_0.dtype == y_0.dtype
        assert (x.double() - y.double()).norm() <= tolerance * y.double().norm()
    assert torch.equal(mine, theirs)
