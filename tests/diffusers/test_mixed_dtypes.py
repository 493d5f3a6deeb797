"""Latents and models of different dtypes: results have diffusers' dtypes, and generators end where diffusers' do."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.support.counted_loops import CASES, first_of, loop
from tests.support.scheduler_pair import pair, randn, set_steps

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}


def outcome(scheduler, case, state, model_dtype, first=None, **how):
    """Return the samples of a loop and its generator's state, or the error that diffusers refuses with."""
    _, _, options = CASES[case]
    generator = torch.Generator().manual_seed(3)
    set_steps(scheduler)
    first = (first_of(scheduler) if first is None else first).to(state)
    try:
        done = loop(scheduler, first, dtype=model_dtype, generator=generator, options=options, steps=5, **how)
    except RuntimeError as error:
        return error, None
    return done, generator.get_state()


def mixtures():
    """Each scheduler's first case in every pair of dtypes; in its others, each dtype of a state and of a model once."""
    seen = set()
    for number, (case, (name, _, _)) in enumerate(CASES.items()):
        for (i, state), (j, model_dtype) in itertools.product(enumerate(DTYPES), repeat=2):
            if name not in seen or (j - i) % 4 == 1 + number % 3:
                yield case, state, model_dtype
        seen.add(name)


@pytest.mark.parametrize(("case", "state", "model_dtype"), list(mixtures()))
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


@pytest.mark.parametrize("case", CASES)
def test_noise_of_sizes_that_torch_draws_in_another_way(case):
    """On the host, torch draws 16 values at a time; those that are left, in each dtype in its own way."""
    name, config, _ = CASES[case]
    first, half = 0.1 * randn(1, 3, 5, 7), torch.bfloat16
    (got, mine), (expected, theirs) = (outcome(each, case, half, half, first) for each in pair(name, **config))
    for (x, _), (y, _) in zip(got, expected, strict=True):
        assert (x.double() - y.double()).norm() <= 0.2 * y.double().norm()  # another noise would be 0.5 and more
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_an_original_says_the_dtype_that_it_has(case, model_dtype):
    """In a tuple, where it is computed when it is asked for."""
    name, config, _ = CASES[case]
    ours, theirs = pair(name, **config)
    (got, _), (expected, _) = (
        outcome(each, case, model_dtype, model_dtype, as_output=False) for each in (ours, theirs)
    )
    for (_, x_0), (_, y_0) in zip(got, expected, strict=True):
        if x_0 is not None:
            assert x_0.dtype == y_0.dtype == (x_0 + 0).dtype


PREDICTS_X0 = ["DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler", "CogVideoXDDIMScheduler", "UnCLIPScheduler"]


@pytest.mark.parametrize("as_output", [True, False])
@pytest.mark.parametrize("name", PREDICTS_X0)
def test_what_a_model_predicts_is_returned_in_its_dtype(name, as_output):
    """At planned steps, and those like them."""
    for state, model_dtype in itertools.product(DTYPES, repeat=2):
        kinds = []
        for scheduler in pair(name, prediction_type="sample"):
            scheduler.set_timesteps(8)
            x, output = randn(2, 3, 4, 4).to(state), randn(2, 3, 4, 4, seed=1).to(model_dtype)
            for t in scheduler.timesteps[2:6]:
                result = scheduler.step(output, t, x, return_dict=as_output)
                prev_sample, original = result.to_tuple() if as_output else result
                kinds.append((prev_sample.dtype, original.dtype, (original + 0).dtype))
        assert kinds[:4] == kinds[4:]


def test_what_a_model_predicts_is_the_original_of_cogvideox_dpm_in_its_dtype():
    for state, model_dtype in itertools.product(DTYPES, repeat=2):
        kinds = []
        for scheduler in pair("CogVideoXDPMScheduler", prediction_type="sample"):
            scheduler.set_timesteps(8)
            x, x_0, before = randn(2, 3, 4, 4).to(state), None, None
            for t in scheduler.timesteps[2:6]:
                x, x_0 = scheduler.step(torch.tanh(x).to(model_dtype), x_0, t, before, x)
                before = t
                kinds.append((x.dtype, x_0.dtype, (x_0 + 0).dtype))
        assert kinds[:4] == kinds[4:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_original_of_a_sample_that_a_step_has_made_wider(dtype):
    """SCM's noise makes it float32: from the second loop on, all of its steps are known from the first."""
    for loops in zip(*(originals_of_three_loops(each, dtype) for each in pair("SCMScheduler")), strict=True):
        for x_0, y_0 in zip(*loops, strict=True):
            assert x_0.dtype == y_0.dtype
            assert (x_0.double() - y_0.double()).norm() <= TOLERANCES[dtype] * y_0.double().norm()


def originals_of_three_loops(scheduler, dtype):
    loops = []
    for _ in range(3):
        set_steps(scheduler, 4)
        x, generator, originals = randn(2, 3, 4, 4).to(dtype), torch.Generator().manual_seed(0), []
        for t in scheduler.timesteps[:-1]:
            output = torch.tanh(0.4 * x).to(dtype)
            x, original = scheduler.step(output, t, x, generator=generator, return_dict=False)
            originals.append(original + 0)
        loops.append(originals)
    return loops
