"""Every kind of loop beside the papers' formulas in float64, which know no table, no guidance and no sampler."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Sampler, portable_noise
from tests.support.loop_cases import (
    CASES,
    COND,
    DDIM,
    DDPM,
    FREE,
    IMAGE,
    LABELS,
    LEARNED,
    MASK,
    SCHEDULE,
    SHAPE,
    UNCOND,
    Model,
    call,
    classifier,
    with_generator,
    x_T,
)
from tests.support.textbook_loops import Loop, assert_last, assert_loop


def model(dtype):
    return Model(dtype=dtype)


def with_variance(dtype):
    return Model(8, dtype)


def seeded(seeds, steps):
    """Return the portable noise of each step but the last, which has none."""
    return [portable_noise(seeds, (len(seeds), *SHAPE[1:]), step=step) for step in range(steps - 1)]


def drawn(steps):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SHAPE, generator=generator) for _ in range(steps - 1)]


def always(*scales):
    return lambda step: scales


def interval(step):
    return [4.0 if step in (2, 3) else 1.0]


BOTH = {"conditions": [UNCOND, COND]}
NOISY = {"solver": "ddpm", "settings": {"clip": 2.0}, "noise": seeded([1, 2, 3], 6)}
LEARNS = {"solver": "ddpm", "settings": {"variance_type": "learned_range"}, "noise": seeded([1, 2, 3], 6)}
CLASSIFIED = {"classifier": classifier, "labels": LABELS, "classifier_scale": 2.0}

LOOPS = {
    "unguided": Loop(model, "ddim"),
    "noise of a generator": Loop(model, "ddpm", {"clip": 2.0}, noise=drawn(6)),
    "noise of seeds": Loop(model, **NOISY),
    "classifier-free": Loop(model, **NOISY, **BOTH, scales=always(3.0)),
    "one call for each": Loop(model, "ddim", **BOTH, scales=always(3.0)),
    "scales of samples": Loop(model, "ddim", **BOTH, scales=always([1.0, 2.0, 5.0])),
    "composed": Loop(model, "ddim", conditions=[UNCOND, COND, COND + 1], scales=always(2.0, -1.0)),
    "conditions by name": Loop(
        model, "ddim", conditions=[{"y": UNCOND, "z": UNCOND}, {"y": COND, "z": COND}], scales=always(2.0)
    ),
    "a classifier": Loop(model, **NOISY, **CLASSIFIED, form="epsilon"),
    "both": Loop(model, **NOISY, **BOTH, scales=always(2.0), **CLASSIFIED, form="mean"),
    "a learned variance": Loop(with_variance, **LEARNS, **BOTH, scales=always(2.0)),
    "a model of 16 bits": Loop(model, "ddim", model_dtype=torch.bfloat16, **BOTH, scales=always(2.0)),
    "real timesteps, one for all": Loop(model, "ddim"),
    "inpainting": Loop(model, **NOISY, image=IMAGE, mask=MASK),
    "image to image": Loop(model, **NOISY, image=IMAGE, begin=3),
    "an interval": Loop(model, "ddim", **BOTH, scales=interval),
    "an interval, and a classifier": Loop(model, "ddim", **BOTH, scales=interval, **CLASSIFIED, form="epsilon"),
    "a learned variance, one call for each": Loop(with_variance, **LEARNS, **BOTH, scales=always(2.0)),
    "double precision": Loop(model, "ddim", **BOTH, scales=always(2.0)),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("calls", ["as it is", "the other way"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_loop_is_the_textbook_s(case, calls, layout):
    """Whether its predictions are one call of the model, or one call for each."""
    make, options = CASES[case]
    x = x_T().to(torch.float64 if case == "double precision" else torch.float32, memory_format=layout)
    sampler = make()
    sampler.batched ^= calls == "the other way"
    got = sampler.trajectory(x, **with_generator(options))
    assert_loop(got.samples, got.originals, LOOPS[case], x)
    assert torch.equal(call(sampler, options, x), got.samples[-1])


def test_every_case_has_its_textbook_loop():
    assert LOOPS.keys() == CASES.keys()


RISING, DOUBLE = ClassifierFree.per_step([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), ClassifierFree(2.0)
SEEDS = {"seeds": [1, 2, 3]}
CHANGES = {  # of one sampler, each after the one above: what is set, the call, and its loop
    "nothing": (DDPM, ClassifierFree(3.0), {**FREE, **SEEDS}, Loop(model, **NOISY, **BOTH, scales=always(3.0))),
    "the scale": (DDPM, ClassifierFree(7.5), {**FREE, **SEEDS}, Loop(model, **NOISY, **BOTH, scales=always(7.5))),
    "the scale to one of each step": (
        DDPM, RISING, {**FREE, **SEEDS},
        Loop(model, **NOISY, **BOTH, scales=lambda step: [step + 1.0]),
    ),
    "seeds and conditions": (
        DDPM, RISING, {"cond": COND + 1, "uncond": UNCOND - 1, "seeds": [9, 2, 4]},
        Loop(
            model, "ddpm", {"clip": 2.0}, conditions=[UNCOND - 1, COND + 1], scales=lambda step: [step + 1.0],
            noise=seeded([9, 2, 4], 6),
        ),
    ),
    "the number of steps": (
        fastguide.ddpm(SCHEDULE, 11), DOUBLE, {**FREE, **SEEDS},
        Loop(model, "ddpm", steps=11, **BOTH, scales=always(2.0), noise=seeded([1, 2, 3], 11)),
    ),
    "the solver": (
        fastguide.ddim(SCHEDULE, 4, eta=1.0), DOUBLE, {**FREE, **SEEDS},
        Loop(model, "ddim", {"eta": 1.0}, steps=4, **BOTH, scales=always(2.0), noise=seeded([1, 2, 3], 4)),
    ),
    "the table to a slice": (
        DDPM[2:], DOUBLE, {**FREE, **SEEDS}, Loop(model, **NOISY, **BOTH, scales=always(2.0), begin=2),
    ),
}  # fmt: skip


def test_a_sampler_does_what_it_is_set_to_now():
    """All of these loops share their buffers."""
    x, sampler = x_T(seed=7), Sampler(Model(), DDPM)
    for table, guidance, options, loop in CHANGES.values():
        sampler.table, sampler.guidance = table, guidance
        got = sampler.trajectory(x, **options)
        assert_loop(got.samples, got.originals, loop, x)


REQUESTS = {  # of one kind of slots: the model, what is first asked for, and the loop of each request
    "classifier-free": (
        model,
        ClassifierFree(1.0),
        [
            (DDPM, ClassifierFree(3.0), {"solver": "ddpm", "settings": {"clip": 2.0}, "scales": always(3.0)}),
            (DDIM, ClassifierFree(1.0), {"solver": "ddim", "scales": always(1.0)}),
            (DDIM, ClassifierFree.per_step([1, 1, 4, 4, 1, 1]), {"solver": "ddim", "scales": interval}),
            (
                fastguide.ddim(SCHEDULE, 4, eta=1.0), ClassifierFree(1.0),
                {"solver": "ddim", "settings": {"eta": 1.0}, "steps": 4, "scales": always(1.0)},
            ),
            (
                DDPM[2:], ClassifierFree(2.0),
                {"solver": "ddpm", "settings": {"clip": 2.0}, "begin": 2, "scales": always(2.0)},
            ),
        ],
    ),
    "a learned variance and a classifier": (
        with_variance,
        ClassifierFree(2.0) + Classifier(classifier, 2.0),
        [
            (
                LEARNED, ClassifierFree(scale) + Classifier(classifier, 2.0 * scale),
                {
                    "solver": "ddpm", "settings": {"variance_type": "learned_range"}, "scales": always(scale),
                    "classifier": classifier, "classifier_scale": 2.0 * scale, "form": "epsilon",
                },
            )
            for scale in (2.0, 0.5, 1.5)
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", REQUESTS)
def test_every_request_of_slots_is_the_textbook_s(kind, skip, batched):
    """Each joins at a step of the others, some in places that others have left."""
    make, guidance, requests = REQUESTS[kind]
    sampler = Sampler(make(torch.float32), DDIM, guidance, batched=batched, skip_unconditional=skip)
    slots, under_way, waiting = sampler.slots(2), {}, list(range(len(requests)))
    while waiting or under_way:
        if waiting and slots.free:
            number = waiting.pop(0)
            table, guidance, does = requests[number]
            x, cond, uncond = portable_noise([number], (1, *SHAPE[1:])), COND[:1] + number, UNCOND[:1] - number
            labels = torch.tensor([number]) if "classifier" in does else None
            slot = slots.admit(x, cond=cond, uncond=uncond, labels=labels, seed=number, table=table, guidance=guidance)
            noise = seeded([number], 6)
            under_way[slot] = x, Loop(make, conditions=[uncond, cond], labels=labels, noise=noise, **does)
        for slot, x_0 in slots.step().items():
            x, loop = under_way.pop(slot)
            assert_last(x_0, loop, x)
