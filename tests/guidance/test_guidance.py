"""Guidance as weights, and the gradient of a classifier."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Guidance
from tests.support.cases import TABLES

CPU = torch.device("cpu")
PASS_THROUGH = fastguide.StepTable.from_columns(  # x' = m: shows the guided prediction
    torch.zeros(1, dtype=torch.int64), {"out_pred": torch.ones(1, dtype=torch.float64)}
)


def guided_prediction(guidance, predictions, backend=None):
    return fastguide.guided_step(
        PASS_THROUGH, 0, torch.zeros_like(predictions[0]), predictions, guidance, backend=backend
    )


@pytest.fixture
def predictions(generator):
    return list(torch.randn(4, 3, 5, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("scale", [-2.0, 0.0, 0.5, 1.0, 7.5])
def test_classifier_free_is_uncond_plus_scaled_difference(scale, predictions, backend):
    uncond, cond = predictions[:2]
    got = guided_prediction(ClassifierFree(scale), [uncond, cond], backend)
    torch.testing.assert_close(got, uncond + scale * (cond - uncond))
    torch.testing.assert_close(got, (1 - scale) * uncond + scale * cond)


def test_scale_0_is_unconditional_to_the_bit(predictions):
    uncond, cond = predictions[:2]
    assert torch.equal(guided_prediction(ClassifierFree(0.0), [uncond, cond]), uncond)


def test_original_form_is_the_paper_s(predictions):
    uncond, cond = predictions[:2]
    for w in (0.0, 2.5, torch.tensor([0.0, 1.0, 2.0])):
        got = guided_prediction(ClassifierFree.from_w(w), [uncond, cond])
        w = w[:, None] if isinstance(w, torch.Tensor) else w
        torch.testing.assert_close(got, (1 + w) * cond - w * uncond)


def test_negative_prompt_takes_the_unconditional_s_place(predictions):
    negative, positive = predictions[:2]
    got = guided_prediction(ClassifierFree(4.0), [negative, positive])
    torch.testing.assert_close(got, negative + 4.0 * (positive - negative))


def test_composed_adds_each_condition_s_difference(predictions, backend):
    scales = [3.0, -1.0, torch.tensor([0.5, 1.0, 2.0])]
    uncond = predictions[0]
    expected = uncond.clone()
    for s, p in zip(scales, predictions[1:], strict=True):
        expected += (s[:, None] if isinstance(s, torch.Tensor) else s) * (p - uncond)
    torch.testing.assert_close(guided_prediction(Composed(scales), predictions, backend), expected)


def test_composed_of_one_is_classifier_free(predictions):
    pair = predictions[:2]
    assert torch.equal(guided_prediction(Composed([3.0]), pair), guided_prediction(ClassifierFree(3.0), pair))


def test_anchored_weights_keep_what_plain_weights_round_away(generator):
    """Nearly equal predictions in float32: (1-s)*u + s*c loses digits that u + s*(c-u) keeps."""
    uncond = torch.randn(1, 10_000, generator=generator)
    cond = uncond + 1e-3 * torch.randn(1, 10_000, generator=generator)
    truth = uncond.double() + 30.0 * (cond.double() - uncond.double())
    got = (guided_prediction(ClassifierFree(30.0), [uncond, cond]).double() - truth).abs().max()
    weighted = ((1 - 30.0) * uncond + 30.0 * cond - truth).abs().max()
    assert got < weighted / 5


def test_scales_take_the_shapes_that_are_documented():
    for scale, steps, batch in (
        (7.5, 1, 1),
        (3, 1, 1),
        (torch.tensor(3.0), 1, 1),
        ([1.0, 2.0], 1, 2),
        (torch.ones(4), 1, 4),
        (torch.ones(5, 1), 5, 1),
        (torch.ones(5, 4), 5, 4),
    ):
        guidance = ClassifierFree(scale)
        assert (guidance.steps, guidance.batch) == (steps, batch)
        assert guidance.weights(CPU, torch.float32).shape == (steps, batch, 3)
    assert ClassifierFree.per_step(range(5)).steps == 5
    assert Classifier.per_step(None, [1.0, 2.0]).steps == 2
    assert Composed([torch.ones(5, 1), torch.ones(4)]).weights(CPU, torch.float32).shape == (5, 4, 4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [(3.0, "weights: expected a tensor, got float"), (torch.ones(3), r"num_predictions \+ 1\), got \(3,\)")],
)
def test_weights_of_another_form_are_refused(weights, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Guidance(weights, None)


def test_sum_of_guidances_uses_both_in_either_order():
    free, classifier = ClassifierFree([2.0, 3.0]), Classifier(None, torch.ones(5, 1) * 0.5, "mean")
    for both in (free + classifier, classifier + free):
        assert both.num_predictions == 2
        assert both.form == "mean"
        assert both.classifier is classifier
        weights = both.weights(CPU, torch.float64)
        assert weights.shape == (5, 2, 3)
        assert weights[3].tolist() == [[1.0, 2.0, 0.5], [1.0, 3.0, 0.5]]


def test_changing_a_scale_tensor_later_changes_nothing():
    scale = torch.tensor([1.0, 2.0], dtype=torch.float64)
    guidance = ClassifierFree(scale)
    scale.zero_()
    assert guidance.weights(CPU, torch.float64)[0, :, 1].tolist() == [1.0, 2.0]


class TinyClassifier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(1000, 6)
        self.linear = torch.nn.Linear(6, 4)

    def forward(self, x, t):
        return self.linear(torch.tanh(x.flatten(1) + self.embedding(t)))


def test_gradient_is_that_of_the_label_s_log_probability(generator):
    classifier = TinyClassifier().double()
    x = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator)
    t, labels = torch.tensor([5, 0, 999]), torch.tensor([1, 3, 0])
    got = Classifier(classifier).gradient(x, t, labels)
    step = 1e-6
    for b in range(3):
        for i in range(6):
            moved = [x.clone(), x.clone()]
            moved[0].view(3, 6)[b, i] += step
            moved[1].view(3, 6)[b, i] -= step
            up, down = (classifier(m, t).log_softmax(-1)[b, labels[b]].item() for m in moved)
            assert got.view(3, 6)[b, i].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradient_works_in_every_grad_mode_and_leaves_no_traces(mode):
    classifier = TinyClassifier()
    with mode():
        x, t, labels = torch.randn(3, 2, 3), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
        gradient = Classifier(classifier).gradient(x, t, labels)
    assert not gradient.requires_grad
    assert not x.requires_grad
    assert all(p.grad is None for p in classifier.parameters())
    assert gradient.abs().sum() > 0


def test_grad_fn_is_used_as_it_is():
    guidance = Classifier(grad_fn=lambda x, t: -x * t.view(-1, 1), guidance_scale=2.0)
    assert not guidance.takes_labels
    got = guidance.gradient(torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([1, 2]))
    assert got.tolist() == [[-1.0] * 3, [-2.0] * 3]
    assert got.dtype == torch.bfloat16


def test_gradient_scale_0_leaves_the_step_alone(backend, generator):
    x, p, g, z = torch.randn(4, 2, 3, 5, generator=generator)
    plain = fastguide.guided_step(TABLES["ddpm"], 3, x, [p], noise=z, backend=backend)
    for form in ("epsilon", "epsilon_after_clip", "mean"):
        guided = fastguide.guided_step(
            TABLES["ddpm"], 3, x, [p], Classifier(None, 0.0, form), gradient=g, noise=z, backend=backend
        )
        torch.testing.assert_close(guided, plain)


def test_weights_are_not_copied_to_a_gpu_within_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"guidance: its weights are not on cuda:0 yet, .* run the step once before"):
        fastguide.ClassifierFree(7.5).weights(torch.device("cuda", 0), torch.float32)
