"""The CUDA kernel that guides groups: three predictions, deviations and means, and a weight of the sample.

Compiled for the host, and its PTX interpreted, without races. Norms of two predictions are in test_groups_kernel.py.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from fastguide import as_guidance
from tests.step.backends.test_groups_kernel import DTYPES, SHAPES, arguments_of, check, expected_of
from tests.step.backends.test_groups_step import (
    CHANGED,
    STEPS,
    case,
    check_equal,
    check_on_the_host,
    launches_of,
    one_and_two,
)
from tests.support import device_code
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]


@as_guidance(predictions=3, dim=-1)
def perturbed(v, scale):
    """Return perturbed guidance with the norm of the conditional prediction; no deviations."""
    u, c, p = v.predictions
    guided = u + scale * (c - u) + 2.8 * (c - p)
    return v.norm(c) / v.norm(guided) * guided


@as_guidance(predictions=2, dim=-1)
def rescaled(v, scale):
    """Return two predictions' guidance with the deviation of the conditional one, in part."""
    u, c = v.predictions
    guided = u + scale * (c - u)
    return (0.7 * v.std(c) / v.std(guided) + 0.3) * guided


@as_guidance(predictions=3, dim=-1)
def of_means(v, scale):
    """Return what has deviations and a mean of three predictions."""
    u, c, p = v.predictions
    return u + scale * v.std(c) / v.std(u) * (p - u) + v.sum(p) / v.numel * c


@as_guidance(predictions=2, dim=-1)
def with_sample(v, scale):
    """Return what has a weight of the sample, and its deviation."""
    u, c = v.predictions
    aligned = v.dot(u, v.sample) / v.dot(v.sample, v.sample)
    return u + scale * v.std(v.sample) / v.std(c) * (c - u) + 0.3 * aligned * v.sample


GUIDANCES = {
    "three": perturbed(3.0),
    "deviations": rescaled(3.0),
    "three and means": of_means(2.0),
    "the sample": with_sample(2.0),
}
STATISTICS = {"sum": torch.sum, "std": torch.std, "norm": torch.linalg.vector_norm}


def guided(name, x, predictions):
    """The formulas in float64, of the vectors themselves: no moment is known here."""
    x, u, c, *others = (each.double() for each in (x, *predictions))

    def of(statistic, vector):
        return STATISTICS[statistic](vector, dim=-1, keepdim=True)

    if name == "three":
        m = u + 3 * (c - u) + 2.8 * (c - others[0])
        return of("norm", c) / of("norm", m) * m
    if name == "deviations":
        m = u + 3 * (c - u)
        return (0.7 * of("std", c) / of("std", m) + 0.3) * m
    if name == "three and means":
        return u + 2 * of("std", c) / of("std", u) * (others[0] - u) + of("sum", others[0]) / u.shape[-1] * c
    aligned = of("sum", u * x) / of("sum", x * x)
    return u + 2 * of("std", x) / of("std", c) * (c - u) + 0.3 * aligned * x


def check_guided(name, arguments):
    """Compare the guided prediction that a launch has left with the formula: as near as float32 says it."""
    expected = guided(name, arguments.sample, arguments.predictions)
    found = arguments.scratch.view(torch.float32)[: expected.numel()].view(expected.shape)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-7 * float(expected.abs().max()))


# ---- The same code compiled for the host ----


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", GUIDANCES)
def test_weights_and_step_are_the_reference_s(name, shape):
    for dtype in DTYPES.values():
        arguments = arguments_of(GUIDANCES[name], shape, dtype)
        for order in (1, 2):
            device_code.guided_step(*arguments, order=order)
            check(arguments, *expected_of(arguments))


@pytest.mark.parametrize("name", GUIDANCES)
def test_guided_predictions_are_the_formula_s(name):
    for shape, dtype in itertools.product([(3, 9, 64), (3, 11, 100), (3, 2, 4099)], DTYPES.values()):
        arguments = arguments_of(GUIDANCES[name], shape, dtype)
        device_code.guided_step(*arguments, step_groups=False)
        check_guided(name, arguments)


def test_of_what_nearly_cancels_no_more_is_lost_than_its_rounding():
    """To a thousandth of the terms, before it is given the norm or the deviation of one of them."""
    x, u, other, noise = torch.randn(4, 2, 30, 64)
    c = u + 0.4 * other
    p = c + (u + 3 * (c - u) + 1e-3 * noise) / 2.8
    near = 2 / 3 * u + 1e-3 * noise  # u + 3 (near - u) = 3e-3 noise
    for name, predictions in {"three": [u, c, p], "deviations": [u, near]}.items():
        arguments = arguments_of(GUIDANCES[name], x.shape, sample=x, predictions=predictions)
        device_code.guided_step(*arguments, step_groups=False)
        check_guided(name, arguments)


def test_a_mean_that_is_far_from_zero_leaves_the_deviation():
    x, u, c = torch.randn(3, 2, 30, 64)
    arguments = arguments_of(GUIDANCES["deviations"], x.shape, sample=x, predictions=[1000 + u, 1000 + c])
    device_code.guided_step(*arguments, step_groups=False)
    check_guided("deviations", arguments)


@pytest.mark.parametrize("name", STEPS)
def test_one_launch_makes_the_step_too(name):
    """With all that a step may have, to the bits of two launches."""
    for (guidance, dtype), shape in itertools.product(
        zip(GUIDANCES.values(), [*DTYPES.values(), torch.bfloat16], strict=True), [(3, 9, 64), (3, 11, 100)]
    ):
        check_on_the_host(case(name, guidance, shape, dtype))


@pytest.mark.parametrize("name", ["three", "the sample"])
def test_a_third_term_may_begin_anywhere(name):
    """Between vectors, all are read one by one; nothing else changes, in one launch and in two."""
    arguments = arguments_of(GUIDANCES[name], (3, 9, 64), torch.bfloat16 if name == "three" else torch.float32)
    third = arguments.sample if name == "the sample" else arguments.predictions[2]
    view = torch.zeros(3, 580, dtype=third.dtype)[:, 1:577].view(third.shape).copy_(third)
    if name == "the sample":
        moved = arguments._replace(sample=view)
    else:
        moved = arguments._replace(predictions=[*arguments.predictions[:2], view])
    found = []
    for each, step_groups in itertools.product((arguments, moved), (True, False)):
        own = each._replace(out=torch.zeros_like(each.out), made=torch.zeros_like(each.made))
        accesses = device_code.guided_step(*own, step_groups=step_groups)
        steps_alone = name == "three" and not step_groups  # which does not read the third prediction
        assert (accesses > 0) == (each is arguments or steps_alone)
        found.append({"out": own.out, "made": own.made})
    for each in found[1:]:
        check_equal(each, found[0])


def test_a_group_has_the_same_bits_alone():
    for guidance in GUIDANCES.values():
        arguments = arguments_of(guidance, (3, 20, 40), torch.bfloat16)
        device_code.guided_step(*arguments)
        predictions = [each[1:2, 13:16].contiguous() for each in arguments.predictions]
        alone = arguments_of(
            guidance, (1, 3, 40), torch.bfloat16, sample=arguments.sample[1:2, 13:16], predictions=predictions
        )
        device_code.guided_step(*alone)
        assert torch.equal(alone.out[0], arguments.out[1, 13:16])
        assert torch.equal(alone.made, arguments.made.view(3, 20, -1)[1, 13:16])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_next_sample_may_be_written_over_any_prediction(number):
    arguments = case("history", GUIDANCES["three and means"], (3, 11, 100), torch.float32)
    history = arguments.history.clone()
    device_code.guided_step(*arguments)
    expected = arguments.out
    moved = arguments._replace(out=arguments.predictions[number], history=history)
    device_code.guided_step(*moved)
    assert torch.equal(moved.out, expected)


# ---- Interpreted ----


@pytest.mark.parametrize(
    ("name", "step", "shape", "dtype", "one_by_one"),
    [
        ("three", "nothing", (3, 17, 64), "bfloat16", False),
        ("deviations", "an anchor", (3, 5, 40), "float32", False),
        ("three and means", "cursors", (3, 9, 100), "float16", True),
        ("the sample", "a cursor", (3, 11, 3), "float32", False),
        ("three and means", "nothing", (1, 2, 2056), "bfloat16", False),  # a block's
    ],
)
def test_the_kernel_interpreted(library, name, step, shape, dtype, one_by_one):
    """One launch and two: nothing is wrong, the bits are the same, and all is as near as on the host."""
    placed = Placed(**CHANGED)
    arguments = case(step, GUIDANCES[name], shape, DTYPES[dtype], place=placed)
    one, two, found = one_and_two(library, arguments, placed, one_by_one)
    assert found == [[], [], []]
    check_equal(one, two)
    device_code.guided_step(*arguments)
    check(arguments, one["out"], one["made"])


def test_words_that_lead_nowhere_stay_within_the_kernel(library):
    """Of three terms, some words lead to sums."""
    program, _ = GUIDANCES["three"].weights_from.on(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-4, 40, program.shape, generator=generator).int()
    words[0, 0] = 10**6
    placed = Placed()
    arguments = arguments_of(GUIDANCES["three"], (2, 17, 64), place=placed, program=words)
    (only,) = launches_of(arguments)
    found = placed.launch(library, only)
    assert [text for text in found if "initialised" not in text] == []


def test_the_interpreter_finds_what_is_missing(library):
    """A pass adds up into the memory of the one before: each of the loop's barriers is needed for that."""
    placed = Placed()
    arguments = arguments_of(GUIDANCES["three and means"], (2, 9, 64), place=placed)
    (only,) = launches_of(arguments)
    text = library.module.sources[library.mangled[only.kernel]]
    barriers = [found.span() for found in re.finditer(r"bar\.\w+[^;]*;", text)]
    for begin, end in barriers[1:3]:
        without = library.changed(only.kernel, lambda text, begin=begin, end=end: text[:begin] + text[end:])
        assert any("race" in found for found in placed.launch(without, only)), text[begin - 200 : end]
