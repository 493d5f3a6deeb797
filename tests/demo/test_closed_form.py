"""The demo's figures of problems in closed form, made in seconds and without training."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib")

from fastguide import __main__ as cli
from fastguide.demo import convergence, guidances, mixture, paths


def test_the_noise_prediction_is_the_density_s_gradient():
    """By automatic differentiation."""
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for alpha, sigma in ((0.3, 0.95), (1.0, 4.0)):
        (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
        torch.testing.assert_close(mixture.noise_prediction(x, alpha, sigma).detach(), -sigma * score)


def test_the_density_is_one():
    ticks = torch.linspace(-6, 6, 400, dtype=torch.float64)
    density = mixture.log_density(torch.cartesian_prod(ticks, ticks)).exp()
    assert (density.sum() * (12 / 399) ** 2).item() == pytest.approx(1, abs=1e-6)


def test_every_solver_falls_with_its_order():
    """PNDM and DDIM step at whole, even timesteps, and have not reached theirs."""
    orders = {line.name: line.slope for line in convergence.lines()}
    for name, order in (
        ("Euler", 1), ("Euler, flow", 1), ("Heun", 2), ("Heun, flow", 2), ("DPM2", 2), ("LMS 4", 4), ("DPM++ 2M", 2),
        ("DPM++ 2S", 2), ("DPM++ 3S", 3), ("DEIS 3", 3), ("UniPC 2", 3), ("UniPC 3", 4),
    ):  # fmt: skip
        assert orders[name] == pytest.approx(order, abs=0.3), name


def test_paths_end_at_the_class_that_is_asked_for():
    """At scale 0 at every class in its proportion, at 1 in the class's distribution, at 3 narrower, beyond it."""
    ends = {scale: paths.paths(scale)[-1] for scale in paths.SCALES}
    nearest = (ends[0.0][:, None] - mixture.MEANS).norm(dim=-1).argmin(-1)
    torch.testing.assert_close(nearest.bincount(minlength=3) / 300, mixture.WEIGHTS.float(), atol=0.1, rtol=0)
    mean, deviation = mixture.MEANS[paths.LABEL], mixture.DEVIATIONS[paths.LABEL].item()
    assert (ends[1.0].mean(0) - mean).norm() < 0.07
    assert ends[1.0].std(0).mean().item() == pytest.approx(deviation, rel=0.1)
    others = mixture.MEANS[[0, 2]].mean(0)
    assert (ends[3.0].mean(0) - others).norm() > (mean - others).norm()
    assert ends[3.0].std(0).mean().item() < 0.9 * deviation


def test_guidance_of_the_plane_goes_beyond_the_class_or_less_so():
    found = {each.name: each for each in guidances.on_mixture()}
    assert found["plain"].distance > 2.5
    assert found["plain"].spread < 0.8
    for name in ("projected, in x_0", "magnitude-aware", "zero star"):
        assert found[name].distance < 0.6 * found["plain"].distance, name
    assert all(each.samples.isfinite().all() for each in found.values())


def test_the_command_draws_them(tmp_path, capsys):
    assert cli.main(["demo", "--without-training", "--output", str(tmp_path / "out")]) == 0
    for name in ("solvers.png", "paths.png", "guidances.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "solvers.png" in capsys.readouterr().out
