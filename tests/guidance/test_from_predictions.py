"""Guidance whose weights are made from the predictions: a rescaled guidance, against its formula in plain torch."""

from __future__ import annotations

import pytest
import torch

from fastguide import Classifier, Guidance, StepTable, ddim, guided_step
from tests.support.cases import SCHEDULE, TABLES
from tests.support.textbook import ddim_step

SCALE, RESCALE = 5.0, 0.7
SHAPE = (3, 4, 6, 5)


def rescaled(predictions):
    """Lin et al. 2023, section 3.4: the guided prediction takes the conditional one's standard deviation, in part."""
    uncond, cond = predictions
    guided = uncond + SCALE * (cond - uncond)
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    factor = RESCALE * ratio + (1 - RESCALE)
    return torch.stack([(1 - SCALE) * factor, SCALE * factor], 1)


def draw(generator, dtype=torch.float64):
    x, uncond, cond, gradient = torch.randn(4, *SHAPE, dtype=dtype, generator=generator)
    return x, uncond, uncond + 0.3 * cond, gradient


def alphas(step):
    table = TABLES["ddim"]
    a = [*SCHEDULE.alphas_cumprod[table.timesteps].tolist(), 1.0]
    return a[step], a[step + 1]


@pytest.mark.parametrize("stacked", [False, True])
def test_the_weights_of_each_sample_come_from_its_predictions(stacked, backend, generator):
    x, uncond, cond, _ = draw(generator)
    if backend not in ("reference", "native"):
        x, uncond, cond = x.float(), uncond.float(), cond.float()
    predictions = torch.cat([uncond, cond]) if stacked else [uncond, cond]
    got = guided_step(TABLES["ddim"], 4, x, predictions, Guidance.from_predictions(rescaled, 2), backend=backend)
    guided = uncond + SCALE * (cond - uncond)
    std, of_cond = (m.std((1, 2, 3), keepdim=True) for m in (guided, cond))
    m = RESCALE * guided * of_cond / std + (1 - RESCALE) * guided
    expected = ddim_step(x, m, *alphas(4))
    tolerance = 1e-12 if x.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_classifier_can_be_added(generator):
    x, uncond, cond, gradient = draw(generator)
    both = Guidance.from_predictions(rescaled, 2) + Classifier(None, 2.0)
    got = guided_step(TABLES["ddim"], 4, x, [uncond, cond], both, gradient=gradient)
    weights = rescaled([uncond, cond])[..., None, None, None]
    m = weights[:, 0] * uncond + weights[:, 1] * cond
    expected = ddim_step(x, m, *alphas(4), form="epsilon", sg=2.0 * gradient)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [4, torch.tensor(4), torch.tensor([4, 4, 4])], ids=["int", "tensor", "per sample"])
def test_a_classifier_s_scale_may_differ_by_step(index, generator):
    x, uncond, cond, gradient = draw(generator)
    scales = torch.arange(10.0) / 2
    both = Guidance.from_predictions(rescaled, 2) + Classifier.per_step(None, scales)
    got = guided_step(TABLES["ddim"], index, x, [uncond, cond], both, gradient=gradient)
    weights = rescaled([uncond, cond])[..., None, None, None]
    m = weights[:, 0] * uncond + weights[:, 1] * cond
    expected = ddim_step(x, m, *alphas(4), form="epsilon", sg=2.0 * gradient)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_nothing_is_asked_of_it_before_the_predictions_are_checked(generator):
    x, uncond, cond, _ = draw(generator)
    asked = []
    guidance = Guidance.from_predictions(lambda predictions: asked.append(predictions), 2)
    for predictions in ([1, 2], [uncond.int(), cond.int()], [uncond[:, :1], cond[:, :1]]):
        with pytest.raises((TypeError, ValueError), match=r"predictions\[0\]: expected"):
            guided_step(TABLES["ddim"], 4, x, predictions, guidance)
    noising = StepTable.from_columns(torch.zeros(1, dtype=torch.int64), {})
    with pytest.raises(ValueError, match="guidance: step table takes no predictions to make weights from"):
        guided_step(noising, 0, x, [], guidance)
    assert asked == []


def test_a_compiled_step_is_one_graph(generator):
    x, uncond, cond, _ = draw(generator, torch.float32)
    guidance, table = Guidance.from_predictions(rescaled, 2), ddim(SCHEDULE, 10)

    def step(x, uncond, cond):
        return guided_step(table, torch.tensor(4), x, [uncond, cond], guidance)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, uncond, cond), step(x, uncond, cond))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Guidance.from_predictions(3, 2), TypeError, "weights_from: expected a callable, got int"),
        (lambda: Guidance.from_predictions(rescaled, 1), ValueError, "num_predictions: expected an integer from 2 on"),
    ],
)
def test_construction_is_checked(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("weights", [torch.ones(3), torch.ones(2, 2), None])
def test_what_it_returns_is_checked(weights, generator):
    x, uncond, cond, _ = draw(generator)
    guidance = Guidance.from_predictions(lambda predictions: weights, 2)
    with pytest.raises(ValueError, match=r"weights_from: expected it to return shape \(3, 2\), got"):
        guided_step(TABLES["ddim"], 4, x, [uncond, cond], guidance)
