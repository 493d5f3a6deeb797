"""RePaint's scheduler beside diffusers' own: loops that go back and forth, what is known, and the noise of both."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastguide.diffusers import repaint_schedulers
from tests.support import rare_pipelines
from tests.support.diffusers_in_float64 import in_float64
from tests.support.scheduler_pair import SHAPE, diffusers, fused, pair, randn

NAME = "RePaintScheduler"
CONFIGS = [
    {},
    {"eta": 1.0},
    {"eta": 0.4, "clip_sample": False, "beta_schedule": "scaled_linear"},
    {"eta": 0.7, "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
]


def inputs(dtype=torch.float32):
    """Return a first sample, an image, and a mask of one channel with some values in between."""
    mask = (randn(1, 1, *SHAPE[2:], seed=5) > 0).float()
    mask[..., 2] = 0.3
    return [each.to(dtype) for each in (randn(*SHAPE), randn(*SHAPE, seed=4).clamp(-1, 1), mask)]


def loop(scheduler, x, image, mask, generator=None, steps=40):
    """Return all samples and originals of a loop with jumps, as the pipeline makes it."""
    scheduler.set_timesteps(steps, 3, 2)
    last, seen = scheduler.timesteps[0] + 1, []
    for t in scheduler.timesteps:
        if t < last:
            output = torch.tanh(0.5 * x + float(t) / 900)
            result = scheduler.step(output, t, x, image, mask, generator)
            x = result.prev_sample
            seen += [x, result.pred_original_sample]
        else:
            x = scheduler.undo_step(x, last, generator)
            seen.append(x)
        last = t
    return seen


def error(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
    return max(
        ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", CONFIGS)
def test_loops_are_diffusers(config, dtype, monkeypatch):
    """float64 over the same tables in float32; and the generators are at the same place."""
    ours, theirs = pair(NAME, **config)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    expected = loop(theirs, *inputs(dtype), generators[1])
    monkeypatch.setattr(f"diffusers.{NAME}.step", None)
    monkeypatch.setattr(f"diffusers.{NAME}.undo_step", None)
    got = loop(ours, *inputs(dtype), generators[0])
    assert error(got, expected) < 1e-5
    assert torch.equal(*(each.get_state() for each in generators))


@pytest.mark.parametrize("config", CONFIGS)
def test_loops_in_float32_are_as_near_to_float64_as_diffusers(config):
    ours, theirs = pair(NAME, **config)
    with in_float64(diffusers.RePaintScheduler):
        exact = diffusers.RePaintScheduler(**config)
        for name in ("betas", "alphas_cumprod"):
            setattr(exact, name, getattr(theirs, name).double())
    first = [each.double() for each in inputs()]

    def run(scheduler, given, dtype):
        """Make a loop with the same noise, drawn in float32."""
        generator = torch.Generator().manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            if dtype == torch.float64:
                patch.setattr(
                    "diffusers.schedulers.scheduling_repaint.randn_tensor",
                    lambda shape, generator, **how: torch.randn(shape, generator=generator).double(),
                )
            return [each.double() for each in loop(scheduler, *given, generator)]

    exact = run(exact, first, torch.float64)
    got, expected = (run(each, inputs(), torch.float32) for each in (ours, theirs))
    assert error(got, exact) <= 2 * error(expected, exact) + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_of_16_bits_are_nearer_to_float64_than_diffusers(dtype):
    errors = {}
    for t in (300, 50, 0):
        results = []
        for scheduler, wide in zip((*pair(NAME, eta=0.5), diffusers.RePaintScheduler(eta=0.5)), (0, 0, 1), strict=True):
            scheduler.set_timesteps(20)
            x, image, mask = inputs(dtype)
            given = [0.4 * x, x, image, mask]
            with pytest.MonkeyPatch.context() as patch:
                noise = randn(*SHAPE, seed=8).to(dtype)
                for module in (repaint_schedulers, diffusers.schedulers.scheduling_repaint):
                    patch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
                if wide:
                    given = [each.double() for each in given]
                results.append(scheduler.step(given[0], t, *given[1:]).prev_sample)
        assert results[0].dtype == results[1].dtype == dtype
        for name, got in zip(("ours", "theirs"), results, strict=False):
            errors.setdefault(name, []).append((got.double() - results[2]).norm().item())
    assert all(map(float.__lt__, errors["ours"], errors["theirs"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_of_several_timesteps_is_rounded_once(dtype):
    """And is the noise that diffusers draws: the generators are at the same place."""
    results, states = [], []
    for scheduler in pair(NAME):
        generator = torch.Generator().manual_seed(1)
        scheduler.set_timesteps(40)
        results.append(scheduler.undo_step(randn(*SHAPE, dtype=dtype), 100, generator).double())
        states.append(generator.get_state())
    exact, generator = randn(*SHAPE, dtype=dtype).double(), torch.Generator().manual_seed(1)
    for beta in fused.RePaintScheduler().betas[100:125].double():
        noise = torch.randn(SHAPE, dtype=dtype, generator=generator).double()
        exact = (1 - beta).sqrt() * exact + beta.sqrt() * noise
    ours, theirs = ((result - exact).norm() for result in results)
    assert ours < theirs / 8
    assert torch.equal(*states)


def test_the_known_part_is_the_image_in_the_end():
    scheduler = fused.RePaintScheduler(eta=1.0)
    x, image, mask = inputs()
    got = loop(scheduler, x, image, mask.round(), torch.Generator().manual_seed(0))[-2]
    known = mask.round().expand(SHAPE) == 1
    assert torch.equal(got[known], image[known])
    assert (got[~known] - image[~known]).abs().mean() > 0.1


@pytest.mark.parametrize("shape", [SHAPE, (2, 1, 8, 8), (1, 3, 1, 8), (8,), ()])
def test_masks_and_images_that_broadcast(shape):
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(20)
        mask, image = torch.rand(shape, generator=torch.Generator().manual_seed(1)), randn(*SHAPE, seed=2)[:1]
        x = randn(*SHAPE).to(memory_format=torch.channels_last)
        results.append([scheduler.step(0.3 * x, 50, x, image, mask, torch.Generator().manual_seed(1)).prev_sample])
    assert error(*results) < 1e-6


def test_a_mask_that_is_written_to_is_read_anew():
    ours, theirs = pair(NAME)
    x, image, mask = inputs()
    results = {scheduler: [] for scheduler in (ours, theirs)}
    for change in (lambda: None, lambda: mask.fill_(0.6), lambda: None):
        change()
        for scheduler, seen in results.items():
            scheduler.set_timesteps(20)
            seen.append(scheduler.step(0.3 * x, 50, x, image, mask, torch.Generator().manual_seed(1)).prev_sample)
    assert error(*results.values()) < 1e-6


@pytest.mark.parametrize(
    "change",
    [lambda mask: mask.numpy().fill(0), lambda mask: mask.data.mul_(0), lambda mask: setattr(mask, "data", 0 * mask)],
    ids=["numpy", "data", "other data"],
)
def test_a_mask_is_what_it_is_at_each_step(change):
    """However it was written to, and whether torch counts that or not."""
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(20)
        x, image, mask = inputs()
        scheduler.step(0.3 * x, 50, x, image, mask, torch.Generator().manual_seed(1))
        change(mask)
        results.append([scheduler.step(0.3 * x, 50, x, image, mask, torch.Generator().manual_seed(1)).prev_sample])
    assert error(*results) < 1e-6


@pytest.mark.parametrize("in_place", [False, True])
def test_betas_that_are_changed_by_hand_are_noticed(in_place):
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(40)
        generator, x = torch.Generator().manual_seed(1), randn(*SHAPE)
        seen = [scheduler.undo_step(x, 700, generator)]
        if in_place:
            scheduler.betas.mul_(0.2)
        else:
            scheduler.betas = scheduler.betas * 0.2
        results.append([*seen, scheduler.undo_step(x, 700, generator)])
    assert error(*results) < 1e-6


def test_eta_is_what_it_is_at_each_step():
    ours, theirs = pair(NAME)
    results = {scheduler: [] for scheduler in (ours, theirs)}
    x, image, mask = inputs()
    for scheduler, seen in results.items():
        scheduler.set_timesteps(20)
        for eta in (0.0, 1.0, 0.5, 0.0):
            scheduler.eta = eta
            seen.append(scheduler.step(0.3 * x, 500, x, image, mask, torch.Generator().manual_seed(1)).prev_sample)
    assert error(*results.values()) < 1e-6


@pytest.mark.parametrize("steps", [1000, 250, 31, 20])
def test_noise_of_any_number_of_timesteps(steps):
    """Of more than 32, it is diffusers that adds it; and in any layout."""
    results, states = [], []
    for scheduler in pair(NAME):
        generator = torch.Generator().manual_seed(1)
        scheduler.set_timesteps(steps)
        x = randn(2, 8, 8, 6).permute(0, 3, 1, 2)
        results.append([
            scheduler.undo_step(each, t, generator) for each in (x, x[:, ::2]) for t in (700, torch.tensor(0))
        ])  # fmt: skip
        states.append(generator.get_state())
    assert error(*results) < 1e-6
    assert torch.equal(*states)


def test_a_generator_for_each_sample():
    results = []
    for scheduler in pair(NAME, eta=1.0):
        x, image, mask = inputs()
        scheduler.set_timesteps(20)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        x = scheduler.step(0.3 * x, 50, x, image, mask, generators, return_dict=False)[0]
        scheduler.set_timesteps(250)
        results.append([x, scheduler.undo_step(x, 0, generators)])
    assert error(*results) < 1e-6


def test_guidance_is_part_of_the_step():
    ours, theirs = pair(NAME)
    x, image, mask = inputs()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    uncond, cond = 0.3 * x, 0.1 + 0.2 * x
    expected = theirs.step(uncond + 3 * (cond - uncond), 50, x, image, mask, torch.Generator().manual_seed(1))
    got = ours.step(torch.cat([uncond, cond]), 50, x, image, mask, torch.Generator().manual_seed(1), guidance_scale=3.0)
    assert error([got.prev_sample], [expected.prev_sample]) < 1e-6
    assert error([got.pred_original_sample], [expected.pred_original_sample]) < 1e-6


def cases():
    """Yield what is left to diffusers, and the reason."""
    x, image, mask = inputs()
    yield "an image or a mask of torch.float64", {}, (x, image.double(), mask)
    yield "autograd", {}, (x, image, mask.clone().requires_grad_())
    yield "shapes that broadcast, or do not fit", {}, (x[:1], image, mask)
    yield "an eta that is not from 0 to 1, or noise besides a generator", {"eta": 1.01}, (x, image, mask)


@pytest.mark.parametrize("number", range(4))
def test_what_is_left_to_diffusers_is_its_own(number):
    reason, config, (x, image, mask) = list(cases())[number]
    results, (ours, theirs) = [], pair(NAME, **config)
    done = fused.accelerate(diffusers.RePaintPipeline(None, ours))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
        result = scheduler.step(0.3 * x, 50, x, image, mask, torch.Generator().manual_seed(1)).prev_sample
        results.append(result.nan_to_num())  # as with such an eta
    assert torch.equal(*results)
    assert list(done.counts) == [f"left to diffusers: {reason}"]


def test_timesteps_that_are_not_trained_are_diffusers():
    for scheduler in pair(NAME):
        scheduler.set_timesteps(100)
        scheduler.undo_step(randn(*SHAPE), 990)
        with pytest.raises(IndexError, match="out of bounds"):
            scheduler.undo_step(randn(*SHAPE), 991)
        with pytest.raises(NotImplementedError, match="DDPMScheduler"):
            scheduler.add_noise(randn(*SHAPE), randn(*SHAPE), torch.tensor([1, 2]))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_of_a_scheduler_step_alike(how):
    scheduler = fused.RePaintScheduler(eta=1.0)
    expected = loop(scheduler, *inputs(), torch.Generator().manual_seed(0))
    got = loop(how(scheduler), *inputs(), torch.Generator().manual_seed(0))
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("inference", [False, True])
def test_the_pipeline_makes_the_same(inference):
    pipe, given = rare_pipelines.repaint()
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipe(**given, num_inference_steps=7, output_type="np", generator=torch.Generator().manual_seed(2)).images

    before = torch.from_numpy(run())
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": NAME}
    with torch.inference_mode(inference):
        after = run()
    torch.testing.assert_close(torch.from_numpy(after), before, rtol=2e-4, atol=2e-4)
    (counted,) = done.counts.items()
    assert counted == ("fused without guidance", 13)
    fused.restore(pipe)
    assert torch.equal(torch.from_numpy(run()), before)
