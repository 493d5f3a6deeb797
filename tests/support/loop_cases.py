"""Loops of every kind: a small network, guidances, noises, and what they are called with; for graphs of any device."""

from __future__ import annotations

import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Sampler

SCHEDULE = fastguide.NoiseSchedule.linear()
SHAPE = (3, 4, 6, 5)


class Model(torch.nn.Module):
    """A small network that counts how often Python calls it."""

    def __init__(self, out_channels=4, dtype=torch.float32, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = torch.nn.Conv2d(4, out_channels, 3, padding=1).to(dtype)
        self.called = 0

    def forward(self, x, t, y=None, **more):
        self.called += 1
        shift = torch.sin(t.to(x.dtype) / 300).reshape(-1, 1, 1, 1)
        if y is not None:
            shift = shift + y.to(x.dtype).reshape(-1, 1, 1, 1)
        for value in more.values():
            shift = shift + value.to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(self.convolution(x) + shift)


def classifier(x, t):
    weight = torch.linspace(-1, 1, x[0].numel() * 5, device=x.device).to(x.dtype).reshape(-1, 5)
    return torch.tanh(x.flatten(1) + torch.sin(t.to(x.dtype) / 300)[:, None]) @ weight


def x_T(*shape, seed=0):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


COND, UNCOND = torch.tensor([1.0, -0.5, 0.3]), torch.zeros(3)
LABELS = torch.tensor([0, 4, 2])
FREE = {"cond": COND, "uncond": UNCOND}
DDIM, DDPM = fastguide.ddim(SCHEDULE, 6), fastguide.ddpm(SCHEDULE, 6, clip_sample_range=2.0)
DPM = fastguide.dpm_solver(SCHEDULE, 6)
LEARNED = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range")
IMAGE, MASK = x_T(seed=5), (x_T(3, 1, 6, 5, seed=6) > 0)

CASES = {  # sampler, call
    "unguided": (lambda: Sampler(Model(), DDIM), {}),
    "noise of a generator": (lambda: Sampler(Model(), DDPM), {"generator": 3}),
    "noise of seeds": (lambda: Sampler(Model(), DDPM), {"seeds": [1, 2, 3]}),
    "classifier-free": (lambda: Sampler(Model(), DDPM, ClassifierFree(3.0)), {**FREE, "seeds": [1, 2, 3]}),
    "one call for each": (lambda: Sampler(Model(), DDIM, ClassifierFree(3.0), batched=False), FREE),
    "scales of samples": (lambda: Sampler(Model(), DDIM, ClassifierFree([1.0, 2.0, 5.0])), FREE),
    "composed": (
        lambda: Sampler(Model(), DDIM, Composed([2.0, -1.0])), {"cond": [COND, COND + 1], "uncond": UNCOND},
    ),
    "conditions by name": (
        lambda: Sampler(Model(), DDIM, ClassifierFree(2.0)),
        {"cond": {"y": COND, "z": COND}, "uncond": {"y": UNCOND, "z": UNCOND}},
    ),
    "a classifier": (
        lambda: Sampler(Model(), DDPM, Classifier(classifier, 2.0)), {"labels": LABELS, "seeds": [1, 2, 3]},
    ),
    "both": (
        lambda: Sampler(Model(), DDPM, ClassifierFree(2.0) + Classifier(classifier, 2.0, "mean")),
        {**FREE, "labels": LABELS, "seeds": [1, 2, 3]},
    ),
    "a learned variance": (
        lambda: Sampler(Model(8), LEARNED, ClassifierFree(2.0)), {**FREE, "seeds": [1, 2, 3]},
    ),
    "a model of 16 bits": (
        lambda: Sampler(Model(dtype=torch.bfloat16), DDIM, ClassifierFree(2.0), dtype=torch.bfloat16), FREE,
    ),
    "real timesteps, one for all": (
        lambda: Sampler(Model(), DDIM, timestep_dtype=torch.float32, scalar_timestep=True), {},
    ),
    "inpainting": (lambda: Sampler(Model(), DDPM), {"image": IMAGE, "mask": MASK, "seeds": [1, 2, 3]}),
    "image to image": (lambda: Sampler(Model(), DDPM), {"image": IMAGE, "strength": 0.5, "seeds": [1, 2, 3]}),
    "an interval": (
        lambda: Sampler(Model(), DDIM, ClassifierFree.per_step([1, 1, 4, 4, 1, 1]), skip_unconditional=True), FREE,
    ),
    "an interval, and a classifier": (
        lambda: Sampler(
            Model(), DDIM, ClassifierFree.per_step([1, 1, 4, 4, 1, 1]) + Classifier(classifier, 2.0),
            skip_unconditional=True,
        ),
        {**FREE, "labels": LABELS},
    ),
    "a learned variance, one call for each": (
        lambda: Sampler(Model(8), LEARNED, ClassifierFree(2.0), batched=False), {**FREE, "seeds": [1, 2, 3]},
    ),
    "double precision": (lambda: Sampler(Model(dtype=torch.float64), DDIM, ClassifierFree(2.0)), FREE),
}  # fmt: skip

GOES_ON = {  # from earlier calls
    "a history": (lambda: Sampler(Model(), DPM, ClassifierFree(2.0)), FREE),
    "a history of three slots, and calls twice a step": (
        lambda: Sampler(Model(), fastguide.pndm(SCHEDULE, 6), ClassifierFree(2.0)), FREE,
    ),
    "a history and noise": (
        lambda: Sampler(
            Model(), fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"), ClassifierFree(2.0)
        ),
        {**FREE, "seeds": [1, 2, 3]},
    ),
    "a history, image to image": (
        lambda: Sampler(Model(), fastguide.unipc(SCHEDULE, 6), ClassifierFree(2.0)),
        {**FREE, "image": IMAGE, "strength": 0.5},
    ),
}  # fmt: skip
ALL_CASES = CASES | GOES_ON


def call(sampler, options, x, **more):
    return sampler(x, **with_generator(options), **more)


def samples(sampler, options, x):
    """The trajectory without the predicted x_0, which would be another state."""
    return sampler.trajectory(x, originals=False, **with_generator(options))


def with_generator(options):
    options = dict(options)
    if "generator" in options:
        options["generator"] = torch.Generator().manual_seed(options["generator"])
    return options
