"""Guidance of the epsilons and velocities that predictions say, whatever the model predicts."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import (
    AdaptiveProjected,
    ClassifierFree,
    FlowSchedule,
    NoiseSchedule,
    Sampler,
    ZeroStar,
    guided_step,
    space_of,
)  # fmt: skip

SHAPE = (2, 3, 6, 5)
VP, CALLS = NoiseSchedule.linear(), 8
TABLES = {
    "epsilon": fastguide.ddim(VP, CALLS),
    "v": fastguide.ddim(VP, CALLS, prediction_type="v_prediction"),
    "x_0": fastguide.ddim(VP, CALLS, prediction_type="sample"),
    "flow": fastguide.flow_match_euler(FlowSchedule(shift=3.0), CALLS),
    "scaled by sigma": fastguide.euler(VP, CALLS),
}
KIND = {"epsilon": "epsilon", "v": "v", "x_0": "x_0", "flow": "flow", "scaled by sigma": "epsilon"}


def randn(seed, count):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    others = [first + 0.4 * torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count - 1)]
    return [first, *others]


def parts_of(kind, p, x, alpha, sigma):
    """Return the x_0 and the epsilon that a prediction says."""
    if kind == "epsilon":
        return (x - sigma * p) / alpha, p
    if kind == "v":
        return alpha * x - sigma * p, sigma * x + alpha * p
    if kind == "flow":
        return x - sigma * p, x + alpha * p
    return p, (x - alpha * p) / sigma


def velocity_of(original, epsilon, alpha, sigma):
    if abs(float(alpha + sigma) - 1) < 1e-9:
        return epsilon - original
    length = (alpha**2 + sigma**2).sqrt()
    return (alpha * epsilon - sigma * original) / length


def prediction_of(kind, name, q, x, alpha, sigma):
    """Return the prediction that says an epsilon or a velocity q."""
    if name == "epsilon":
        epsilon, original = q, (x - sigma * q) / alpha
    elif abs(float(alpha + sigma) - 1) < 1e-9:
        original, epsilon = x - sigma * q, x + alpha * q
    else:
        length = (alpha**2 + sigma**2).sqrt()
        x, a, s = x / length, alpha / length, sigma / length
        original, epsilon = a * x - s * q, s * x + a * q
    return {"epsilon": epsilon, "x_0": original, "flow": epsilon - original}.get(
        kind, alpha * epsilon - sigma * original
    )


def each(values):
    return values.view(-1, 1, 1, 1)


def rescaled(u, c, scale=7.5, phi=0.7):
    m = u + scale * (c - u)
    ratio = each(c.flatten(1).std(1) / m.flatten(1).std(1))
    return phi * ratio * m + (1 - phi) * m


def zero_star(u, c, scale=5.0):
    factor = each((u * c).flatten(1).sum(1) / ((u * u).flatten(1).sum(1) + 1e-8))
    return factor * u + scale * (c - factor * u)


def projected(u, c, scale=6.0):
    d = c - u
    d = d * (4.0 / each(d.flatten(1).norm(dim=1))).clamp(max=1)
    unit = c / each(c.flatten(1).norm(dim=1))
    return u + scale * (d - each((d * unit).flatten(1).sum(1)) * unit)


GUIDANCES = {
    "rescaled": (lambda space: ClassifierFree(7.5, guidance_rescale=0.7, space=space), rescaled),
    "Zero*": (lambda space: ZeroStar(5.0, zero_init_steps=0, space=space), zero_star),
    "projected": (lambda space: AdaptiveProjected(6.0, norm_threshold=4.0, space=space), projected),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("space", ["epsilon", "velocity"])
@pytest.mark.parametrize("name", GUIDANCES)
@pytest.mark.parametrize("table", TABLES)
def test_predictions_are_taken_as(table, name, space, backend):
    make, formula = GUIDANCES[name]
    kind, table = KIND[table], TABLES[table]
    if (kind, space) == ("flow", "epsilon"):  # which begins where x is epsilon
        table = table[1:]
    guidance = make(space_of(table, space))
    assert guidance.steps == len(table)
    x, u, c = randn(1, 3)
    for index in (0, 4, len(table) - 1):
        alpha, sigma = (level[index] for level in table.levels)
        sample = x * (alpha**2 + sigma**2).sqrt()
        said = [parts_of(kind, p, sample, alpha, sigma) for p in (u, c)]
        taken = [epsilon if space == "epsilon" else velocity_of(original, epsilon, alpha, sigma)
                 for original, epsilon in said]  # fmt: skip
        m = prediction_of(kind, space, formula(*taken), sample, alpha, sigma)
        expected = guided_step(table, index, sample, m)
        got = guided_step(table, index, sample, [u, c], guidance, backend=backend)
        assert (got - expected).norm() <= 1e-9 * expected.norm()
        close = guided_step(table, index, sample.float(), [u.float(), c.float()], guidance, backend=backend)
        assert (close - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("table", "space"), [("epsilon", "epsilon"), ("v", "velocity"), ("flow", "velocity")])
def test_the_model_s_own_space_is_what_it_predicts(table, space):
    table = TABLES[table]
    x, u, c = randn(2, 3)
    own = guided_step(table, 3, x, [u, c], ClassifierFree(7.5, guidance_rescale=0.7))
    got = guided_step(table, 3, x, [u, c], ClassifierFree(7.5, guidance_rescale=0.7, space=space_of(table, space)))
    torch.testing.assert_close(got, own, rtol=1e-11, atol=1e-11)


def model(x, t, y):
    return 0.3 * torch.tanh(x + y.reshape(-1, 1, 1, 1) * torch.linspace(-1, 1, x.shape[-1]).to(x))


def test_in_a_sampler_with_scales_for_samples_and_an_interval():
    table = TABLES["epsilon"]
    space = space_of(table, "velocity")
    guidance = ZeroStar([4.0, 2.0], zero_init_steps=0, space=space).within(table, 0.0, 0.5)
    assert (guidance.steps, guidance.batch) == (CALLS, 2)
    (x,) = randn(3, 1)
    cond, uncond = torch.tensor([1.0, -0.5]).double(), torch.zeros(2).double()
    got = Sampler(model, table, guidance)(x, cond=cond, uncond=uncond)
    inner = ZeroStar([4.0, 2.0], zero_init_steps=0, space=space)
    for index in range(CALLS):
        u, c = model(x, None, uncond), model(x, None, cond)
        x = guided_step(table, index, x, [u, c], inner) if index < CALLS // 2 else guided_step(table, index, x, c)
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got 'epsilon'; of a table, it is space_of\(table, 'epsilon'\)"):
        ZeroStar(3.0, space="epsilon")
    with pytest.raises(ValueError, match="name: expected 'epsilon' or 'velocity', got 'original'"):
        space_of(TABLES["flow"], "original")
    unknown = fastguide.StepTable.from_columns(torch.tensor([0]), {"x0_pred": torch.ones(1).double()}, name="of mine")
    with pytest.raises(ValueError, match="expected one that knows the levels of its calls, got of mine"):
        space_of(unknown, "epsilon")
    schedule = VP.rescale_zero_terminal_snr()
    terminal = fastguide.ddim(schedule, 4, timestep_spacing="trailing", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="expected calls whose predictions say an epsilon"):
        space_of(terminal, "epsilon")
    with pytest.raises(ValueError, match="expected calls whose predictions say an epsilon, got flow_match_euler"):
        space_of(TABLES["flow"], "epsilon")
    assert space_of(terminal, "velocity").sample.shape == (4, 1)
