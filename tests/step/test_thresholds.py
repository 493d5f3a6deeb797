"""Dynamic thresholding in the step: every backend against the formula, the quantile to the bit, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, Composed, Cursor, ddim, ddpm, dpm_solver, guided_step
from fastguide.step.backends.native import CAPABILITIES, cpu_capability, set_cpu_capability
from fastguide.step.operator import StepArguments
from tests.support.cases import SCHEDULE, alphas

SHAPES = {"ragged": (3, 3, 17, 19), "one element": (2, 1), "whole vectors": (2, 4, 16, 16), "none": (0, 3, 4)}
NUMBERS = {"between": (0.9, 1.5), "at the top": (0.5, 1.01), "at 1": (0.1, 2.0), "no top": (0.995, float("inf"))}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def thresholded(x0, ratio, most):
    """The formula, in float64."""
    flat = x0.double().flatten(1)
    s = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(1, most)
    return ((flat.clamp(-s, s)) / s).view_as(x0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_step_is_the_formula(shape, numbers, dtype, backend):
    table = ddim(SCHEDULE, 10).with_dynamic_thresholding(*numbers)
    for index, count in ((9, 2), (6, 3)):
        x, *given = (randn(*shape, seed=seed, dtype=dtype) for seed in range(count + 1))
        guidance = ClassifierFree(3.0) if count == 2 else Composed([2.0, 0.5])
        original = torch.empty_like(x)
        got = guided_step(table, index, x, given, guidance, original=original, backend=backend)
        u, *others = (p.double() for p in given)
        m = u + sum(w * (p - u) for w, p in zip((3.0,) if count == 2 else (2.0, 0.5), others, strict=True))
        a, a_next = alphas(table, index)
        x0 = (x.double() - (1 - a) ** 0.5 * m) / a**0.5
        x0 = thresholded(x0, *numbers) if x0.numel() else x0
        expected = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * m
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
        for ours, theirs in ((original, x0), (got, expected)):
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=2 * tolerance)


VALUES = {
    "normal": lambda n: randn(n) * 1.3,
    "ties": lambda n: randn(n).mul(4).round() / 3,
    "constant": lambda n: torch.full((n,), -1.2),
    "zeros": torch.zeros,
    "sixty decades": lambda n: randn(n).sign() * torch.logspace(-30, 30, n, dtype=torch.float64).float(),
    "subnormal": lambda n: randn(n) * 1e-42,
    "with infinity": lambda n: randn(n).index_fill(0, torch.tensor([n // 2]), torch.inf),
    "with NaN": lambda n: randn(n).index_fill(0, torch.tensor([n - 1]), torch.nan),
}


def inverse_thresholds(values, ratio, most, dtype=torch.float32):
    """1 over the thresholds that the kernel finds for samples whose x_0 is what they are."""
    columns = {"x0_scale": 1.0, "x0_sample": 1.0, "out_x0": 1.0}
    rows = {name: torch.full((1,), value, dtype=torch.float64) for name, value in columns.items()}
    table = fastguide.StepTable.from_columns(torch.zeros(1, dtype=torch.int64), rows)
    x = values.to(dtype)
    inverse = torch.zeros(len(x), 1, dtype=dtype)
    torch.ops.fastguide.guided_step(*StepArguments(
        out=torch.empty_like(x), original=None, staged=None, sample=x, predictions=[],
        rows=table.with_dynamic_thresholding(ratio, most).device_rows(None, dtype),
        weights=torch.zeros(1, 1, 2, dtype=dtype), index=0, indices=None, gradient=None, variance=None, noise=None,
        inverse_thresholds=inverse,
    ))  # fmt: skip
    return inverse[:, 0]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", VALUES)
def test_the_quantile_is_torch_s_to_the_bit(kind, capability):
    """Beside an infinite neighbour torch's own is NaN; here it is the top."""
    before = cpu_capability()
    if set_cpu_capability(capability) != capability:
        pytest.skip(f"this processor has no {capability}")
    try:
        for n in (1, 2, 7, 16, 100, 4096, 4099, 30000):
            values = VALUES[kind](n)
            samples = torch.stack([values, 2 * values.flip(0)])
            for ratio in (0.001, 0.5, 0.9, 0.995, 1.0):
                for most in (1.5, 1e6):
                    wanted = torch.quantile(samples.abs(), ratio, dim=1).clamp(1, most)
                    if kind == "with infinity":
                        wanted = wanted.nan_to_num(most)
                    wanted = 1 / wanted
                    got = inverse_thresholds(samples, ratio, most)
                    same = (got == wanted) | (got.isnan() & wanted.isnan())
                    assert bool(same.all()), (n, ratio, most)
    finally:
        set_cpu_capability(before)


def test_the_quantile_of_many_draws():
    for seed in range(300):
        values = randn(2, 7 + 13 * seed, seed=seed) * 2
        for ratio in (0.37, 0.9):
            assert torch.equal(
                inverse_thresholds(values, ratio, 1e30), 1 / torch.quantile(values.abs(), ratio, 1).clamp(1)
            )


@pytest.mark.parametrize("ratio", [0.3, 0.9, 0.995])
def test_in_float64(ratio):
    values = randn(2, 5000, dtype=torch.float64)
    got = inverse_thresholds(values, ratio, 2.5, torch.float64)
    torch.testing.assert_close(got, 1 / torch.quantile(values.abs(), ratio, dim=1).clamp(1, 2.5), rtol=1e-15, atol=0)


def test_bits_do_not_depend_on_threads_or_neighbours():
    table = ddim(SCHEDULE, 10).with_dynamic_thresholding(0.9, 1.5)
    x, u, c = (randn(3, 3, 160, 160, seed=seed) for seed in range(3))
    threads, results = torch.get_num_threads(), []
    try:
        for count, alone in ((1, False), (4, False), (4, True)):  # samples for all threads, and not
            torch.set_num_threads(count)
            part = slice(1, 2) if alone else slice(None)
            got = guided_step(table, 9, x[part], [u[part], c[part]], ClassifierFree(3.0), backend="native")
            results.append(got if alone else got[1:2])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_finite_reaches_its_own_sample_alone(backend):
    table = ddim(SCHEDULE, 10).with_dynamic_thresholding(0.9, 1.5)
    x, u, c = (randn(3, 3, 8, 8, seed=seed) for seed in range(3))
    expected = guided_step(table, 9, x, [u, c], ClassifierFree(3.0), backend=backend)
    c[1, 0, 0, 0] = torch.nan
    got = guided_step(table, 9, x, [u, c], ClassifierFree(3.0), backend=backend)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert bool(got[1].isnan().all())


def test_with_weights_from_moments_a_gradient_and_noise(backend):
    """The threshold is that of the x_0 which the step goes on with: guided, rescaled, and moved by the gradient."""
    table = ddpm(SCHEDULE, 10).with_dynamic_thresholding(0.9, 1.5)
    x, u, c, g, z = (randn(2, 3, 9, 7, seed=seed) for seed in range(5))
    guidance = ClassifierFree(5.0, guidance_rescale=0.7) + fastguide.Classifier(None, 2.0)
    original = torch.empty_like(x)
    got = guided_step(table, 8, x, [u, c], guidance, gradient=g, noise=z, original=original, backend=backend)
    plain, unlimited = ddpm(SCHEDULE, 10), torch.empty_like(x)
    guided_step(plain, 8, x, [u, c], guidance, gradient=g, noise=z, original=unlimited, backend="reference")
    wanted = thresholded(unlimited, 0.9, 1.5).float()
    torch.testing.assert_close(original, wanted, rtol=5e-6, atol=5e-6)
    moved = guided_step(plain, 8, x, [u, c], guidance, gradient=g, noise=z, backend="reference")
    row = plain.coefficients("epsilon")
    torch.testing.assert_close(got, moved + row["out_x0"][8].float() * (wanted - unlimited), rtol=1e-5, atol=1e-5)


def test_samples_at_calls_of_their_own_and_repeated_steps(backend):
    """One of which has no threshold; and one at a cursor that is finished."""
    plain = ddim(SCHEDULE, 10)
    rows = plain.with_dynamic_thresholding(0.9, 1.5).coefficients()
    rows["quantile"][3], rows["clip"][3] = 0.0, torch.inf
    table = fastguide.StepTable.from_columns(plain.timesteps, rows)
    x, u, c = (randn(3, 3, 8, 8, seed=seed) for seed in range(3))
    alone = [guided_step(table, k, x, [u, c], ClassifierFree(3.0), backend=backend) for k in (9, 3, 7)]
    for _ in range(4):  # later ones are repeated
        got = guided_step(table, torch.tensor([9, 3, 7]), x, [u, c], ClassifierFree(3.0), backend=backend)
        for sample in range(3):
            assert torch.equal(got[sample], alone[sample][sample])
    cursor = Cursor(3)
    cursor.state.copy_(torch.tensor([[9, 10, 0, 0], [3, 3, 0, 0], [7, 9, 0, 0]]))
    moved = x.clone()
    guided_step(table, cursor, moved, [u, c], ClassifierFree(3.0), out=moved, backend=backend)
    assert torch.equal(moved[0], alone[0][0])
    assert torch.equal(moved[1], x[1])
    assert torch.equal(moved[2], alone[2][2])
    assert cursor.state[:, 0].tolist() == [10, 3, 8]


def test_a_table_that_thresholds():
    table = ddim(SCHEDULE, 10).with_dynamic_thresholding()
    assert not table.thresholds  # the clip to 1, which needs no quantile
    assert set(table.coefficients()["clip"].tolist()) == {1.0}
    table = ddim(SCHEDULE, 10, clip_sample_range=3.0).with_dynamic_thresholding(0.99, 1.5)
    assert table.thresholds
    assert table[5:].thresholds
    rows = table.coefficients()
    assert set(rows["clip"].tolist()) == {1.5}
    assert set(rows["quantile"].tolist()) == {0.99}
    late = dpm_solver(SCHEDULE, 10).with_dynamic_thresholding(0.99, 1.5)
    assert late.maker is None or late.maker(4).thresholds
    for arguments, message in (
        ((0.0,), "ratio: expected a number from 0 to 1, and not 0, got 0.0"),
        ((1.5,), "ratio: expected"),
        ((0.9, 0.5), "sample_max_value: expected a number from 1 to inf, and not 0, got 0.5"),
        ((0.9, True), "sample_max_value: expected"),
        ((0.9, "1"), "sample_max_value: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ddim(SCHEDULE, 10).with_dynamic_thresholding(*arguments)
    columns = {"quantile": torch.tensor([1.5], dtype=torch.float64)}
    with pytest.raises(ValueError, match="columns: expected values from 0 to 1 in 'quantile'"):
        fastguide.StepTable.from_columns(torch.tensor([0]), columns)
    columns = {"quantile": torch.tensor([0.5], dtype=torch.float64), "clip": torch.tensor([0.5], dtype=torch.float64)}
    with pytest.raises(ValueError, match="columns: expected a 'clip' of at least 1"):
        fastguide.StepTable.from_columns(torch.tensor([0]), columns)
    with pytest.raises(ValueError, match="does not go through x_0"):
        fastguide.flow_match_euler(fastguide.FlowSchedule(), 10).with_dynamic_thresholding(0.9, 1.5)


def test_a_loop_and_slots_have_the_thresholds_of_their_steps():
    table = ddim(SCHEDULE, 5).with_dynamic_thresholding(0.8, 1.5)

    def model(x, t, condition):
        return (0.3 * x + condition.view(-1, 1, 1, 1) + 1e-3 * t.view(-1, 1, 1, 1)).sin()

    x, conditions = randn(2, 3, 8, 8), (torch.zeros(2), torch.ones(2))
    expected = x
    for index, t in enumerate(table.timesteps):
        given = [model(expected, t.expand(2), condition) for condition in conditions]
        expected = guided_step(table, index, expected, given, ClassifierFree(4.0), backend="reference")
    sampler = fastguide.Sampler(model, table, ClassifierFree(4.0))
    for _ in range(2):
        got = sampler(x, uncond=conditions[0], cond=conditions[1])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
