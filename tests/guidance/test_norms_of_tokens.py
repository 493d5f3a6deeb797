"""Guidance whose norms are of each token, row or pixel: against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import (
    AdaptiveProjected,
    ClassifierFree,
    History,
    Inpainting,
    Normalized,
    as_guidance,
    guided_step,
)

SCHEDULE = fastguide.NoiseSchedule.linear()
TABLE = fastguide.ddim(SCHEDULE, 10)
BACKENDS = [None, "reference"]


def norm(a, dim):
    return (a * a).sum(dim, keepdim=True).sqrt()


def normalized(u, c, s, dim, most=None):
    m = u + s * (c - u)
    ratio = norm(c, dim) / norm(m, dim)
    return m * (ratio if most is None else (most * ratio).clamp(max=1))


def projected(u, c, s, dim, threshold, eta):
    d = c - u
    d = d * (threshold / norm(d, dim)).clamp(max=1)
    along = (d * c).sum(dim, keepdim=True) / norm(c, dim) ** 2 * c
    return c + s * (d - along + eta * along)


def drawn(shape, *, distance=0.3, dtype=torch.float32, count=2):
    x, first = torch.randn(shape), torch.randn(shape)
    others = [first + distance * torch.randn(shape) for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (x, first, *others)]


def stepped(x, m, index=4):
    """Return the next sample of a prediction that nothing guides, in float64."""
    return guided_step(TABLE, index, x.double(), m, backend="reference")


CASES = {
    "tokens": ((3, 37, 64), -1),
    "few channels": ((2, 33, 6), 2),
    "tokens longer than a block": ((2, 3, 700), -1),
    "tokens longer than a part": ((1, 2, 9001), -1),
    "rows": ((2, 4, 8, 24), -1),
    "channels of images": ((2, 3, 8, 24), (2, 3)),
    "channels, which lie apart": ((2, 4, 8, 6), 1),
    "time, which lies apart": ((2, 50, 16), 1),
    "of six dimensions": ((1, 2, 5, 2, 4, 3), 2),
    "the whole sample": ((2, 4, 8), (1, -1)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_each_group_gets_the_norm_of_its_own(name, dtype, backend):
    shape, dim = CASES[name]
    x, u, c = (tensor.to(dtype) for tensor in drawn(shape))
    given = Normalized(4.0, dim=dim)
    for guidance, formula in (
        (given, lambda u, c: normalized(u, c, 4.0, dim)),
        (Normalized(4.0, dim=dim, at_most=0.9), lambda u, c: normalized(u, c, 4.0, dim, 0.9)),
        (
            AdaptiveProjected(4.0, norm_dim=dim, eta=0.2, norm_threshold=1.0, base="cond"),
            lambda u, c: projected(u, c, 4.0, dim, 1.0, 0.2),
        ),
    ):
        out = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        guided_step(TABLE, 4, x, [u, c], guidance, out=out, backend=backend)
        expected = stepped(x.double(), formula(u.double(), c.double()))
        assert (out - expected).abs().max() < (1e-12 if dtype == torch.float64 else 2e-6) * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_any_layout_of_the_sample(memory_format, backend):
    x, u, c = (tensor.to(memory_format=memory_format) for tensor in drawn((2, 8, 6, 5)))
    for dim in (1, 3, (1, 3), (2, 3)):
        out = guided_step(TABLE, 4, x, [u, c], Normalized(3.0, dim=dim), backend=backend)
        expected = stepped(x.double(), normalized(u.double(), c.double(), 3.0, dim))
        torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=3e-6)
        assert out.stride() == x.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_may_lie_apart(backend):
    x, u, c = drawn((3, 10, 16))
    whole = torch.randn(3, 4, 10, 16)
    whole[:, 1], whole[:, 2] = u, c
    out = guided_step(TABLE, 4, x, [whole[:, 1], whole[:, 2]], Normalized(3.0, dim=-1), backend=backend)
    stacked = guided_step(TABLE, 4, x, torch.cat([u, c]), Normalized(3.0, dim=-1), backend=backend)
    assert torch.equal(out, stacked)
    torch.testing.assert_close(
        out, stepped(x.double(), normalized(u.double(), c.double(), 3.0, -1)).float(), rtol=1e-5, atol=3e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_samples_and_steps(backend):
    x, u, c = drawn((3, 7, 32))
    scales = torch.rand(10, 3) * 5 + 1
    indices = torch.tensor([4, 0, 9])
    guidance = Normalized(scales, dim=-1)
    out = guided_step(TABLE, indices, x, [u, c], guidance, backend=backend)
    for k, index in enumerate(indices.tolist()):
        m = normalized(u[k : k + 1].double(), c[k : k + 1].double(), scales[index, k].double(), -1)
        torch.testing.assert_close(
            out[k : k + 1], stepped(x[k : k + 1].double(), m, index).float(), rtol=1e-5, atol=3e-6
        )
    part = guided_step(TABLE, 4, x[1:], [u[1:], c[1:]], guidance.of_samples(slice(1, 3)), backend=backend)
    assert torch.equal(part, guided_step(TABLE, 4, x, [u, c], guidance, backend=backend)[1:])


def plain_step(table, x, u, c, guidance, dim, backend, **more):
    """Return the step of the guided prediction as one prediction, which nothing guides, and the guided step."""
    s = 4.0
    m = normalized(u.double(), c.double(), s, dim).float()
    made = guided_step(table, 4, x, [u, c], guidance, backend=backend, **more)
    return made, guided_step(table, 4, x, m, backend=backend, **more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_the_sample_s(backend):
    table = fastguide.ddim(SCHEDULE, 10, eta=1.0)
    x, u, c = drawn((3, 9, 20))
    guidance = Normalized(4.0, dim=-1)
    for more in (
        {"noise": torch.randn(3, 9, 20)},
        {"seeds": torch.tensor([5, 7, 5])},
        {"seeds": torch.tensor(3)},
    ):
        made, expected = plain_step(table, x, u, c, guidance, -1, backend, **more)
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=3e-6)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    made = guided_step(table, 4, x, [u, c], guidance, generator=generators[0], backend=backend)
    m = normalized(u.double(), c.double(), 4.0, -1).float()
    expected = guided_step(table, 4, x, m, generator=generators[1], backend=backend)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=3e-6)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_that_a_step_writes(backend):
    x, u, c = drawn((2, 9, 20))
    guidance = Normalized(4.0, dim=-1)
    results = []
    m = normalized(u.double(), c.double(), 4.0, -1).float()
    known = Inpainting(torch.rand(x.shape).round(), torch.randn(x.shape), torch.randn(x.shape))
    for given, how in (([u, c], guidance), (m, None)):
        original, staged = torch.empty_like(x), torch.empty(4, 9, 20, dtype=torch.bfloat16)
        out = guided_step(TABLE, 4, x, given, how, original=original, staged=staged, inpainting=known, backend=backend)
        results.append((out, original, staged.float()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2 if ours is results[0][2] else 1e-5, atol=3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_and_histories_are_the_sample_s(backend):
    x, u, c = drawn((2, 9, 20))
    guidance = Normalized(4.0, dim=-1)
    table = fastguide.ddim(SCHEDULE, 10).with_dynamic_thresholding(0.9, sample_max_value=1.5)
    made, expected = plain_step(table, x, u, c, guidance, -1, backend)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=3e-6)
    table = fastguide.dpm_solver(SCHEDULE, 10)
    m, loops = normalized(u.double(), c.double(), 4.0, -1).float(), []
    for given, how in (([u, c], guidance), (m, None)):
        history, sample = History(table, x), x
        for index in range(3):
            sample = guided_step(table, index, sample, given, how, history=history, backend=backend)
        loops.append(sample)
    torch.testing.assert_close(*loops, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_norms_are_defined_and_what_is_not_finite_stays_in_its_token(backend):
    x, u, c = drawn((2, 5, 16))
    u[0, 1], c[0, 1] = 0, 0
    c[1, 2, 3] = torch.nan
    c[1, 3, 0] = torch.inf
    out = guided_step(TABLE, 4, x, [u, c], Normalized(4.0, dim=-1), backend=backend)
    finite = out.isfinite().all(-1)
    expected = torch.ones(2, 5, dtype=torch.bool)
    expected[1, 2] = expected[1, 3] = False
    assert torch.equal(finite, expected)
    torch.testing.assert_close(out[0, 1], stepped(x[0, 1].double(), torch.zeros(16).double()).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sample_and_several_predictions(backend):
    @as_guidance(predictions=3, dim=-1)
    def mixed(v, scale):
        first, second, third = v.predictions
        return (first + scale * (second - third)) * (v.norm(third) / v.norm(first))

    @as_guidance(predictions=2, dim=-1)
    def toward(v, scale):
        uncond, cond = v.predictions
        return uncond + scale * (cond - uncond) + v.dot(v.sample, cond) / v.numel * v.sample

    x, *p = (tensor for tensor in drawn((2, 7, 24), count=3))
    wide = [tensor.double() for tensor in p]
    for given, guidance, expected in (
        (p, mixed(2.0), (wide[0] + 2 * (wide[1] - wide[2])) * norm(wide[2], -1) / norm(wide[0], -1)),
        (
            p[:2],
            toward(2.0),
            wide[0] + 2 * (wide[1] - wide[0]) + (x.double() * wide[1]).mean(-1, keepdim=True) * x.double(),
        ),
    ):
        for dtype in (torch.float32, torch.float64):
            cast = [tensor.to(dtype) for tensor in given]
            out = guided_step(TABLE, 4, x.to(dtype), cast, guidance, backend=backend)
            torch.testing.assert_close(out.float(), stepped(x.double(), expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (0, 3, 2, 1)])
def test_weights_may_be_looked_at(order, backend):
    """In the order of the dimensions, in whichever the sample lies."""
    x, u, c = (tensor.permute(order) for tensor in drawn((2, 5, 3, 4)))
    m = u + 4 * (c - u)
    for dim in (1, 2, -1, (1, 2), (1, 2, 3)):
        guidance = Normalized(4.0, dim=dim)
        ratio = (norm(c, dim) / norm(m, dim)).flatten(1)
        for _ in range(3):  # checked, recorded and repeated
            guided_step(TABLE, 4, x, [u, c], guidance, backend=backend)
            assert guidance.last_weights.shape == (1, 2, ratio.shape[1], 3)
            torch.testing.assert_close(guidance.last_weights[0, ..., 0], ratio)
            torch.testing.assert_close(guidance.last_weights[0, ..., 1], 4 * ratio)


@pytest.mark.parametrize("scale", [[3.0, 5.0], torch.rand(10, 1) * 4 + 1], ids=["samples", "steps"])
def test_a_sampler_takes_them(scale):
    def model(x, t, label):
        return torch.tanh(x * label.view(-1, 1, 1)) + 0.1 * x.mean(1, keepdim=True)

    labels = {"cond": torch.tensor([0.5, 0.9]), "uncond": torch.tensor([0.1, 0.2])}
    x = torch.randn(2, 6, 16)
    guidance = Normalized(scale, dim=-1)
    sampler = fastguide.Sampler(model, TABLE, guidance)
    result = sampler(x, **labels)
    assert guidance.last_weights.shape == (1, 2, 6, 3)
    expected = x.double()
    for index, t in enumerate(TABLE.timesteps):
        u, c = (model(expected, t, labels[name].double()) for name in ("uncond", "cond"))
        s = torch.tensor(scale).view(-1, 1, 1) if isinstance(scale, list) else scale[index]
        expected = stepped(expected, normalized(u, c, s.double(), -1), index)
    torch.testing.assert_close(result, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 2])
def test_momentum_of_each_group(dim, backend):
    """With ``dim=1`` as ACE-Step's pipeline: channels over time."""
    guidance = AdaptiveProjected(4.0, eta=0.2, norm_threshold=1.0, norm_dim=dim, momentum=-0.75, base="cond")
    x, added = torch.randn(2, 9, 20, dtype=torch.float64), 0.0
    expected, sums = x, fastguide.Momentum(TABLE, guidance, x)
    for index in range(3):
        u, c = torch.randn(2, 2, 9, 20, dtype=torch.float64)
        added = c - u - 0.75 * added
        m = projected(c - added, c, 4.0, dim, 1.0, 0.2)
        x = guided_step(TABLE, index, x, [u, c], guidance, momentum=sums, backend=backend)
        expected = stepped(expected, m, index)
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_gradients_are_torch_s():
    x, u, c = (tensor.double().requires_grad_() for tensor in drawn((2, 4, 8)))
    scale = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    toward = torch.randn(2, 4, 8, dtype=torch.float64)
    out = guided_step(TABLE, 4, x, [u, c], Normalized(scale, dim=-1))
    ours = torch.autograd.grad((out * toward).sum(), (x, u, c, scale))
    expected = stepped(x, normalized(u, c, scale.view(-1, 1, 1), -1))
    theirs = torch.autograd.grad((expected * toward).sum(), (x, u, c, scale))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_intervals_and_a_classifier_beside_them():
    x, u, c = drawn((2, 5, 16))
    g = torch.randn(2, 5, 16)
    guidance = Normalized(4.0, dim=-1).within(TABLE, 0.0, 0.3)
    assert torch.equal(
        guided_step(TABLE, 4, x, [u, c], guidance), guided_step(TABLE, 4, x, [u, c], ClassifierFree(1.0))
    )
    both = Normalized(4.0, dim=-1) + fastguide.Classifier(None, 2.0)
    m = normalized(u.double(), c.double(), 4.0, -1).float()
    expected = guided_step(TABLE, 4, x, m, fastguide.Classifier(None, 2.0), gradient=g)
    torch.testing.assert_close(guided_step(TABLE, 4, x, [u, c], both, gradient=g), expected, rtol=1e-5, atol=3e-6)


def test_log_probabilities_are_of_the_guided_prediction():
    table = fastguide.ddim(SCHEDULE, 10, eta=1.0)
    x, u, c = drawn((2, 5, 16))
    z = torch.randn(2, 5, 16)
    m = normalized(u.double(), c.double(), 4.0, -1).float()
    _, ours = guided_step(table, 4, x, [u, c], Normalized(4.0, dim=-1), noise=z, return_log_prob=True)
    _, expected = guided_step(table, 4, x, m, noise=z, return_log_prob=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: Normalized(4.0, dim=0), ValueError, "dim: expected dimensions of a sample, so not 0"),
        (lambda: Normalized(4.0, dim="last"), TypeError, "dim: expected an int, several, or None"),
        (lambda: Normalized(4.0, dim=()), TypeError, "dim: expected an int, several, or None"),
        (lambda: Normalized(4.0, dim=True), TypeError, "dim: expected an int, several, or None"),
        (lambda: AdaptiveProjected(4.0, norm_dim=1, guidance_rescale=0.5), ValueError, "expected 0 with norm_dim"),
        (lambda: as_guidance(2, dim=1.5), TypeError, "dim: expected an int, several, or None"),
    ],
)
def test_bad_dimensions(made, error, message):
    with pytest.raises(error, match=message):
        made()


@pytest.mark.parametrize("dim", [3, -3, (1, -2), (2, -1)])
def test_dimensions_that_the_sample_has_not(dim):
    x, u, c = drawn((2, 5, 16))
    with pytest.raises(ValueError, match=r"norms over dimensions of a sample of shape \(2, 5, 16\), 1 to 2"):
        guided_step(TABLE, 4, x, [u, c], Normalized(4.0, dim=dim))


def test_samples_without_elements():
    for shape in ((0, 5, 16), (2, 0, 16), (2, 5, 0)):
        x = torch.randn(shape)
        assert guided_step(TABLE, 4, x, [x, x], Normalized(4.0, dim=-1)).shape == shape
