"""A drop-in scheduler's step returns diffusers' types, and computes the predicted original only when it is read."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastguide
from tests.support.scheduler_pair import NAMES, SHAPE, STEPS, assert_close, fused, pair, randn


def test_types_and_values_of_outputs():
    for name in NAMES:
        ours, theirs = pair(name)
        ours.set_timesteps(STEPS)
        theirs.set_timesteps(STEPS)
        x, output, t = randn(*SHAPE), randn(*SHAPE, seed=1), ours.timesteps[3]
        results = []
        for scheduler in (ours, theirs):
            torch.manual_seed(0)
            result = scheduler.step(output, t, x)
            torch.manual_seed(0)
            results.append((result, scheduler.step(output, t, x, return_dict=False)))
        (got, got_pair), (expected, expected_pair) = results
        assert isinstance(got, type(expected))
        assert isinstance(got_pair, tuple)
        assert len(got_pair) == 2
        for ours_, theirs_ in zip(
            (*got_pair, got[0], got.prev_sample), (*expected_pair, expected[0], expected[0]), strict=True
        ):
            assert_close(ours_, theirs_)
        assert [name for name, _ in got.items()] == list(expected.keys())
        assert type(got) is type(expected)


READS = {
    "attribute": lambda o: o.pred_original_sample,
    "name": lambda o: o["pred_original_sample"],
    "number": lambda o: o[1],
    "tuple": lambda o: o.to_tuple()[1],
    "dictionary": lambda o: dict(o)["pred_original_sample"],
    "unpacked dictionary": lambda o: {**o}["pred_original_sample"],
    "copy": lambda o: copy.deepcopy(o).pred_original_sample,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)).pred_original_sample,
    "values": lambda o: list(o.values())[1],
    "pytree": lambda o: torch.utils._pytree.tree_leaves(o)[1],
    "pytree, unflattened": lambda o: torch.utils._pytree.tree_map(lambda x: x, o).pred_original_sample,
}
PAIR_READS = {  # of a tuple of two, whose second has no memory until it is read
    "arithmetic": lambda o: o[1] + 0,
    "unpacking": lambda o: (lambda a, b: b.clone())(*o),
    "a function of tensors": lambda o: torch.stack(o)[1],
    "concatenation of tuples": lambda o: (1, *o, *o)[4].clone(),
    "numpy": lambda o: torch.from_numpy(o[1].numpy()),
    "writing to it": lambda o: o[1].mul_(1),
    "copy": lambda o: copy.deepcopy(o)[1],
    "pickle": lambda o: pickle.loads(pickle.dumps(o))[1],
    "pytree": lambda o: torch.utils._pytree.tree_leaves(o)[1].clone(),
}


@pytest.mark.parametrize(("return_dict", "read"), [(True, r) for r in READS] + [(False, r) for r in PAIR_READS])
def test_the_predicted_original_is_computed_when_it_is_read(return_dict, read, monkeypatch):
    computed = []
    real = fastguide.diffusers.scheduler_step.guided_step

    def spy(*arguments, **keywords):
        computed.append(keywords.get("original") is not None)
        return real(*arguments, **keywords)

    monkeypatch.setattr("fastguide.diffusers.scheduler_step.guided_step", spy)
    scheduler = fused.DDPMScheduler()
    scheduler.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    result = scheduler.step(output, scheduler.timesteps[2], x, return_dict=return_dict)
    if return_dict:
        assert result.prev_sample is result[0] is result["prev_sample"]
    else:
        assert type(result) is tuple
        assert (result[1].shape, result[1].dtype, len(result)) == (SHAPE, torch.float32, 2)
    assert computed == [False]
    got = (READS if return_dict else PAIR_READS)[read](result)
    assert computed == [False, True]
    a = scheduler.alphas_cumprod[scheduler.timesteps[2]]
    torch.testing.assert_close(got, ((x - (1 - a).sqrt() * output) / a.sqrt()).clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_an_original_whose_inputs_have_changed_is_refused():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    x = randn(*SHAPE)
    result = scheduler.step(0.1 * x, scheduler.timesteps[2], x)
    x.zero_()
    for _ in range(2):  # and the output stays what it is
        with pytest.raises(RuntimeError, match="pred_original_sample: expected the inputs of its step as they were"):
            _ = result.pred_original_sample
        assert result[0] is result.prev_sample


@pytest.mark.parametrize("changed", ["sample", "output", "gradient", "timesteps"])
def test_every_input_is_watched(changed):
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    inputs = {"sample": randn(*SHAPE), "output": randn(*SHAPE, seed=1), "gradient": randn(*SHAPE, seed=2)}
    inputs["timesteps"] = torch.full(SHAPE[:1], 83)
    step = (inputs["output"], inputs["timesteps"], inputs["sample"])
    result = scheduler.step(*step, gradient=inputs["gradient"])
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="got one changed"):
        _ = result.pred_original_sample


def test_the_original_of_inference_tensors_is_computed_at_once():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with torch.inference_mode():
        x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
        expected = scheduler.step(output, 83, x.clone()).pred_original_sample
        results = scheduler.step(output, 83, x), scheduler.step(output, 83, x, return_dict=False)
        x.zero_()
        assert torch.equal(results[0].pred_original_sample, expected)
        assert torch.equal(results[1][1], expected)


def test_an_output_keeps_what_is_put_into_it():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    result = scheduler.step(randn(*SHAPE), scheduler.timesteps[2], randn(*SHAPE))
    result.prev_sample = torch.zeros(1)
    assert torch.equal(result["prev_sample"], torch.zeros(1))
    assert not hasattr(result, "of_no_scheduler")
    assert list(result.keys()) == ["prev_sample", "pred_original_sample"]


NOT_READS = {
    "keys": (lambda o: list(o.keys()), ["prev_sample", "pred_original_sample"]),
    "iteration": (list, ["prev_sample", "pred_original_sample"]),
    "reversed": (lambda o: list(reversed(o)), ["pred_original_sample", "prev_sample"]),
    "len": (len, 2),
    "in": (lambda o: ("prev_sample" in o, "pred_original_sample" in o, "x" in o), (True, True, False)),
    "get": (lambda o: (o.get("prev_sample") is o[0], o.get("x", 3)), (True, 3)),
    "from the end": (lambda o: o[-2] is o[0], True),
    "a slice": (lambda o: o[:1][0] is o[0], True),
    "setting the sample": (lambda o: setattr(o, "prev_sample", 7) or (o[0], o["prev_sample"]), (7, 7)),
    "an item": (lambda o: o.__setitem__("prev_sample", 7) or o.prev_sample, 7),
    "setting the original": (lambda o: setattr(o, "pred_original_sample", 7) or tuple(o.values())[1], 7),
    "an attribute of the user's": (lambda o: setattr(o, "x", 7) or o.x, 7),
}


@pytest.mark.parametrize("use", NOT_READS)
def test_what_does_not_read_the_original_does_not_compute_it(use):
    """So it raises no error about an original whose sample has been written to."""
    scheduler, theirs = pair("DDIMScheduler")
    results = []
    for each in (scheduler, theirs):
        each.set_timesteps(STEPS)
        x = randn(*SHAPE)
        results.append(each.step(0.1 * x, scheduler.timesteps[2], x))
        x.zero_()
    function, expected = NOT_READS[use]
    assert [function(result) for result in results] == [expected, expected]


def test_an_original_is_computed_after_the_sample_was_set():
    scheduler, theirs = pair("DDIMScheduler")
    originals = []
    for each in (scheduler, theirs):
        each.set_timesteps(STEPS)
        result = each.step(randn(*SHAPE, seed=1), scheduler.timesteps[2], randn(*SHAPE))
        result.prev_sample = torch.zeros(1)
        result.x = 7
        originals.append(result.pred_original_sample)
        assert (result[0].shape, result.x) == ((1,), 7)
    assert_close(*originals)


def test_out_of_range_is_refused_as_diffusers_does():
    scheduler, theirs = pair("DDIMScheduler")
    for each in (scheduler, theirs):
        each.set_timesteps(STEPS)
        result = each.step(randn(*SHAPE, seed=1), scheduler.timesteps[2], randn(*SHAPE))
        with pytest.raises(IndexError):
            result[2]
        with pytest.raises(KeyError):
            result["x"]
