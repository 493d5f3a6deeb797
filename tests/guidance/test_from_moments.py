"""Guidance whose weights come from moments: against each formula written out in float64, and what a function may do."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import (
    AdaptiveProjected,
    ClassifierFree,
    MagnitudeAware,
    Normalized,
    PerpNeg,
    Perturbed,
    Tangential,
    ZeroStar,
    as_guidance,
    guided_step,
)

SHAPE = (3, 4, 6, 5)
TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)


def dot(a, b):
    return (a * b).flatten(1).sum(1).view(-1, 1, 1, 1)


def norm(a):
    return dot(a, a).sqrt()


def std(a):
    return a.flatten(1).std(1).view(-1, 1, 1, 1)


def rescaled(m, c, phi):
    return phi * m * std(c) / std(m) + (1 - phi) * m


def zero_star(s, phi=0.0, cond=False):
    def formula(u, c):
        fitted = dot(c, u) / (dot(u, u) + 1e-8) * u
        return rescaled((c if cond else fitted) + s * (c - fitted), c, phi)

    return formula


def projected(s, eta, threshold, phi=0.0, cond=False):
    def formula(u, c):
        d = c - u
        d = d * (threshold / norm(d)).clamp(max=1)
        unit = c / norm(c)
        along = dot(d, unit) * unit
        return rescaled((c if cond else u) + s * (d - along + eta * along), c, phi)

    return formula


def tangential(s, cond=False):
    def formula(u, c):
        rows = torch.stack([c, u], 1).flatten(2)
        _, _, right = torch.linalg.svd(rows, full_matrices=False)
        first = right[:, 0].view_as(u)
        damped = dot(u, first) * first
        return (c if cond else damped) + s * (c - damped)

    return formula


def magnitude(s, alpha, cond=False):
    def formula(u, c):
        damping = torch.exp(-alpha * norm(c - u) / norm(u))
        return c + s * damping * (c - u) if cond else u + (1 + (s - 1) * damping) * (c - u)

    return formula


def limited(m, c, most):
    ratio = norm(c) / norm(m)
    return m * (ratio if most is None else (most * ratio).clamp(max=1))


def perp_neg(s, k):
    def formula(e, p, n):
        p, n = p - e, n - e
        return e + s * (p - k * (n - dot(n, p) / dot(p, p) * p))

    return formula


FORMULAS = {
    "rescaled": (ClassifierFree(7.5, guidance_rescale=0.7), lambda u, c: rescaled(u + 7.5 * (c - u), c, 0.7)),
    "rescaled in the paper's form": (
        ClassifierFree.from_w(2.0, guidance_rescale=0.5), lambda u, c: rescaled(c + 2.0 * (c - u), c, 0.5),
    ),
    "zero star": (ZeroStar(5.0, zero_init_steps=0), zero_star(5.0)),
    "zero star of cond": (ZeroStar(5.0, zero_init_steps=0, base="cond"), zero_star(5.0, cond=True)),
    "zero star, rescaled": (ZeroStar(5.0, zero_init_steps=0, guidance_rescale=0.3), zero_star(5.0, 0.3)),
    "projected": (AdaptiveProjected(7.5, norm_threshold=5.0), projected(7.5, 0.0, 5.0)),
    "projected, all kept": (AdaptiveProjected(7.5, eta=1.0, norm_threshold=3.0), projected(7.5, 1.0, 3.0)),
    "projected, of any length": (AdaptiveProjected(7.5, eta=0.2, norm_threshold=None), projected(7.5, 0.2, 1e9)),
    "projected of cond, rescaled": (
        AdaptiveProjected(7.5, norm_threshold=9.0, guidance_rescale=0.5, base="cond"),
        projected(7.5, 0.0, 9.0, 0.5, True),
    ),
    "tangential": (Tangential(7.5), tangential(7.5)),
    "tangential of cond": (Tangential(7.5, base="cond"), tangential(7.5, True)),
    "magnitude": (MagnitudeAware(10.0), magnitude(10.0, 8.0)),
    "magnitude of cond": (MagnitudeAware(10.0, alpha=2.0, base="cond"), magnitude(10.0, 2.0, True)),
    "perturbed": (Perturbed(7.5, 3.0), lambda u, c, p: u + 7.5 * (c - u) + 3.0 * (c - p)),
    "perturbed of cond, rescaled": (
        Perturbed(7.5, guidance_rescale=0.7, base="cond"),
        lambda u, c, p: rescaled(c + 7.5 * (c - u) + 2.8 * (c - p), c, 0.7),
    ),
    "normalized": (Normalized(7.5), lambda u, c: limited(u + 7.5 * (c - u), c, None)),
    "normalized of cond, at most": (
        Normalized(7.5, at_most=1.1, base="cond"), lambda u, c: limited(c + 7.5 * (c - u), c, 1.1),
    ),
    "perpendicular": (PerpNeg(8.0), perp_neg(8.0, 1.0)),
    "perpendicular, half": (PerpNeg(8.0, 0.5), perp_neg(8.0, 0.5)),
}  # fmt: skip


def predictions(count, distance=0.3, dtype=torch.float64, shape=SHAPE):
    generator = torch.Generator().manual_seed(count)
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    others = [first + distance * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [each.to(dtype) for each in (first, *others)]


def guided(guidance, given, backend=None):
    """The guided prediction, in float64."""
    x = torch.zeros(given[0].shape, dtype=torch.float64)
    return guided_step(PREDICTION, 0, x, given, guidance, backend=backend)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("distance", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("name", FORMULAS)
def test_weights_are_the_formula_s(name, distance, backend):
    guidance, formula = FORMULAS[name]
    given = predictions(guidance.num_predictions, distance)
    expected = formula(*given)
    assert (guided(guidance, given, backend) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMULAS)
def test_predictions_of_few_digits_lose_no_guidance(name, dtype):
    """Where they differ by a hundredth, less than 1e-5 of what guidance adds is lost."""
    guidance, formula = FORMULAS[name]
    given = predictions(guidance.num_predictions, 0.01, dtype)
    expected = formula(*[each.double() for each in given])
    signal = (expected - given[0].double()).norm()
    x = torch.zeros(SHAPE)
    got = guided_step(PREDICTION, 0, x, given, guidance)
    assert (got.double() - expected).norm() <= 1e-5 * signal


def double(value):
    return torch.tensor([value], dtype=torch.float64)


ONLY_THE_PREDICTION = {"x0_scale": double(1.0), "x0_pred": double(1.0), "out_x0": double(1.0)}
PREDICTION = fastguide.StepTable.from_columns(torch.tensor([0]), ONLY_THE_PREDICTION, name="the prediction")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_takes_them(name, whole):
    """As one tensor along the batch as well, and each sample by itself."""
    guidance, formula = FORMULAS[name]
    given = predictions(guidance.num_predictions, dtype=torch.float32)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    got = guided_step(TABLE, 3, x, torch.cat(given) if whole else given, guidance)
    expected = guided_step(TABLE, 3, x, formula(*[each.double() for each in given]).float())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    alone = guided_step(TABLE, 3, x[1:2], [each[1:2] for each in given], guidance)
    assert torch.equal(alone, got[1:2])


def test_scales_of_samples_and_steps():
    given = predictions(2)
    per_sample = ZeroStar([1.0, 5.0, 9.0], zero_init_steps=0, guidance_rescale=torch.tensor([0.0, 0.5, 1.0]))
    assert per_sample.batch == 3
    got = guided(per_sample, given)
    for sample, (scale, phi) in enumerate(((1.0, 0.0), (5.0, 0.5), (9.0, 1.0))):
        expected = zero_star(scale, phi)(*given)[sample]
        torch.testing.assert_close(got[sample], expected, rtol=1e-12, atol=1e-12)
    per_step = ClassifierFree.per_step([1.0, 4.0], guidance_rescale=0.5)
    assert per_step.steps == 2
    two = fastguide.StepTable.from_columns(
        torch.tensor([1, 0]), {name: values.expand(2) for name, values in ONLY_THE_PREDICTION.items()}, name="two"
    )
    for backend in ("native", "reference"):
        for step, scale in enumerate((1.0, 4.0)):
            got = guided_step(two, step, torch.zeros_like(given[0]), given, per_step, backend=backend)
            expected = rescaled(given[0] + scale * (given[1] - given[0]), given[1], 0.5)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_sampler_takes_them():
    def model(x, t, condition):
        return torch.tanh(x + condition.view(-1, 1, 1, 1))

    x, conditions = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4)), torch.tensor([1.0, 2.0, 3.0])
    got = fastguide.Sampler(model, TABLE, MagnitudeAware(4.0))(x, cond=conditions, uncond=torch.zeros(3))
    expected, formula = x, magnitude(4.0, 8.0)
    for index, t in enumerate(TABLE.timesteps):
        outputs = [model(expected, t, each).double() for each in (torch.zeros(3), conditions)]
        expected = guided_step(TABLE, index, expected, formula(*outputs).float())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_degenerate_predictions_are_defined():
    zero, some = torch.zeros(SHAPE, dtype=torch.float64), predictions(2)[0]
    for guidance in (
        ClassifierFree(4.0, guidance_rescale=0.7), ZeroStar(4.0, zero_init_steps=0), AdaptiveProjected(4.0),
        Tangential(4.0), MagnitudeAware(4.0), Normalized(4.0),
    ):  # fmt: skip
        assert torch.equal(guided(guidance, [zero, zero]), zero)
        assert bool(guided(guidance, [zero, some]).isfinite().all())
        assert bool(guided(guidance, [some, zero]).isfinite().all())
        torch.testing.assert_close(guided(guidance, [some, some]), some, rtol=1e-9, atol=1e-9)
    assert bool(guided(PerpNeg(4.0), [some, some, zero]).isfinite().all())


def test_what_is_not_finite_stays_in_its_sample():
    given = predictions(2, dtype=torch.float32)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    expected = guided_step(TABLE, 3, x, given, ZeroStar(4.0, guidance_rescale=0.5))
    given[1][1, 0, 0, 0] = float("nan")
    got = guided_step(TABLE, 3, x, given, ZeroStar(4.0, guidance_rescale=0.5))
    assert torch.equal(got[::2], expected[::2])
    assert not bool(got[1].isfinite().any())


def test_a_scale_on_a_device_is_not_read_on_the_host():
    """``meta`` tensors have no values that could be read."""
    scale = torch.full((3,), 2.0, device="meta")
    assert ZeroStar(scale).batch == 3
    assert ClassifierFree(scale, guidance_rescale=0.5).batch == 3


def test_weights_may_be_looked_at():
    guidance, given = MagnitudeAware(10.0), predictions(2)
    assert guidance.last_weights is None
    guided_step(TABLE, 3, torch.zeros(SHAPE), given, guidance)
    effective = 1 + 9.0 * torch.exp(-8.0 * norm(given[1] - given[0]) / norm(given[0])).flatten()
    torch.testing.assert_close(guidance.last_weights[0, :, 1].double(), effective, rtol=1e-6, atol=1e-6)
    assert ClassifierFree(3.0).last_weights is None


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_classifier_beside_them_keeps_its_scale(backend):
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    u, c = predictions(2)
    both = ClassifierFree(4.0, guidance_rescale=0.7) + fastguide.Classifier(None, [1.0, 2.0, 3.0])
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = guided_step(TABLE, 3, x, [u, c], both, gradient=gradient, backend=backend)
    m = rescaled(u + 4.0 * (c - u), c, 0.7)
    alone = fastguide.Classifier(None, [1.0, 2.0, 3.0])
    expected = guided_step(TABLE, 3, x, m, alone, gradient=gradient, backend="reference")
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


# ---- Anyone's own ----


@as_guidance(predictions=2)
def squeezed(v, guidance_scale, limit=2.0, clip=True):
    """Return guidance no longer than some times the conditional prediction."""
    uncond, cond = v.predictions
    m = uncond + guidance_scale * (cond - uncond)
    longest = limit * v.norm(cond)
    return v.where(v.norm(m) > longest, longest / v.norm(m) * m, m) if clip else m


def test_a_function_of_one_s_own():
    given = predictions(2, 1.0)
    u, c = given
    m = u + 6.0 * (c - u)
    expected = m * (2.0 * norm(c) / norm(m)).clamp(max=1.0)
    torch.testing.assert_close(guided(squeezed(6.0), given), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guided(squeezed(6.0, clip=False), given), m, rtol=1e-12, atol=1e-12)
    scales = squeezed([1.0, 6.0, 6.0], limit=[9.0, 2.0, 9.0])
    torch.testing.assert_close(guided(scales, given)[1], expected[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(guided(scales, given)[2], m[2], rtol=1e-12, atol=1e-12)


def test_powers_and_abs_of_numbers():
    @as_guidance(predictions=2)
    def powers(v, guidance_scale):
        uncond, cond = v.predictions
        return v.norm(cond) ** 2 * uncond + abs(v.sum(uncond)) ** 3 * cond

    u, c = given = predictions(2, 1.0)
    total = u.flatten(1).sum(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(guided(powers(1.0), given), dot(c, c) * u + total.abs() ** 3 * c, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_parameters_may_be_called_as_anything(backend):
    """As a moment, as a coefficient of the row, or as what guidance within an interval goes by."""

    @as_guidance(predictions=2)
    def named(v, step, numel, dot_0_1=3.0, x0_scale=5.0, active=7.0):
        uncond, cond = v.predictions
        known = step + 10.0 * v.step + (numel + v.std(cond)) + x0_scale
        return known * uncond + (active * dot_0_1 + v.dot(uncond, cond - uncond)) * (cond - uncond)

    u, c = predictions(2)
    x = torch.zeros(SHAPE, dtype=torch.float64)
    m = (1.0 + 10.0 * 0.0 + 2.0 + std(c) + 5.0) * u + (21.0 + dot(u, c - u)) * (c - u)
    bounded = named(1.0, 2.0).within(PREDICTION, 0.0, 1.0)
    for guidance in (named(1.0, 2.0), bounded):
        got = guided_step(PREDICTION, 0, x, [u, c], guidance, backend=backend)
        torch.testing.assert_close(got, m, rtol=1e-12, atol=1e-12)


def wrong(body, count=2):
    return as_guidance(predictions=count)(body)


REFUSED = {
    "a branch": (lambda v, s: v.predictions[0] if s > 1.0 else v.predictions[1], "use v.where"),
    "a branch on a norm": (lambda v, s: v.predictions[bool(v.norm(v.predictions[0]))], "v.where"),
    "a value on the host": (lambda v, s: float(s) * v.predictions[0], "read on the host"),
    "a product": (lambda v, s: v.predictions[0] * v.predictions[1], "product of two vectors"),
    "no vector": (lambda v, s: v.norm(v.predictions[0]), "expected .* to return a vector, got Scalar"),
    "a number added": (lambda v, s: v.predictions[0] + s, "expected a vector to be added to a vector, got Scalar"),
    "an attribute": (lambda v, s: v.predictions[0].abs(), "has no 'abs'"),
    "another operation": (lambda v, s: v.quantile(v.predictions[0]), "v has no 'quantile'"),
    "a norm of a number": (lambda v, s: v.norm(s) * v.predictions[0], "expected a vector, got Scalar"),
    "a tensor": (lambda v, s: torch.ones(3) * v.predictions[0], "expected a number, got Tensor"),
    "a function of torch's": (lambda v, s: torch.relu(v.predictions[0]), "no torch.relu of a vector; supported are"),
    "one of a number": (lambda v, s: torch.exp(s) * v.predictions[0], "no torch.exp of a scalar; supported are"),
    "abs of a vector": (lambda v, s: abs(v.predictions[0]), "no abs of a vector, .* supported are"),
    "a power of a vector": (lambda v, s: v.predictions[0] ** 2, "no power of a vector, .* supported are"),
    "a power that is no whole one": (lambda v, s: s**0.5 * v.predictions[0], "a power from 1 to 8, got 0.5"),
    "no comparison": (lambda v, s: v.where(s, v.predictions[0], v.predictions[1]), "expected a comparison"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_program_cannot_do_is_refused(name):
    function, message = REFUSED[name]
    with pytest.raises((TypeError, AttributeError), match=message):
        wrong(function)(2.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="base: expected 'uncond' or 'cond', got 'both'"):
        ZeroStar(3.0, base="both")
    with pytest.raises(TypeError, match="guidance_scale: expected a number"):
        ZeroStar("3")
    with pytest.raises(ValueError, match=r"predictions: expected .* 2"):
        as_guidance(predictions=1)
    with pytest.raises(TypeError, match="missing a required argument: 'guidance_scale'"):
        squeezed()
    given = predictions(3)
    with pytest.raises(ValueError, match="predictions"):
        guided_step(TABLE, 3, torch.zeros(SHAPE), given, ZeroStar(3.0))


def test_deviations_and_sums_are_torch_s():
    given = predictions(2, 1.0)

    @as_guidance(predictions=2)
    def measured(v):
        uncond, cond = v.predictions
        return v.std(cond) * uncond + v.sum(cond) * (cond - uncond)

    u, c = given
    expected = std(c) * u + c.flatten(1).sum(1).view(-1, 1, 1, 1) * (c - u)
    torch.testing.assert_close(guided(measured(), given), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "operation"), [("native", "guided_step"), ("reference", "mul")])
def test_nothing_is_copied_to_the_device_once_it_was_used(backend, operation):
    """Constants of a formula are no tensors, and parameters are moved once: a captured loop has no place for copies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            names.append(str(function))
            return function(*arguments, **(keywords or {}))

    names = []
    for guidance, _ in FORMULAS.values():
        given = predictions(guidance.num_predictions, dtype=torch.float32)
        guided_step(TABLE, 3, torch.zeros(SHAPE), given, guidance, backend=backend)
        with Note():
            guided_step(TABLE, 3, torch.zeros(SHAPE), given, guidance, backend=backend)
    assert any(operation in name for name in names)
    assert not [name for name in names if "lift_fresh" in name or "_local_scalar_dense" in name or "item" in name]
