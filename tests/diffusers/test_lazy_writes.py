"""Writes to what stands between a model's outputs and the step: they reach what they reach in plain torch alone."""

from __future__ import annotations

import contextlib

import pytest
import torch

from fastguide.diffusers import traced as module
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.traced import Combined, Fusion
from tests.support.scheduler_pair import STEPS, pair, randn

WHOLE = randn(4, 3, 5)
SAMPLE = randn(2, 3, 5, seed=1)


def halves_of_one(whole):
    return module.traced(whole, Fusion()).chunk(2)


def two_calls(whole):
    fusion = Fusion()
    return tuple(module.traced(half.clone(), fusion) for half in whole.chunk(2))


def written_after(write):
    """Return a program: guidance of guidance, where the inner one is written to after the outer one was made of it."""

    def program(u, c):
        inner = u + 2.0 * (c - u)
        outer = 0.5 * inner + u
        write(inner)
        return outer

    return program


def by_a_view(u, c):
    inner = u + 2.0 * (c - u)
    part = inner[:, :2]
    part.mul_(3.0)
    return inner


def view_of_what_was_written(u, c):
    inner = u + 2.0 * (c - u)
    part = inner.flatten(1).unflatten(1, (3, 5))
    inner.mul_(3.0)
    return part


def view_before_and_after(u, c):
    inner = u + 2.0 * (c - u)
    part = inner[:, :]
    outer = part + u
    inner.mul_(3.0)
    return outer + part


def scale_written(u, c):
    scale = torch.tensor(2.0)
    guided = u + scale * (c - u)
    scale.mul_(3.0)
    return guided


def scale_of_samples_written(u, c):
    scale = torch.tensor([2.0, 3.0]).view(2, 1, 1)
    guided = u + scale * (c - u)
    scale.mul_(3.0)
    return guided


def scale_written_between(u, c):
    scale = torch.tensor(2.0)
    first = scale * c
    scale.mul_(3.0)
    return u + (first - scale * u)


def read_when_used(use, number):
    """Return a program: a number on the host, or numbers of samples, are written to after they were used."""

    def program(u, c):
        read = torch.tensor(number) if isinstance(number, float) else torch.tensor(number).view(2, 1, 1)
        made = use(u, c, read)
        read.fill_(5.0)
        return made

    return program


def stacked_alone(u, c):
    inner = u + 2.0 * (c - u)
    stacked = torch.stack([inner])
    stacked.mul_(3.0)
    return inner + stacked[0]


def stacked_output(u, c):
    torch.stack([u]).mul_(3.0)
    return u + 2.0 * (c - u)


def seen_as_another_dtype(u, c):
    return (u + 2.0 * (c - u)).view(torch.int32).float()


PROGRAMS = {
    "the inner one in place": written_after(lambda g: g.mul_(3.0)),
    "a part of the inner one": written_after(lambda g: g[:1].zero_()),
    "the inner one by an operator": written_after(lambda g: g.__iadd__(1.0)),
    "by a view": by_a_view,
    "a view of what was written": view_of_what_was_written,
    "a view before and after": view_before_and_after,
    "a scale": scale_written,
    "a scale of samples": scale_of_samples_written,
    "a scale between": scale_written_between,
    "a weight": read_when_used(torch.lerp, 0.3),
    "a weight of samples": read_when_used(torch.lerp, [0.3, 0.6]),
    "a zero that is added": read_when_used(lambda u, c, zero: u + zero, 0.0),
    "a zero that is taken away": read_when_used(lambda u, c, zero: u + 2.0 * (c - u) - zero, 0.0),
    "a power": read_when_used(lambda u, c, two: u + (u**two).sum((1, 2), keepdim=True) * (c - u), 2.0),
    "a number of normalize": read_when_used(
        lambda u, c, eps: torch.nn.functional.normalize(0.01 * (c - u), 2.0, (1, 2), eps), 1.0
    ),
    "stacked alone": stacked_alone,
    "a stacked output": stacked_output,
    "another dtype": seen_as_another_dtype,
    "moved like another": lambda u, c: u.to(c) + (c - u).to(SAMPLE),
    "like what is traced": lambda u, c: SAMPLE.to(u) + 0.0 * c,
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("outputs", [halves_of_one, two_calls])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_write_reaches_what_it_reaches_in_plain_torch(name, outputs, inference):
    program = PROGRAMS[name]
    for take in (lambda made: made.computed() if type(made) is not torch.Tensor else made, stepped):
        with torch.inference_mode() if inference else contextlib.nullcontext():
            expected = program(*WHOLE.clone().chunk(2))
            if name in ("a scale of samples", "a weight of samples") and not inference:
                with pytest.raises(RuntimeError, match=r"was written to after guidance had been taken from it"):
                    take(program(*outputs(WHOLE.clone())))
                continue
            got = take(program(*outputs(WHOLE.clone())))
            assert not isinstance(got, Combined)
            torch.testing.assert_close(got, take(expected), rtol=2e-6, atol=2e-6)


def stepped(output):
    """Return what a step makes of guidance."""
    scheduler, _ = pair("DDIMScheduler", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    return scheduler.step(output, scheduler.timesteps[3], SAMPLE[: len(output)])[0]


@pytest.mark.parametrize("combine", [lambda old, new: old - new, lambda old, new: new + old])
def test_combinations_of_before_and_after_a_write_are_refused(combine):
    """What was combined before it has lost its values; that it is met by what was combined after hides nothing."""
    whole = WHOLE.clone()
    u, c = halves_of_one(whole)
    before = c - u
    u.mul_(2.0)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        resolved(combine(before, c - u), SAMPLE, None)


def test_in_inference_mode_the_second_source_is_watched_as_well():
    """Of two outputs, only the second one was made where torch does not count who writes to it."""
    fusion = Fusion()
    first = module.traced(WHOLE[:2].clone(), fusion)
    with torch.inference_mode():
        second = module.traced(WHOLE[2:].clone(), fusion)
        guided = first + 2.0 * (second - first)
        second.mul_(3.0)
        got, _ = resolved(guided, SAMPLE, None)
    torch.testing.assert_close(got, WHOLE[:2] + 2.0 * (WHOLE[2:] - WHOLE[:2]))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("which", ["guidance", "variance"])
def test_a_learned_variance_is_joined_as_it_was(which, inference):
    with torch.inference_mode() if inference else contextlib.nullcontext():
        u, c = (each.clone() for each in WHOLE.chunk(2))
        expected = torch.cat([u + 2.0 * (c - u), WHOLE[:2]], 1)
        variance = module.traced(WHOLE[:2].clone(), Fusion())
        uncond, cond = two_calls(WHOLE)
        guided = uncond + 2.0 * (cond - uncond)
        joined = torch.cat([guided, variance], 1)
        (guided if which == "guidance" else variance).mul_(3.0)
        if which == "variance" and not inference:
            for use in (lambda: joined.clone(), lambda: resolved(joined, WHOLE[:2], None)):
                with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
                    use()
        else:
            assert torch.equal(resolved(joined, SAMPLE, None)[0], expected)


def test_a_variance_that_others_have_is_joined_at_once():
    """In inference mode, where torch does not count who writes to it."""
    with torch.inference_mode():
        variance = module.traced(WHOLE[:2].clone(), Fusion())
        held = variance.contiguous()
        uncond, cond = two_calls(WHOLE)
        joined = torch.cat([uncond + 2.0 * (cond - uncond), variance], 1)
        held.mul_(0.0)
        u, c = WHOLE.chunk(2)
        assert torch.equal(joined.clone(), torch.cat([u + 2.0 * (c - u), WHOLE[:2]], 1))


def test_shapes_that_cannot_be_joined_are_refused_at_once():
    variance = module.traced(randn(2, 3, 4), Fusion())
    uncond, cond = two_calls(WHOLE)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        torch.cat([uncond + 2.0 * (cond - uncond), variance], 1)


PIECES = {
    "the first half twice": lambda a, b: a[0] + 3.0 * (b[0] - a[0]),
    "the second half first": lambda a, b: a[1] + 3.0 * (b[0] - a[1]),
    "the same halves of two calls of chunk": lambda a, b: a[0] + 3.0 * (b[1] - b[0]),
    "the mean of one half": lambda a, b: 0.5 * (a[0] + b[0]),
    "the mean of the second half": lambda a, b: (a[1] + b[1]) / 2,
}


@pytest.mark.parametrize("name", PIECES)
def test_pieces_are_told_apart(name):
    output = module.traced(WHOLE, Fusion())
    got = stepped(PIECES[name](output.chunk(2), output.chunk(2)))
    torch.testing.assert_close(got, stepped(PIECES[name](WHOLE.chunk(2), WHOLE.chunk(2))))


def test_pieces_of_other_sizes_are_not_taken_for_halves():
    """The first quarter of eight samples, and the third of four: the shapes fit a step of two, the places do not."""
    whole = randn(8, 3, 5)
    quarters = module.traced(whole, Fusion()).chunk(4)
    got = stepped(quarters[0] + 3.0 * (quarters[2] - quarters[0]))
    expected = whole[:2] + 3.0 * (whole[4:6] - whole[:2])
    torch.testing.assert_close(got, stepped(expected))


@pytest.mark.parametrize("by", ["a product", "a sum"])
def test_guidance_of_a_half_that_was_written_to_between_is_refused(by):
    """The difference was taken before, and is not computed yet."""
    u, c = halves_of_one(WHOLE.clone())
    shift = c - u
    scaled = 3.0 * shift if by == "a sum" else None
    u.mul_(2.0)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        resolved(u + (3.0 * shift if scaled is None else scaled), SAMPLE, None)


def test_halves_of_a_difference_that_was_asked_for_are_those_that_were_seen():
    """What is done with a difference after its values were read and written to has the written ones."""
    u, c = halves_of_one(WHOLE.clone())
    shift = c - u
    earlier = u + 3.0 * shift
    shift.mul_(0.5)
    later = u + 3.0 * shift
    first, second = WHOLE.chunk(2)
    torch.testing.assert_close(stepped(earlier), stepped(first + 3.0 * (second - first)))
    torch.testing.assert_close(stepped(later), stepped(first + 3.0 * (0.5 * (second - first))))
