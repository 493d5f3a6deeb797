"""What ``accelerate`` says that it did, what its counts say that happened, and what ``restore`` undoes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from tests.support.pipelines import (
    WIDTHS,
    FreePipeline,
    prompts,
    scheduler_of,
    stable_diffusion,
)
from tests.support.scheduler_pair import diffusers, fused

pytest.importorskip("transformers")

ETA = "left to diffusers: an eta that is not from 0 to 1, or noise besides a generator"
GUIDED, ALONE = "fused with guidance", "fused without guidance"
RUN = {"num_inference_steps": 4, "output_type": "latent"}


def text_to_image(**config):
    return stable_diffusion("StableDiffusionPipeline", scheduler_of("DDIMScheduler", **config))


COUNTED = {  # options of the call, and what the steps are
    "guidance": ({"guidance_scale": 6.0}, {GUIDED: 4}),
    "a number of numpy's": ({"guidance_scale": np.float32(6)}, {GUIDED: 4}),
    "a whole number": ({"guidance_scale": 6}, {GUIDED: 4}),
    "no guidance": ({"guidance_scale": 1.0}, {ALONE: 4}),
    "rescaled": ({"guidance_scale": 6.0, "guidance_rescale": 0.7}, {GUIDED: 4}),
    "eta as a tensor": ({"guidance_scale": 6.0, "eta": torch.tensor(0.5)}, {GUIDED: 4}),
    "eta as a tensor of one": ({"guidance_scale": 6.0, "eta": torch.tensor([0.5])}, {GUIDED: 4}),
    "eta of numpy's": ({"guidance_scale": 6.0, "eta": np.float32(0.5)}, {GUIDED: 4}),
    "eta beyond 1": ({"guidance_scale": 6.0, "eta": 1.01}, {ETA: 4}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_steps_are_counted_by_what_was_done(name):
    options, counts = COUNTED[name]
    pipe = text_to_image()
    latents = []
    for accelerated in (False, True):
        if accelerated:
            done = fused.accelerate(pipe)
        generator = torch.Generator().manual_seed(1)
        latents.append(pipe(**prompts(), **RUN, **options, generator=generator).images)
    assert done.counts == counts
    torch.testing.assert_close(*latents, rtol=1e-4, atol=1e-4, equal_nan=True)  # diffusers' for an eta beyond 1


def test_an_eta_that_widens_the_result_is_left_to_diffusers():
    """A number does not, and a tensor with dimensions does."""
    pipe = FreePipeline(torch.zeros(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    pipe.scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4)
    for eta, dtype in ((torch.tensor([0.5], dtype=torch.float64), torch.float64), (torch.tensor(0.5), torch.float32)):
        assert pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x, eta=eta).prev_sample.dtype == dtype
    assert done.counts == {ETA: 1, ALONE: 1}


def test_tracing_ends_for_a_run_that_uses_guidance_before_the_step():
    """By deviations over all samples. The next run tries again."""
    pipe = FreePipeline(torch.randn(4, 3, 4, 4))
    done = fused.accelerate(pipe)
    runs = ((0.7, {ALONE: 4}), (0.0, {ALONE: 4, GUIDED: 4}), (0.7, {ALONE: 8, GUIDED: 4}))
    for run, (rescale, counts) in enumerate(runs):
        tried = []
        pipe(torch.randn(2, 3, 4, 4), 4, rescale=rescale,
             after_step=lambda tried=tried: tried.append(pipe.scheduler._fusion.tries))  # fmt: skip
        assert done.counts == counts
        assert tried == [rescale == 0] * 3 + [False]  # no longer after the last step
        assert done.computed == {"std": 1 + run // 2}


def test_counts_go_on_when_it_is_accelerated_again():
    pipe = text_to_image()
    first = fused.accelerate(pipe)
    pipe(**prompts(), **RUN)
    pipe.scheduler = scheduler_of("DDPMScheduler")
    second = fused.accelerate(pipe)
    pipe(**prompts(), **RUN)
    assert first.counts is second.counts
    assert first.counts == {GUIDED: 8}


REFUSED = {
    "autograd": lambda x: (x.clone().requires_grad_(), {}),
    "shapes that broadcast, or do not fit": lambda x: (x[:1], {}),
    "tensors of torch.int64": lambda x: (x.long(), {}),
    "noise of torch.float64 for another sample": lambda x: (x, {"variance_noise": x.double(), "eta": 1.0}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_steps_left_to_diffusers_have_their_reason(reason):
    pipe = FreePipeline(torch.zeros(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    x = torch.randn(2, 3, 4, 4)
    output, options = REFUSED[reason](x)
    pipe.scheduler.set_timesteps(4)
    pipe.scheduler.step(output, pipe.scheduler.timesteps[0], x, **options)
    assert done.counts == {f"left to diffusers: {reason}": 1}


def test_timesteps_that_are_not_set_are_diffusers_to_report():
    pipe = FreePipeline(torch.zeros(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    with pytest.raises(ValueError, match="set_timesteps"):
        pipe.scheduler.step(torch.zeros(1, 3, 4, 4), 3, torch.zeros(1, 3, 4, 4))
    assert done.counts == {"left to diffusers: timesteps that are not set": 1}


def test_compiled_steps_are_not_counted():
    pipe = FreePipeline(torch.zeros(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    pipe.scheduler.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4)
    step = torch.compile(pipe.scheduler.step, backend="eager")
    with torch.no_grad():
        step(x, pipe.scheduler.timesteps[0], x)
    assert not done.counts


@pytest.mark.parametrize("guided", [False, True])
def test_at_most_one_output_is_alive_after_a_step(guided):
    """Without Python's collector of cycles, in a pipeline that keeps its names as diffusers' do."""
    outputs, alive = [], []

    def make(x):
        output = torch.randn(2 * len(x), *x.shape[1:])
        outputs.append(weakref.ref(output))
        return output

    pipe = FreePipeline(make)
    fused.accelerate(pipe)
    gc.collect()
    gc.disable()
    try:
        pipe(torch.randn(1, 3, 4, 4), steps=6, rescale=0.0 if guided else 0.7,
             after_step=lambda: alive.append(sum(output() is not None for output in outputs)))  # fmt: skip
    finally:
        gc.enable()
    assert len(outputs) == 6
    assert max(alive) == 1


def test_a_pipeline_is_freed_with_its_last_name():
    pipe = FreePipeline(torch.zeros(2, 3, 4, 4))
    fused.accelerate(pipe)
    pipe(torch.randn(1, 3, 4, 4), steps=2)
    gc.collect()
    gc.disable()
    try:
        freed = weakref.ref(pipe.scheduler)
        del pipe
        assert freed() is None
    finally:
        gc.enable()


def test_the_model_gives_its_callers_tensors():
    """Only what the pipeline's methods call is traced: not the callbacks that they call."""
    pipe = FreePipeline(torch.randn(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    kinds = []
    pipe(torch.randn(1, 3, 4, 4), steps=3, after_step=lambda: kinds.append(type(pipe.unet(None, None)[0])))
    with torch.no_grad():
        kinds.append(type(pipe.unet(None, None)[0]))
    assert kinds == [torch.Tensor] * 4
    assert done.counts == {GUIDED: 3}


@pytest.mark.parametrize("compiled", ["put in its place", "in place", "in place, afterwards"])
def test_a_compiled_model(compiled):
    out = torch.randn(2, 3, 4, 4)
    pipe, plain = FreePipeline(out), FreePipeline(out)
    if compiled == "put in its place":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif compiled == "in place":
        pipe.unet.compile(backend="eager")
    done = fused.accelerate(pipe)
    if compiled == "in place, afterwards":
        pipe.unet.compile(backend="eager")
    x = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(pipe(x, steps=3), plain(x, steps=3))
    before = 0
    if compiled == "in place, afterwards":  # hooks are in the graph then
        assert done.counts == {ALONE: 3}
        before, done = 3, fused.accelerate(pipe)
        pipe(torch.randn(1, 3, 4, 4), steps=3)
    assert done.counts[GUIDED] == 3
    assert done.counts[ALONE] == before
    assert done.tried == ["unet"]
    compiled_call = pipe.unet._compiled_call_impl
    fused.restore(pipe)
    assert (pipe.unet._compiled_call_impl is compiled_call) == (compiled == "put in its place")


def kandinsky():
    """A combined pipeline, whose steps the pipelines within make."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8, attention_head_dim=4, class_embed_type=None, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", **WIDTHS,
    ).eval()  # fmt: skip
    nothing = dict.fromkeys(("prior_prior", "prior_image_encoder", "prior_text_encoder", "prior_tokenizer"))
    movq = diffusers.VQModel(
        latent_channels=4, vq_embed_dim=4, norm_type="spatial", num_vq_embeddings=8, block_out_channels=(32, 64),
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()  # fmt: skip
    return diffusers.KandinskyV22CombinedPipeline(
        unet=unet, scheduler=diffusers.DDPMScheduler(), movq=movq, prior_scheduler=diffusers.UnCLIPScheduler(),
        prior_image_processor=None, **nothing,
    )  # fmt: skip


def test_pipelines_within_a_pipeline():
    pipe = kandinsky()
    scheduler, prior = pipe.scheduler, pipe.prior_scheduler
    decoder = pipe.decoder_pipe
    decoder.set_progress_bar_config(disable=True)
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))

    def run():
        generator = torch.Generator().manual_seed(2)
        return decoder(
            image_embeds=embeds[0], negative_image_embeds=embeds[1], height=16, width=16, num_inference_steps=3,
            generator=generator, output_type="pt",
        ).images  # fmt: skip

    before = run()
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": "DDPMScheduler", "prior_scheduler": "UnCLIPScheduler"}
    assert not done.left_alone
    assert done.tried == ["unet"]
    assert type(pipe.scheduler) is type(decoder.scheduler) is fused.DDPMScheduler
    assert type(pipe.prior_scheduler) is type(pipe.prior_pipe.scheduler) is fused.UnCLIPScheduler
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)
    assert done.counts == {GUIDED: 3}  # of half of the channels; the rest is the variance
    fused.restore(pipe)
    assert pipe.scheduler is decoder.scheduler is scheduler
    assert pipe.prior_scheduler is pipe.prior_pipe.scheduler is prior
    assert pipe.unet._compiled_call_impl is None
    assert torch.equal(run(), before)


def test_every_scheduler_is_exchanged_or_named():
    nothing = dict.fromkeys((
        "prior_tokenizer", "prior_text_encoder", "prior", "image_normalizer", "tokenizer", "text_encoder", "vae",
    ))  # fmt: skip
    pipe = diffusers.StableUnCLIPPipeline(
        **nothing, unet=FreePipeline(torch.zeros(2, 3, 4, 4)).unet, scheduler=scheduler_of("DDIMScheduler"),
        prior_scheduler=diffusers.KarrasVeScheduler(), image_noising_scheduler=diffusers.DDPMScheduler(),
    )  # fmt: skip
    done = fused.accelerate(pipe)
    assert done.exchanged == {"scheduler": "DDIMScheduler", "image_noising_scheduler": "DDPMScheduler"}
    assert list(done.left_alone) == ["prior_scheduler"]


def test_what_has_no_scheduler_is_named():
    class Empty(diffusers.DiffusionPipeline):
        def __init__(self):
            super().__init__()

    assert fused.accelerate(Empty()).left_alone == {"pipe": "it has no scheduler"}


def test_a_restored_copy_leaves_the_original_as_it_is():
    pipe = FreePipeline(torch.randn(2, 3, 4, 4))
    before = pipe.scheduler
    done = fused.accelerate(pipe)
    shallow = copy.copy(pipe)
    fused.restore(shallow)
    assert shallow.scheduler is before
    x = torch.randn(1, 3, 4, 4)
    pipe(x, steps=3)
    assert done.counts == {GUIDED: 3}
    again = copy.copy(pipe)
    assert fused.accelerate(again).counts is done.counts  # they share the scheduler
    fused.restore(again)
    pipe(x, steps=3)
    assert done.counts == {GUIDED: 6}
    fused.restore(pipe)
    assert pipe.scheduler is again.scheduler is before
    assert pipe.unet._compiled_call_impl is None


def test_a_deep_copy_is_a_pipeline_of_its_own():
    pipe = FreePipeline(torch.randn(2, 3, 4, 4))
    done = fused.accelerate(pipe)
    x = torch.randn(1, 3, 4, 4)
    deep = copy.deepcopy(pipe)
    assert torch.equal(deep(x, steps=3), pipe(x, steps=3))
    assert done.counts == {GUIDED: 3}
    assert fused.accelerate(deep).counts == {GUIDED: 3}
    fused.restore(deep)
    assert type(deep.scheduler) is diffusers.DDIMScheduler
    assert [each.unet._compiled_call_impl is None for each in (deep, pipe)] == [True, False]


def test_pipelines_that_share_a_scheduler_and_a_model():
    first = FreePipeline(torch.randn(2, 3, 4, 4))
    before = first.scheduler
    done = fused.accelerate(first)
    second = FreePipeline(None, unet=first.unet, scheduler=first.scheduler)
    assert fused.accelerate(second).counts is done.counts
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(first(x, steps=3), second(x, steps=3))
    assert done.counts == {GUIDED: 6}
    fused.restore(first)
    second(x, steps=3)
    assert done.counts == {GUIDED: 9}
    fused.restore(second)
    assert first.scheduler is second.scheduler is before
    assert first.unet._compiled_call_impl is None


def test_an_acceleration_says_what_it_is():
    done = fused.accelerate(FreePipeline(torch.zeros(2, 3, 4, 4)))
    assert done == fused.Acceleration({"scheduler": "DDIMScheduler"}, ["unet"], {}, Counter())
