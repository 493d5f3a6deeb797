"""Rows of ddpm and ddim against the papers' formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide.guidance.weights import UNGUIDED
from fastguide.step.backends import reference
from tests.support.cases import FORMS, PREDICTION_TYPES, SCHEDULE, VARIANCE_TYPES, alphas
from tests.support.textbook import ddim_step, ddpm_step

SHAPE = (4, 5)
SCALE = 1.7


def apply_row(table, step, x, m, form=None, g=None, v=None, z=None):
    """The row through the reference, in float64."""
    out = torch.empty_like(x)
    weights = UNGUIDED.weights(x.device, torch.float64).clone()
    weights[..., -1] = SCALE
    reference.guided_step(out, None, None, x, [m], table.device_rows(form, torch.float64), weights, step, None, g, v, z)
    return out


def inputs(generator):
    return [torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(5)]


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("use_clipped", [False, True])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_row_is_the_paper_s_formula(prediction_type, eta, clip, use_clipped, form, generator):
    table = fastguide.ddim(
        SCHEDULE,
        7,
        eta=eta,
        clip_sample_range=clip,
        use_clipped_model_output=use_clipped,
        prediction_type=prediction_type,
    )
    if form == "mean" and eta == 0:  # a deterministic step has no variance to shift by
        with pytest.raises(ValueError, match="gradient: the form 'mean' has no use in ddim"):
            table.device_rows("mean", torch.float64)
        return
    for step in range(len(table)):
        x, m, g, _, z = inputs(generator)
        got = apply_row(table, step, x, m, form, None if form is None else g, z=z)
        expected = ddim_step(
            x,
            m,
            *alphas(table, step),
            prediction_type=prediction_type,
            eta=eta,
            clip=clip,
            use_clipped=use_clipped,
            form=form,
            sg=SCALE * g,
            z=z,
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddpm_row_is_the_paper_s_formula(prediction_type, variance_type, clip, form, generator):
    table = fastguide.ddpm(
        SCHEDULE, 7, clip_sample_range=clip, prediction_type=prediction_type, variance_type=variance_type
    )
    for step in range(len(table)):
        x, m, g, v, z = inputs(generator)
        got = apply_row(table, step, x, m, form, None if form is None else g, v if table.learned_variance else None, z)
        expected = ddpm_step(
            x,
            m,
            *alphas(table, step),
            last=step == len(table) - 1,
            prediction_type=prediction_type,
            variance_type=variance_type,
            clip=clip,
            form=form,
            sg=SCALE * g,
            v=v,
            z=z,
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_ddpm_mean_is_the_epsilon_formula_of_the_paper(generator):
    """mu = (x - beta / sqrt(1 - abar) * epsilon) / sqrt(alpha): Ho et al. eq. 11, another way to the same mean."""
    table = fastguide.ddpm(SCHEDULE)
    for step in (0, 500, 998):
        x, m, _, _, _ = inputs(generator)
        a, a_prev = alphas(table, step)
        alpha = a / a_prev
        expected = (x - (1 - alpha) / math.sqrt(1 - a) * m) / math.sqrt(alpha)
        torch.testing.assert_close(apply_row(table, step, x, m), expected, rtol=1e-10, atol=1e-10)


def test_ddpm_epsilon_form_shifts_the_mean_by_beta_over_root_alpha(generator):
    """Substituting eps - sqrt(1 - abar)*s*g into the mean moves it by beta / sqrt(alpha) * s * g, for every step."""
    table = fastguide.ddpm(SCHEDULE)
    for step in (0, 1, 500, 999):
        x, m, g, _, _ = inputs(generator)
        a, a_prev = alphas(table, step)
        alpha = a / a_prev
        shift = apply_row(table, step, x, m, "epsilon", g) - apply_row(table, step, x, m)
        torch.testing.assert_close(shift, (1 - alpha) / math.sqrt(alpha) * SCALE * g, rtol=1e-8, atol=1e-10)


def test_ddim_epsilon_form_is_algorithm_2(generator):
    """x' = sqrt(a') * (x - sqrt(1-a)*eps_hat) / sqrt(a) + sqrt(1-a') * eps_hat, with eps_hat shifted."""
    table = fastguide.ddim(SCHEDULE, 20)
    for step in range(20):
        x, m, g, _, _ = inputs(generator)
        a, a_prev = alphas(table, step)
        hat = m - math.sqrt(1 - a) * SCALE * g
        expected = math.sqrt(a_prev) * (x - math.sqrt(1 - a) * hat) / math.sqrt(a) + math.sqrt(1 - a_prev) * hat
        torch.testing.assert_close(apply_row(table, step, x, m, "epsilon", g), expected, rtol=1e-11, atol=1e-11)


def test_ddim_with_eta_1_is_ddpm_with_the_small_variance():
    """Song et al. section 4.1: at eta = 1 the two are the same process."""
    implicit = fastguide.ddim(SCHEDULE, eta=1.0, num_inference_steps=1000).coefficients()
    ancestral = fastguide.ddpm(SCHEDULE).coefficients()
    torch.testing.assert_close(implicit["out_noise"], ancestral["out_noise"], rtol=1e-9, atol=1e-9)
    for table in (implicit, ancestral):  # coefficients of x and m after x_0 is put in
        table["x"] = table["out_sample"] + table["out_x0"] * table["x0_scale"] * table["x0_sample"]
        table["m"] = table["out_pred"] + table["out_x0"] * table["x0_scale"] * table["x0_pred"]
    for name in ("x", "m"):
        torch.testing.assert_close(implicit[name], ancestral[name], rtol=1e-9, atol=1e-9)


def test_all_three_predictions_of_one_model_give_the_same_step(generator):
    x, epsilon, _, _, z = inputs(generator)
    results = []
    for prediction_type in PREDICTION_TYPES:
        table = fastguide.ddpm(SCHEDULE, 10, prediction_type=prediction_type)
        a, _ = alphas(table, 4)
        x0 = (x - math.sqrt(1 - a) * epsilon) / math.sqrt(a)
        m = {
            "epsilon": epsilon,
            "sample": x0,
            "v_prediction": math.sqrt(a) * epsilon - math.sqrt(1 - a) * x0,
            "score": -epsilon / math.sqrt(1 - a),
        }[prediction_type]
        results.append(apply_row(table, 4, x, m, z=z))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-10)


def test_zero_terminal_snr_first_step_with_v_prediction(generator):
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    x, v, _, _, z = inputs(generator)
    for table in (
        fastguide.ddim(schedule, 10, prediction_type="v_prediction", timestep_spacing="trailing"),
        fastguide.ddpm(schedule, 10, prediction_type="v_prediction", timestep_spacing="trailing"),
    ):
        assert table.host_timesteps[0] == 999
        assert table.rows.isfinite().logical_or(table.rows == math.inf).all()
        a_prev = schedule.alphas_cumprod[table.host_timesteps[1]].item()
        # at abar = 0: x_0 = -v, epsilon = x
        if table.name == "ddim":
            expected = -math.sqrt(a_prev) * v + math.sqrt(1 - a_prev) * x
        else:
            expected = -math.sqrt(a_prev) * v + math.sqrt(1 - a_prev) * z
        torch.testing.assert_close(apply_row(table, 0, x, v, z=z), expected, rtol=1e-11, atol=1e-11)


def test_set_alpha_to_one_false_ends_at_the_first_alpha(generator):
    table = fastguide.ddim(SCHEDULE, 10, set_alpha_to_one=False, steps_offset=1)
    x, m, _, _, _ = inputs(generator)
    a, a_prev = SCHEDULE.alphas_cumprod[1].item(), SCHEDULE.alphas_cumprod[0].item()
    torch.testing.assert_close(apply_row(table, 9, x, m), ddim_step(x, m, a, a_prev), rtol=1e-11, atol=1e-11)


def test_no_noise_at_the_last_step_of_ddpm():
    for variance_type in VARIANCE_TYPES:
        for timesteps in (None, [900, 400, 50]):
            table = fastguide.ddpm(SCHEDULE, None if timesteps else 5, variance_type=variance_type, timesteps=timesteps)
            assert table.adds_noise == (*[True] * (len(table) - 1), False)


def test_table_slices_are_tables(generator):
    table = fastguide.ddpm(SCHEDULE, 10)
    tail = table[4:]
    assert len(tail) == 6
    assert tail.host_timesteps == table.host_timesteps[4:] == tuple(tail.timesteps.tolist())
    assert tail.adds_noise == table.adds_noise[4:]
    for form in (None, "epsilon", "mean"):
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(tail.device_rows(form, dtype), table.device_rows(form, dtype)[4:])
    assert tail[1:3].host_timesteps == table.host_timesteps[5:7]
    assert table.index(table.host_timesteps[3]) == 3
    assert table.to("cpu") is table


def test_rows_in_float32_are_the_rounded_float64_rows():
    table = fastguide.ddim(SCHEDULE, 10)
    assert table.rows.dtype == torch.float64
    assert torch.equal(table.device_rows(None, torch.float32), table.rows.float())


def test_the_next_input_is_the_sample_itself_in_ddpm_and_ddim():
    for table in (
        fastguide.ddpm(SCHEDULE, 5),
        fastguide.ddim(SCHEDULE, 5)[2:],
        fastguide.ddim(SCHEDULE, eta=0.5, timesteps=[9]),
    ):
        assert torch.equal(table.coefficients()["in_scale"], torch.ones(len(table), dtype=torch.float64))
    assert fastguide.StepTable.from_columns(torch.tensor([4, 1]), {}).coefficients()["in_scale"].tolist() == [1.0, 1.0]


def test_in_scale_is_a_column_whatever_the_gradient():
    scales = torch.tensor([0.25, 3.0, -1.5], dtype=torch.float64)
    gradients = {"mean": {"out_grad": torch.ones(3)}, "epsilon": "because"}
    table = fastguide.StepTable.from_columns(torch.tensor([7, 4, 1]), {"in_scale": scales}, gradients=gradients)
    column = fastguide.ROW_COLUMNS.index("in_scale")
    for form in (None, "mean"):
        assert torch.equal(table.coefficients(form)["in_scale"], scales)
        assert torch.equal(table.device_rows(form, torch.float32)[:, column], scales.float())
        assert torch.equal(table[1:].device_rows(form, torch.float64)[:, column], scales[1:])


def test_columns_of_the_loop():
    """The next timestep, and the level of a known image: clean after the last step, whatever the solver's last abar."""
    for table in (
        fastguide.ddpm(SCHEDULE, 5),
        fastguide.ddim(SCHEDULE, 5),
        fastguide.ddim(SCHEDULE, 5, set_alpha_to_one=False),
    ):
        columns, t = table.coefficients(), list(table.host_timesteps)
        assert columns["in_timestep"].tolist() == [*t[1:], 0]
        abar = torch.cat([SCHEDULE.alphas_cumprod[t[1:]], torch.ones(1)])
        torch.testing.assert_close(columns["known_sample"].square(), abar)
        torch.testing.assert_close(columns["known_noise"].square(), 1 - abar)
        assert torch.equal(table.levels.alpha, SCHEDULE.alphas_cumprod[t].sqrt())
        assert torch.equal(table[2:].levels.sigma, (1 - SCHEDULE.alphas_cumprod[t[2:]]).sqrt())
        assert table[:3].coefficients()["in_timestep"].tolist() == t[1:4]  # a slice goes on where the table does
