"""Models that several pipelines have: each pipeline's guidance is fused, and none keeps a model or another alive."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter

import pytest
import torch

from tests.support.pipelines import FreePipeline
from tests.support.scheduler_pair import diffusers, fused

GUIDED = "fused with guidance"
LATENTS = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))


class OtherPipeline(diffusers.DiffusionPipeline):
    """Of another class, with code of its own."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet, scheduler=diffusers.DDIMScheduler(clip_sample=False))

    @torch.no_grad()
    def __call__(self, latents, steps):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            uncond, cond = self.unet(latents, t)[0].chunk(2)
            latents = self.scheduler.step(cond + 2.0 * (cond - uncond), t, latents, return_dict=False)[0]
        return latents


def model(compiled=False):
    unet = FreePipeline(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))).unet
    return torch.compile(unet, backend="eager") if compiled else unet


@pytest.mark.parametrize("compiled", [False, True])
def test_pipelines_of_two_classes_share_a_model(compiled):
    unet = model(compiled)
    first, second = FreePipeline(None, unet=unet), OtherPipeline(unet)
    plain = [each(LATENTS, steps=3) for each in (first, second)]
    done = [fused.accelerate(each) for each in (first, second)]
    for _ in range(2):
        for each, expected in zip((first, second), plain, strict=True):
            torch.testing.assert_close(each(LATENTS, steps=3), expected)
    assert [each.counts for each in done] == [Counter({GUIDED: 6})] * 2
    fused.restore(first)
    second(LATENTS, steps=3)
    assert done[1].counts == {GUIDED: 9}
    fused.restore(second)
    assert first.unet._compiled_call_impl is None
    assert not first.unet._forward_hooks


class Watching(diffusers.DDIMScheduler):
    """Notes what it is given."""

    def step(self, model_output, timestep, sample, **how):
        assert type(model_output) is torch.Tensor
        return super().step(model_output, timestep, sample, **how)


def test_a_pipeline_of_the_same_class_that_is_not_accelerated_gets_tensors():
    """As does one that is restored; and neither ends the tracing of the accelerated one."""
    unet = model()
    left, restored = (FreePipeline(None, unet=unet, scheduler=Watching(clip_sample=False)) for _ in range(2))
    pipe, other = FreePipeline(None, unet=unet), FreePipeline(None, unet=unet)
    done = fused.accelerate(pipe)
    fused.accelerate(other)
    fused.restore(other)
    for each in (left, pipe, restored, pipe):
        each(LATENTS, steps=3)
    assert done.counts == {GUIDED: 6}


def test_a_run_that_was_left_takes_no_outputs_of_later_ones():
    """Of another pipeline of the same class, as it was never told that it was over."""
    unet = model()
    left, pipe = FreePipeline(None, unet=unet), FreePipeline(None, unet=unet)
    given_up, done = (fused.accelerate(each) for each in (left, pipe))
    with pytest.raises(ZeroDivisionError):
        left(LATENTS, steps=3, after_step=lambda: 1 / 0)
    assert left.scheduler._fusion.tries
    pipe(LATENTS, steps=3, rescale=0.7, after_step=lambda: None)
    assert not pipe.scheduler._fusion.tries
    assert left.scheduler._fusion.tries
    assert not left.scheduler._fusion.guidances
    assert pipe.scheduler._fusion.guidances
    assert (given_up.counts, done.counts) == ({GUIDED: 1}, {GUIDED: 3})


def test_an_accelerated_pipeline_may_be_pickled():
    """What comes out is not traced until it is accelerated; its scheduler is fastguide's."""
    pipe = FreePipeline(None, unet=model())
    done = fused.accelerate(pipe)
    expected = pipe(LATENTS, steps=3)
    other, scheduler = (pickle.loads(pickle.dumps(each)) for each in (pipe, pipe.scheduler))
    assert isinstance(other.scheduler, fused.DDIMScheduler)
    assert isinstance(scheduler, fused.DDIMScheduler)
    torch.testing.assert_close(other(LATENTS, steps=3), expected)
    assert fused.accelerate(other).tried == ["unet"]
    torch.testing.assert_close(other(LATENTS, steps=3), expected)
    assert done.counts == {GUIDED: 3}
    fused.restore(other)
    assert type(other.scheduler) is diffusers.DDIMScheduler


def test_a_scheduler_that_a_pipeline_copies_for_itself_counts_there():
    pipe = FreePipeline(None, unet=model())
    done = fused.accelerate(pipe)
    pipe.scheduler = copy.deepcopy(pipe.scheduler)
    pipe(LATENTS, steps=3)
    assert sum(done.counts.values()) == 3


def test_a_model_that_nobody_traces_any_more_is_as_it_was():
    unet = model()
    fused.accelerate(FreePipeline(None, unet=unet))
    gc.collect()
    assert unet._compiled_call_impl is None


def test_a_pipeline_that_is_gone_leaves_no_trace():
    unet = model()
    kept = FreePipeline(None, unet=unet)
    done = fused.accelerate(kept)
    for _ in range(1000):
        fused.accelerate(FreePipeline(None, unet=unet, scheduler=kept.scheduler))
        gc.collect(0)
    gc.collect()
    assert len(unet._compiled_call_impl.traces) == 1
    kept(LATENTS, steps=3)
    assert done.counts == {GUIDED: 3}


def test_a_model_is_freed_with_its_pipeline():
    """Without Python's collector of cycles, as a model may have gigabytes."""
    gc.collect()
    gc.disable()
    try:
        unet = model()
        alive = weakref.ref(unet)
        pipe = FreePipeline(None, unet=unet)
        fused.accelerate(pipe)
        pipe(LATENTS, steps=3)
        del pipe, unet
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_deep_copy_is_traced_for_itself(compiled):
    pipe = FreePipeline(None, unet=model(compiled))
    done = fused.accelerate(pipe)
    deep = copy.deepcopy(pipe)
    again = fused.accelerate(deep)
    assert torch.equal(deep(LATENTS, steps=3), pipe(LATENTS, steps=3))
    assert done.counts == again.counts == {GUIDED: 3}
    fused.restore(pipe)
    deep(LATENTS, steps=3)
    assert again.counts == {GUIDED: 6}
