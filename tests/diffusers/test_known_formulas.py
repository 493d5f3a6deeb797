"""What a pipeline makes at each step is known again: the same values and weights, as if each step were the first."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastguide.diffusers import known
from fastguide.diffusers import traced as module
from fastguide.diffusers.formula import Formula
from fastguide.diffusers.known import Known, unknown
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.taken import Taken
from fastguide.diffusers.traced import Combined, Fusion
from tests.diffusers import test_formulas as formulas
from tests.diffusers.test_formulas import FORMULAS, SHAPE, made_by_a_step, outputs, rescaled, traced

WITH_TENSORS = {"in x_0", "a scale for each sample"}
"""Formulas of which not all is known again: they have latents, or scales in a tensor."""
SUMS = {
    "two outputs": lambda u, c: u + 7.5 * (c - u),
    "from the second": lambda u, c: c + 3.0 * (c - u),
    "cast": lambda u, c: (u + 7.5 * (c - u)).to(torch.float64).float(),
    "negated": lambda u, c: -(u + 2.5 * (c - u)) / 2.0,
}


def single(seed, shape=SHAPE, count=2):
    return [each.float() for each in outputs(seed, shape=shape, count=count)]


def tensors_of(taken):
    return list(taken.predictions) if isinstance(taken, Taken) else [taken]


def values_of(made):
    return (made if type(made) is torch.Tensor else made.computed()).clone()


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_known_again(name, halves):
    fusion, found = Fusion(), []
    for step in range(3):
        made = FORMULAS[name](*traced(single(step), fusion, halves))
        afresh = FORMULAS[name](*traced(single(step), Fusion(), halves))
        assert (type(made), type(afresh)) == (Known if step and name not in WITH_TENSORS else Formula, Formula)
        assert (made.shape, made.dtype, made.device, made.ndim) == (
            afresh.shape, afresh.dtype, afresh.device, afresh.ndim,
        )  # fmt: skip
        (got, guidance), (expected, _) = made_by_a_step(made), made_by_a_step(afresh)
        assert torch.equal(got, expected)
        assert torch.equal(values_of(made), values_of(afresh))
        found.append(guidance)
        fusion.steps += 1
    assert found[0] is found[1] is found[2] or name in WITH_TENSORS


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_known_again(name, halves):
    fusion = Fusion()
    for step in range(3):
        given = single(step)
        made = SUMS[name](*traced(given, fusion, halves))
        taken = resolved(made, torch.zeros(SHAPE), None)
        afresh = resolved(SUMS[name](*traced(given, Fusion(), halves)), torch.zeros(SHAPE), None)
        assert taken[1] == afresh[1]
        for one, other in zip(tensors_of(taken[0]), tensors_of(afresh[0]), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(values_of(made), SUMS[name](*given))
        fusion.steps += 1


def test_numbers_that_change_are_told_apart():
    fusion = Fusion()
    for step, scale in enumerate([7.5, 5.0, 7.5, 5, -0.0, 0.0, True]):
        given = single(step)
        made = rescaled(*traced(given, fusion), scale)
        assert torch.equal(values_of(made), rescaled(*given, scale))
        got = made_by_a_step(rescaled(*traced(given, fusion), scale))[0]
        assert torch.equal(got, made_by_a_step(rescaled(*traced(given, Fusion()), scale))[0])
        fusion.steps += 1


def test_outputs_are_told_by_their_places():
    """Of two outputs that change roles, each is taken where it is now."""
    fusion = Fusion()
    for step, order in enumerate([(0, 1), (1, 0), (0, 1), (1, 0)]):
        given = single(step)
        first, second = traced(given, fusion)
        (first + second).computed()  # so that both have their places
        pair = first, second
        made = rescaled(*[pair[k] for k in order])
        expected = rescaled(*[given[k] for k in order])
        got, _ = made_by_a_step(made)
        assert torch.equal(values_of(made), expected)
        afresh = traced(given)
        assert torch.equal(got, made_by_a_step(rescaled(*[afresh[k] for k in order]))[0])
        fusion.steps += 1


CHANGES = {
    "shape": lambda step, given: single(step, (3, 4, 8, 6)),
    "dtype": lambda step, given: [each.bfloat16() for each in given],
    "layout": lambda step, given: [each.to(memory_format=torch.channels_last) for each in given],
    "one output, which a model returned twice": lambda step, given: [given[0], given[0]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_outputs_are_told_apart(change):
    fusion = Fusion()
    for step in range(4):
        given = single(step)
        if step % 2:
            given = CHANGES[change](step, given)
        made = rescaled(*traced(given, fusion))
        assert torch.equal(values_of(made), rescaled(*given))
        if not change.startswith("one"):
            sample = torch.empty_like(given[0], dtype=torch.float32).zero_()
            taken, afresh = (made_by_a_step(rescaled(*traced(given, each)), sample)[0] for each in (fusion, Fusion()))
            assert torch.equal(taken, afresh)
        fusion.steps += 1


def test_an_output_that_was_written_to_is_refused():
    """Before and after it was first used, and between two uses, as in a first step."""
    fusion = Fusion()
    rescaled(*traced(single(0), fusion))
    fusion.steps += 1
    given = single(1)
    pair = traced(given, fusion)
    given[0].mul_(2.0)  # before
    made = rescaled(*pair)
    assert type(made) is Known
    assert torch.equal(values_of(made), rescaled(*given))
    fusion.steps += 1
    given = single(2)
    made = rescaled(*traced(given, fusion))
    given[1].mul_(2.0)
    for use in (lambda: resolved(made, torch.zeros(SHAPE), None), made.clone):
        with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
            use()
    fusion.steps += 1
    given = single(3)
    u, c = traced(given, fusion)
    std = c.std((1, 2, 3), keepdim=True)
    given[1].mul_(2.0)
    with pytest.raises(RuntimeError, match="was written to after guidance had been taken from it"):
        (u * (std / c.std((1, 2, 3), keepdim=True))).clone()


def test_what_was_read_waits_no_longer():
    """Its values may have been changed by who read them, at some steps and not at others."""
    fusion = Fusion()
    for step in range(4):
        given = single(step)
        u, c = traced(given, fusion)
        m = (u + 5.0 * (c - u)) * c.std((1, 2, 3), keepdim=True)
        own = (given[0] + 5.0 * (given[1] - given[0])) * given[1].std((1, 2, 3), keepdim=True)
        for read in (m, own) if step % 2 else ():
            (read.computed() if read is m else read).mul_(2.0)
        made = m * 3.0 + u
        taken, how = resolved(made, torch.zeros(SHAPE), None)
        if step % 2:
            got = sum(weight * each for weight, each in zip(how.constants, taken.predictions, strict=True))
        else:
            got, _ = made_by_a_step(made)
        assert torch.allclose(got, own * 3.0 + given[0], atol=1e-4)
        assert torch.equal(values_of(made), own * 3.0 + given[0])
        fusion.steps += 1


def of_a_sum(u, c):
    m = 0.5 * u + 0.25 * c
    made = m * 2.0
    m.add_(1.0)
    return made


def of_halves(u, c):
    m = u + 3.0 * (c - u)
    made = m * 0.5
    m.add_(1.0)
    return made


def of_a_view(u, c):
    m = 0.5 * u + 0.25 * c
    made = m.flatten(1) * 2.0
    m.add_(1.0)
    return made


def of_what_was_written_as_well(u, c):
    m = 0.5 * u + 0.25 * c
    doubled = m * 2.0
    made = doubled * 3.0
    m.add_(1.0)
    doubled.add_(1.0)
    return made


def of_a_view_that_was_written(u, c):
    m = 0.5 * u + 0.25 * c
    view = m.flatten(1)
    before = view * 2.0
    view.mul_(3.0)
    return before + m.flatten(1)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(
    "formula", [of_a_sum, of_halves, of_a_view, of_what_was_written_as_well, of_a_view_that_was_written]
)
def test_writes_to_what_it_is_of_change_nothing(formula, halves):
    fusion = Fusion()
    for step in range(3):
        given = single(step)
        made = formula(*traced(given, fusion, halves))
        assert made.numel() == given[0].numel()
        assert torch.allclose(values_of(made), formula(*given), rtol=1e-6, atol=1e-6)
        fusion.steps += 1


def test_a_view_has_what_was_written_to_what_it_is_of():
    """At some steps, and not at those when it was first met."""
    fusion = Fusion()
    for step in range(4):
        given = single(step)
        pair, found = traced(given, fusion), []
        for u, c in (pair, given):
            m = rescaled(u, c)
            view = m.view(*SHAPE)
            if step % 2:
                m.add_(1.0)
            found += [view * 2.0, view]
        for made, own in zip(found[:2], found[2:], strict=True):
            if step % 2:
                taken, _ = resolved(made, torch.zeros(SHAPE), None)
                assert torch.equal(taken, own)
            else:
                assert torch.allclose(made_by_a_step(made)[0], own, atol=1e-4)
        fusion.steps += 1


@pytest.mark.parametrize("name", formulas.COMPUTED)
def test_what_is_computed_is_so_at_each_step(name):
    program, by = formulas.COMPUTED[name]
    fusion = Fusion()
    for step in range(3):
        fusion.tries = True
        given = single(step)
        got, expected = program(*traced(given, fusion)), program(*given)
        if isinstance(expected, torch.Tensor):
            assert torch.equal(values_of(got), expected)
        else:
            assert got == expected
        assert fusion.computed == ({by: step + 1} if by else {})
        fusion.steps += 1


def test_what_is_kept_of_an_earlier_step():
    """A state goes on from what it was: its outputs are not those of this step, though they have the same places."""

    def direction(u, c):
        return (u + 5.0 * (c - u)) / c.std((1, 2, 3), keepdim=True)

    def formula(u, c, kept):
        return direction(u, c) + (direction(u, c) if kept is None else kept), direction(u, c)

    fusion, kept, own = Fusion(), None, None
    for step in range(6):
        kept, own = (None, None) if step == 3 else (kept, own)
        given = single(step)
        made, kept = formula(*traced(given, fusion), kept)
        expected, own = formula(*given, own)
        got = made_by_a_step(made)[0] if step in (0, 3) else resolved(made, torch.zeros(SHAPE), None)[0]
        assert torch.allclose(got, expected, atol=1e-4)
        fusion.steps += 1


def test_views_of_an_output():
    """Told by where they lie in it."""
    fusion = Fusion()
    for step, (begin, end) in enumerate([(0, 2), (2, 4), (0, 2), (2, 4)]):
        given = single(step)
        made = rescaled(*[each[:, begin:end] for each in traced(given, fusion)])
        expected = rescaled(*[each[:, begin:end] for each in given])
        assert torch.equal(values_of(made), expected)
        fusion.steps += 1


def test_inference_tensors_are_not_known():
    """As torch does not count who writes to them."""
    fusion = Fusion()
    for step in range(2):
        with torch.inference_mode():
            given = [each.clone() for each in single(step)]
            made = rescaled(*traced(given, fusion))
            assert type(made) is Formula
            assert torch.equal(values_of(made), rescaled(*given))
        fusion.steps += 1


def test_few_operations_are_remembered():
    fusion = Fusion()
    for step in range(600):
        u, c = traced(single(0, (1, 2, 2, 2)), fusion)
        rescaled(u, c, 2.0 + step / 100)
        fusion.steps += 1
    assert 8 < len(fusion.known) <= 1024


def test_a_known_formula_is_a_tensor_to_others():
    fusion = Fusion()
    for step in range(2):
        given = single(step)
        made, own = rescaled(*traced(given, fusion)), rescaled(*given)
        assert (made.dim(), made.size(1), len(made), made.numel()) == (4, 4, 2, own.numel())
        assert torch.equal(torch.cat([made, made]), torch.cat([own, own]))
        again = rescaled(*traced(given, fusion))
        assert torch.allclose((again.chunk(2)[1] + 0.0).clone(), own.chunk(2)[1], atol=1e-5)
        assert torch.equal(torch.zeros_like(again), torch.zeros_like(own))
        assert isinstance(unknown(again), (Formula, Combined))
        fusion.steps += 1


def test_traced_outputs_have_their_places_once():
    fusion = Fusion()
    given = single(0)
    u, c = traced(given, fusion)
    rescaled(u, c)
    assert u.source.form[0] != c.source.form[0]
    assert module.traced(given[0], fusion).source.form is None


def test_outputs_that_share_their_memory_are_not_known():
    """Two of three that are one, at first: a step takes two predictions then, and three later."""

    def formula(u, c, p):
        m = u + 5.0 * (c - u) + 2.0 * (c - p)
        return m * (c.std((1, 2, 3), keepdim=True) / m.std((1, 2, 3), keepdim=True))

    fusion = Fusion()
    for step in range(3):
        given = single(step, count=3)
        given = given if step else [given[0], given[1], given[0]]
        got, guidance = made_by_a_step(formula(*traced(given, fusion)))
        assert guidance.num_predictions == (3 if step else 2)
        assert torch.equal(got, made_by_a_step(formula(*traced(given)))[0])
        fusion.steps += 1


def test_an_output_that_was_written_to_between_two_formulas():
    """The second one is of what is there now."""
    fusion = Fusion()
    for step in range(3):
        given = single(step)
        u, c = traced(given, fusion)
        rescaled(u, c)
        given[1].mul_(2.0)
        assert torch.equal(values_of(rescaled(u, c)), rescaled(*given))
        fusion.steps += 1


def test_places_are_no_numbers(monkeypatch):
    """The first output times 3.0 is not 2.0 times the second, though these are the outputs' numbers."""
    monkeypatch.setattr(known, "_NUMBERS", itertools.count(2))

    def formula(u, c, multiplied):
        (u + c).computed()
        m = multiplied(u, c) + u * 0.25
        return m * (c.std((1, 2, 3), keepdim=True) / m.std((1, 2, 3), keepdim=True))

    fusion = Fusion()
    for step, multiplied in enumerate([lambda u, c: u * 3.0, lambda u, c: 2.0 * c, lambda u, c: u * 3.0]):
        given = single(step)
        got, _ = made_by_a_step(formula(*traced(given, fusion), multiplied))
        assert torch.equal(got, made_by_a_step(formula(*traced(given), multiplied))[0])
        fusion.steps += 1
