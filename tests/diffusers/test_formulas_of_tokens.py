"""Guidance with norms of tokens, rows or pixels, as pipelines of diffusers compute it: traced, and fused."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders import adaptive_projected_guidance, guider_utils

import fastguide
from fastguide.diffusers import traced as module
from fastguide.diffusers.formula import Formula
from fastguide.diffusers.lazy_guidance import resolved
from fastguide.diffusers.traced import Fusion

ONE = torch.ones(1, dtype=torch.float64)
PREDICTION = fastguide.StepTable.from_columns(
    torch.tensor([0]), {"x0_scale": ONE, "x0_pred": ONE, "out_x0": ONE}, name="the prediction"
)
SHAPE = (2, 4, 16, 12)


def outputs(delta=0.3):
    first = torch.randn(SHAPE, dtype=torch.float64)
    return [first, first + delta * torch.randn(SHAPE, dtype=torch.float64)]


def traced(tensors, halves=False):
    fusion = Fusion()
    if halves:
        return module.traced(torch.cat(tensors), fusion).chunk(len(tensors))
    return [module.traced(tensor, fusion) for tensor in tensors]


def norms_of(dim, factor):
    """Return guidance with a factor for each token, row or pixel, of the norms of c and of the guided prediction."""

    def formula(u, c):
        m = u + 4.0 * (c - u)
        return m * factor(*[torch.norm(each, dim=dim, keepdim=True) for each in (c, m)])

    return formula


def projected_by_rows(u, c):
    d = c - u
    d = d * torch.minimum(torch.ones_like(d), 1.2 / d.norm(p=2, dim=[-1], keepdim=True))
    share = (d * c).sum(dim=-1, keepdim=True) / (c * c).sum(dim=-1, keepdim=True)
    return c + 3.0 * (d - 0.7 * share * c)


FORMULAS = {
    "norms of rows": norms_of(-1, lambda c, m: c / m),  # as Qwen-Image and others have them
    "norms of planes, limited": norms_of((-2, -1), lambda c, m: (c / (m + 1e-8)).clamp(min=0.2, max=1.0)),  # LongCat
    "norms of pixels": norms_of(1, lambda c, m: c / m.clamp_min(1e-6)),  # JoyImage
    "a scale for each sample, and norms of rows": lambda u, c: (
        norms_of(3, lambda c, m: c / m)(u, c) * torch.tensor([0.5, 2.0], dtype=u.dtype).view(2, 1, 1, 1)
    ),
    "projected by rows": projected_by_rows,
    "projected by pixels, normalized": lambda u, c: (  # ACE-Step's, of times
        adaptive_projected_guidance.normalized_guidance(c, u, 6.0, None, 0.2, 2.5, True, norm_dim=(1,))
    ),
}


def error(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_makes_what_a_pipeline_computes(name, halves, dtype):
    """At most twice as far from float64 as the pipeline's own tensors; and by themselves, the values are those."""
    given = [each.to(dtype) for each in outputs()]
    expected, own = FORMULAS[name](*[each.double() for each in given]), FORMULAS[name](*given)
    made = FORMULAS[name](*traced(given, halves))
    assert type(made) is Formula
    assert (made.shape, made.dtype, made.device) == (own.shape, own.dtype, own.device)
    sample = torch.zeros(SHAPE)
    taken, guidance = resolved(made, sample, None)
    assert guidance.weights_from.dims is not None
    got = fastguide.guided_step(PREDICTION, 0, sample, getattr(taken, "predictions", taken), guidance)
    assert error(got, expected) <= 2 * error(own, expected) + 1e-7
    assert torch.equal(made.clone(), own)


# ---- In a shape of their own ----


WHOLE = {
    "reshape(B, 1, 1, -1)": ((4, 6, 5), lambda x: x.reshape(x.shape[0], 1, 1, -1)),
    "reshape(B, 1, -1)": ((6, 5), lambda x: x.reshape(x.shape[0], 1, -1)),
    "flatten(1).unsqueeze(1)": ((6, 5), lambda x: x.flatten(1).unsqueeze(1)),
    "flatten(2) of one channel": ((1, 6, 5), lambda x: x.flatten(2)),
    "one token": ((1, 30), lambda x: x),
}
OF_GROUPS = {
    "flatten(2)": ((4, 6, 5), lambda x: x.flatten(2), -1),
    "reshape(B, C, 1, -1)": ((4, 6, 5), lambda x: x.reshape(x.shape[0], 4, 1, -1), -1),
    "reshape(B, C / 2, H, 2 * W)": ((4, 6, 5), lambda x: x.reshape(x.shape[0], 2, 6, 10), (1, 3)),
}
RATIOS = {
    "norms": lambda c, m, dim: (
        torch.linalg.vector_norm(c, dim=dim, keepdim=True) / torch.linalg.vector_norm(m, dim=dim, keepdim=True)
    ),
    "deviations": lambda c, m, dim: c.std(dim=dim, keepdim=True) / m.std(dim=dim, keepdim=True),
    "projection": lambda c, m, dim: (
        (c * m).sum(dim=dim, keepdim=True) / ((m * m).sum(dim=dim, keepdim=True) + 1e-8)  # as in CFG-Zero*
    ),
}


def scaled(u, c, view, ratio, dim):
    """Return the guided prediction times a factor, which a pipeline computes of views of the predictions."""
    m = u + 4.0 * (c - u)
    factor = RATIOS[ratio](view(c), view(m), dim)
    return m * (factor if len(factor.shape) == len(m.shape) else factor[..., None])


def made_of_views(shape, view, ratio, dim, halves):
    u = torch.randn(shape)
    given = [u, u + 0.3 * torch.randn(shape)]
    made = scaled(*traced(given, halves), view, ratio, dim)
    return made, scaled(*given, view, ratio, dim), scaled(*[each.double() for each in given], view, ratio, dim)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_sum_over_all_of_a_sample_that_is_viewed_as_one_group_is_of_the_sample(name, ratio, batch, halves):
    """Whatever the numbers of its dimensions in that view are among the sample's own."""
    sizes, view = WHOLE[name]
    made, own, expected = made_of_views((batch, *sizes), view, ratio, -1, halves)
    assert type(made) is Formula
    sample = torch.zeros(own.shape)
    taken, guidance = resolved(made, sample, None)
    assert guidance.weights_from.dims is None
    predictions = taken if isinstance(taken, torch.Tensor) else taken.predictions
    got = fastguide.guided_step(PREDICTION, 0, sample, predictions, guidance)
    assert error(got, expected) <= 2 * error(own, expected) + 2e-7


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", OF_GROUPS)
def test_groups_of_a_view_are_none_of_the_sample_s(name, ratio, batch, halves):
    """They are computed by torch, as the pipeline wrote it."""
    sizes, view, dim = OF_GROUPS[name]
    made, own, _ = made_of_views((batch, *sizes), view, ratio, dim, halves)
    taken, guidance = resolved(made, torch.zeros(own.shape), None)
    assert guidance is None
    assert torch.equal(taken, own)


@pytest.mark.parametrize(
    "formula",
    [
        lambda u, c: c * (u.norm(dim=-1, keepdim=True) / u.norm(dim=1, keepdim=True)),  # of other elements
        lambda u, c: c * (u.norm(dim=-1, keepdim=True) / u.std((1, 2, 3), keepdim=True)),
        lambda u, c: guider_utils.rescale_noise_cfg(c * u.norm(dim=-1, keepdim=True), c, 0.5),
        lambda u, c: c * u.norm(dim=0, keepdim=True),  # of the batch
        lambda u, c: c * u.norm(dim=2)[..., None, :],
    ],
)
def test_norms_that_a_step_cannot_take_are_computed(formula):
    single = [each.float() for each in outputs()]
    assert torch.equal(torch.as_tensor(formula(*traced(single)) + 0), formula(*single))
    output = formula(*traced(single))
    if isinstance(output, torch.Tensor):
        return
    taken, guidance = resolved(output, torch.zeros(SHAPE), None)
    assert guidance is None
    assert torch.equal(taken, formula(*single))


def test_norms_of_tokens_are_of_the_sample_s_own_dimensions():
    """What a pipeline has in another shape there is made before the step."""
    single = [each.float() for each in outputs()]
    made = norms_of(-1, lambda c, m: c / m)(*[each.view(2, 64, 12) for each in traced(single)])
    taken, guidance = resolved(made, torch.zeros(2, 64, 12), None)
    assert guidance.weights_from.dims == (2,)
    assert len(taken.predictions) == 2


@pytest.mark.parametrize(
    ("view", "shape"),
    [(lambda m: m.flatten(2), (2, 4, 192)), (lambda m: m.transpose(2, 3), (2, 4, 12, 16)), (lambda m: m[:, 1:], None)],
)
def test_norms_of_tokens_in_another_shape_are_made_before_the_step(view, shape):
    given = outputs()
    single, formula = [each.float() for each in given], norms_of(-1, lambda c, m: c / m)
    made, own, expected = (view(formula(*of)) for of in (traced(single), single, given))
    assert type(made) is module.Traced
    assert made.source.guides
    sample = torch.zeros(shape or (2, 3, 16, 12))
    taken, guidance = resolved(made * 1.0, sample, None)
    assert guidance is not None
    got = taken.predictions[0]
    assert got.dtype == torch.float32
    assert error(got, expected) <= 2 * error(own, expected) + 2e-7
