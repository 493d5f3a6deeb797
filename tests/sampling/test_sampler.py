"""The loop: against a loop written out by hand, and what it passes to the model."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Sampler, guided_step
from tests.support.cases import SCHEDULE


def model(x, t, y):
    return torch.tanh(x * y.view(-1, *[1] * (x.dim() - 1)) + t.view(-1, *[1] * (x.dim() - 1)) / 1000)


@pytest.fixture
def x_T(generator):
    return torch.randn(3, 2, 4, 4, generator=generator)


COND, UNCOND = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_classifier_free_loop_is_the_loop_by_hand(solver, x_T):
    table = getattr(fastguide, solver)(SCHEDULE, 8)
    guidance = ClassifierFree(3.0)
    before = x_T.clone()
    got = Sampler(model, table, guidance)(x_T, cond=COND, uncond=UNCOND, generator=torch.Generator().manual_seed(1))
    assert torch.equal(x_T, before)

    x, generator = x_T, torch.Generator().manual_seed(1)
    for i, t in enumerate(table.timesteps):
        t = t.expand(3)
        x = guided_step(table, i, x, [model(x, t, UNCOND), model(x, t, COND)], guidance, generator=generator)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)


def test_the_model_is_called_once_a_step_on_the_doubled_batch(x_T):
    calls = []

    def spy(x, t, y):
        calls.append((x.shape, t.clone(), y.clone()))
        return model(x, t, y)

    table = fastguide.ddim(SCHEDULE, 4)
    Sampler(spy, table, ClassifierFree(3.0))(x_T, cond=COND, uncond=UNCOND)
    assert len(calls) == 4
    for (shape, t, y), timestep in zip(calls, table.host_timesteps, strict=True):
        assert shape == (6, 2, 4, 4)
        assert t.dtype == torch.int64
        assert t.tolist() == [timestep] * 6
        assert torch.equal(y, torch.cat([UNCOND, COND]))


def test_no_guidance_with_and_without_a_condition(x_T):
    table = fastguide.ddim(SCHEDULE, 4)
    conditional = Sampler(model, table)(x_T, cond=COND)
    assert torch.equal(conditional, Sampler(lambda x, t: model(x, t, COND), table)(x_T))
    scale_1 = Sampler(model, table, ClassifierFree(1.0))(x_T, cond=COND, uncond=UNCOND)
    torch.testing.assert_close(conditional, scale_1)


def test_conditions_as_keyword_arguments(x_T):
    def named(x, t, *, y, size):
        assert size.shape == (6, 2)
        return model(x, t, y)

    size = torch.ones(3, 2)
    table = fastguide.ddim(SCHEDULE, 4)
    got = Sampler(named, table, ClassifierFree(3.0))(
        x_T, cond={"y": COND, "size": size}, uncond={"y": UNCOND, "size": size}
    )
    assert torch.equal(got, Sampler(model, table, ClassifierFree(3.0))(x_T, cond=COND, uncond=UNCOND))


def test_composition_takes_a_condition_for_each_scale(x_T):
    table = fastguide.ddim(SCHEDULE, 4)
    got = Sampler(model, table, Composed([2.0, -1.0]))(x_T, cond=[COND, COND + 1], uncond=UNCOND)
    x = x_T
    for i, t in enumerate(table.timesteps):
        t = t.expand(3)
        predictions = [model(x, t, y) for y in (UNCOND, COND, COND + 1)]
        x = guided_step(table, i, x, predictions, Composed([2.0, -1.0]))
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["epsilon", "epsilon_after_clip", "mean"])
def test_classifier_guidance_alone_and_with_classifier_free(form, x_T):
    weight = torch.randn(32, 5, generator=torch.Generator().manual_seed(2))

    def classifier(x, t):
        return torch.tanh(x.flatten(1)) @ weight + t[:, None] / 1000

    labels = torch.tensor([0, 4, 2])
    table = fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0)
    guide = Classifier(classifier, 2.0, form)
    for guidance, conditions in (
        (guide, {"cond": COND}),
        (ClassifierFree(3.0) + guide, {"cond": COND, "uncond": UNCOND}),
    ):
        got = Sampler(model, table, guidance)(
            x_T, **conditions, labels=labels, generator=torch.Generator().manual_seed(1)
        )
        x, generator = x_T, torch.Generator().manual_seed(1)
        for i, t in enumerate(table.timesteps):
            t = t.expand(3)
            predictions = [model(x, t, conditions[name]) for name in ("uncond", "cond") if name in conditions]
            gradient = guide.gradient(x, t, labels)
            x = guided_step(table, i, x, predictions, guidance, gradient=gradient, generator=generator)
        torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_learned_variance_is_the_second_half_of_the_conditional_output(x_T):
    def learned(x, t, y):
        return torch.cat([model(x, t, y), 0.1 * model(x, t, y + 1)], 1)

    table = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range")
    got = Sampler(learned, table, ClassifierFree(3.0))(
        x_T, cond=COND, uncond=UNCOND, generator=torch.Generator().manual_seed(1)
    )
    x, generator = x_T, torch.Generator().manual_seed(1)
    for i, t in enumerate(table.timesteps):
        t = t.expand(3)
        predictions, variance = [model(x, t, UNCOND), model(x, t, COND)], 0.1 * model(x, t, COND + 1)
        x = guided_step(table, i, x, predictions, ClassifierFree(3.0), variance=variance, generator=generator)
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)


def test_callback_sees_every_step_in_the_loop_s_own_sample(x_T):
    table = fastguide.ddim(SCHEDULE, 4)
    seen = []
    got = Sampler(model, table).trajectory(
        x_T, cond=COND, callback=lambda step, t, x: seen.append((step, t, x, x.clone())), originals=False
    )
    assert [(step, t) for step, t, *_ in seen] == list(enumerate(table.host_timesteps))
    assert len({x.data_ptr() for *_, x, _ in seen}) == 1  # the loop's own, which costs nothing
    assert torch.equal(torch.stack([x_T, *(x for *_, x in seen)]), got.samples)
    assert torch.equal(got.sample, seen[-1][3])
    assert got.sample.data_ptr() != seen[-1][2].data_ptr()


def test_generator_and_global_generator(x_T):
    table = fastguide.ddpm(SCHEDULE, 4)
    sampler = Sampler(model, table)
    torch.manual_seed(7)
    first = sampler(x_T, cond=COND)
    assert torch.equal(first, sampler(x_T, cond=COND, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, sampler(x_T, cond=COND, generator=torch.Generator().manual_seed(8)))


def test_a_slice_of_the_table_is_image_to_image(x_T):
    """From the noised original at step k: the end of the whole loop, if the loop came by there."""
    table = fastguide.ddim(SCHEDULE, 8)
    states = []
    final = Sampler(model, table)(x_T, cond=COND, callback=lambda step, t, x: states.append(x.clone()))
    assert torch.equal(Sampler(model, table[5:])(states[4], cond=COND), final)


def test_the_sample_stays_channels_last_whatever_the_model_returns(x_T):
    table = fastguide.ddim(SCHEDULE, 4)
    expected = Sampler(model, table)(x_T, cond=COND)
    laid_out = x_T.contiguous(memory_format=torch.channels_last)
    for returned in (torch.contiguous_format, torch.channels_last):
        got = Sampler(lambda x, t, y, f=returned: model(x, t, y).contiguous(memory_format=f), table)(
            laid_out, cond=COND
        )
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, expected)


def layouts():
    return {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "permuted": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    }


@pytest.mark.parametrize("layout", [None, "channels_last", "permuted"])
def test_outputs_and_gradients_may_come_in_any_layout(layout, x_T):
    """Contiguous outputs and gradients, expanded gradients, and channel splits, for a state laid out otherwise."""
    laid_out = x_T if layout is None else layouts()[layout](x_T)
    labels = torch.tensor([0, 1, 0])
    weight = torch.randn(32, 5, generator=torch.Generator().manual_seed(2))

    def learned(x, t):
        return torch.cat([0.1 * x, torch.tanh(x)], 1)

    clipped_ddim = fastguide.ddim(SCHEDULE, 4, clip_sample_range=1.0)
    clipped_ddpm = fastguide.ddpm(SCHEDULE, 4, variance_type="learned_range", clip_sample_range=1.0)
    for table, net, classifier in (
        (clipped_ddim, lambda x, t: (0.1 * x).contiguous(), lambda x, t: x.flatten(1) @ weight),
        (clipped_ddim, lambda x, t: 0.1 * x, lambda x, t: x.sum((2, 3))),  # an expanded gradient
        (clipped_ddpm, learned, lambda x, t: x.flatten(1) @ weight),
    ):
        results = [
            Sampler(net, table, Classifier(classifier))(x, labels=labels, generator=torch.Generator().manual_seed(0))
            for x in (x_T, laid_out)
        ]
        assert results[1].stride() == laid_out.stride()
        torch.testing.assert_close(results[0], results[1])


def test_a_bfloat16_model_with_a_float32_state(x_T):
    net = torch.nn.Conv2d(2, 2, 3, padding=1).bfloat16()
    out = Sampler(lambda x, t: net(x), fastguide.ddim(SCHEDULE, 4), dtype=torch.bfloat16)(x_T)
    assert out.dtype == torch.float32
    assert out.isfinite().all()


def test_grad_fn_may_use_autograd(x_T):
    def grad_fn(x, t):
        x = x.requires_grad_(True)
        return torch.autograd.grad(-0.5 * x.square().sum(), x)[0]

    table = fastguide.ddim(SCHEDULE, 4)
    got = Sampler(lambda x, t: 0.1 * x, table, Classifier(grad_fn=grad_fn))(x_T)
    assert torch.equal(got, Sampler(lambda x, t: 0.1 * x, table, Classifier(grad_fn=lambda x, t: -x))(x_T))


def test_progress_draws_a_bar(x_T, capsys):
    Sampler(model, fastguide.ddim(SCHEDULE, 4))(x_T, cond=COND, progress=True)
    assert "4/4" in capsys.readouterr().err


def test_a_model_with_parameters_needs_no_no_grad_of_the_caller(x_T):
    net = torch.nn.Conv2d(2, 2, 3, padding=1)
    out = Sampler(lambda x, t: net(x), fastguide.ddim(SCHEDULE, 4))(x_T)
    assert not out.requires_grad
