"""Views of guidance beyond sums share its memory, as torch's own views do: writes to either reach the other."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers.guiders import guider_utils

from fastguide.diffusers import at_once
from fastguide.diffusers.formula import Formula
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.lazy_tensor import plain
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Fusion, Traced, traced
from tests.diffusers.test_masked_guidance import GUIDED, SHAPE, error, weighed


def rescaled(u, c):
    return guider_utils.rescale_noise_cfg(u + 3.0 * (c - u), c, 0.7)


def projected(u, c):
    """Norms are of rows."""
    unit, d = torch.nn.functional.normalize(c, dim=-1), c - u
    return c + d - (d * unit).sum(-1, keepdim=True) * unit


def part_of_the_whole(m):
    m[:, :1].zero_()
    return m


def parts_of_the_whole(m):
    first, rest = m.split([1, 2], 1)
    first *= 0.5
    rest += 1.0
    return m


def whole_after_a_view(m):
    turned = m.transpose(2, 3)
    m.mul_(2.0)
    return turned


def item_after_a_view(m):
    part = m[:, 1:]
    m[:, 2] = 0.0
    return part * 1.0


def overlapping_parts(m):
    first, second = m[:, :2], m[:, 1:]
    first.zero_()
    return second


def part_of_a_part(m):
    m.permute(0, 2, 1, 3)[:, 1:].zero_()
    return m


def part_of_another_shape(m):
    m.flatten(2)[:, :, 3:].zero_()
    return m


def whole_after_another_shape(m):
    longer = m.unsqueeze(1)
    m.mul_(2.0)
    return longer


def whole_after_a_part_of_another_shape(m):
    flat = m.flatten(2)
    part = flat[:, 1:]
    m.mul_(2.0)
    return torch.cat([flat * 1.0, part], 1)


def shape_before_a_write(m):
    longer = m.unsqueeze(1)
    doubled = longer * 2.0
    m.zero_()
    return doubled


def multiple_before_a_part(m):
    doubled = m * 2.0
    m[:, :1].zero_()
    return doubled


def multiple_after_a_write(m):
    m[:, :1].zero_()
    return m * 2.0


def a_number_of_another_shape(m):
    norms = m.norm(2, (1, 2, 3), keepdim=True)
    flat = norms.flatten()
    norms.mul_(2.0)
    return m * flat.view(-1, 1, 1, 1)


WRITES = (
    *(part_of_the_whole, parts_of_the_whole, whole_after_a_view, item_after_a_view, overlapping_parts, part_of_a_part),
    *(part_of_another_shape, whole_after_another_shape, whole_after_a_part_of_another_shape),
    *(multiple_before_a_part, multiple_after_a_write, a_number_of_another_shape),
)
CASES = [(write, guidance) for write in WRITES for guidance in (rescaled, projected)]
CASES.append((shape_before_a_write, rescaled))  # of rows, another shape is made ahead, and a later write refused


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("write", "guidance"), CASES)
def test_a_write_reaches_what_it_reaches_in_plain_torch(write, guidance, inference):
    with torch.inference_mode() if inference else contextlib.nullcontext():
        given, fusion = torch.randn(2, *SHAPE), Fusion()
        expected, own = write(guidance(*given.double())), write(guidance(*given))
        got = plain(write(guidance(*[traced(each.clone(), fusion) for each in given])))
        assert got.shape == own.shape
        assert error(got, expected) <= 2 * error(own, expected) + 4e-7


def uses_of_the_whole(m, x):
    m[:, :1].add_(1.0)
    return m.to(torch.float32) * 0.5 + x


def guidance_itself(m, x):
    m[:, :1].add_(1.0)
    return m


def another_shape(m, x):
    longer = m.unflatten(-1, (2, -1))
    m[:, :1].add_(1.0)
    return longer.flatten(-2) + x


@pytest.mark.parametrize("use", [uses_of_the_whole, guidance_itself, another_shape])
def test_what_was_cut_is_still_the_steps(use, monkeypatch):
    """Guidance is made once, however many parts there are, and the step weighs it with what was added to it."""
    launches, real = [], at_once.guided_step
    monkeypatch.setattr(at_once, "guided_step", lambda *given, **named: launches.append(given) or real(*given, **named))
    u, c, x = torch.randn(3, *SHAPE)
    expected, fusion = use(rescaled(u.double(), c.double()), x.double()), Fusion()
    fusion.tries = True
    m = rescaled(traced(u, fusion), traced(c, fusion))
    assert type(m) is Formula
    parts = [m[:, 1:], m.transpose(2, 3), m.flatten(2)[:, 1:]]
    assert all(type(each) is Traced for each in parts)
    made = use(m, x)
    assert len(launches) == 1
    assert fusion.tries
    assert not fusion.computed
    assert type(resolved(made, x, None)[0]) is Taken
    got, _, counted = weighed(made)
    assert counted == GUIDED
    assert error(got, expected) <= 2 * error(use(rescaled(u, c), x), expected) + 4e-7


def test_what_was_made_of_a_part_before_a_write_is_refused():
    """As of a model's output: it would be weighed by the step as it has become."""
    u, c = torch.randn(2, *SHAPE)
    fusion = Fusion()
    m = rescaled(traced(u, fusion), traced(c, fusion))
    made = m[:, :1] * 2.0
    m.zero_()
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        made.value()
