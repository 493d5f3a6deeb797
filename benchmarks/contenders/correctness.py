"""Compare a contender's step with the papers' formulas in float64, and say how far it may be off."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguide import portable_noise
from tests.support import textbook

from ..workloads import COMPOSED_SCALES, GRADIENT_SCALE, NUM_STEPS, STEP, Inputs, abar_at
from .registry import sample_seeds


def relative_error(i: Inputs, name: str, result: Tensor) -> float:
    """Compare a contender's result with the textbook's step in float64, given the noise that the contender draws."""
    noise = None
    if name.endswith("seeds="):
        noise = portable_noise(sample_seeds(i), i.sample.shape, step=STEP)
    elif i.noisy:
        # diffusers' step draws in the dtype of the model's output, and so does the scheduler that replaces it
        in_output_dtype = name in ("diffusers", "fastguide's scheduler") and i.workload.solver != "add_noise"
        dtype = i.workload.dtype if in_output_dtype else i.sample.dtype
        generator = torch.Generator(i.device).manual_seed(0)
        noise = torch.randn(i.sample.shape, device=i.device, dtype=dtype, generator=generator)
    expected = textbook_step(i, noise)
    return float((result.double() - expected).norm() / expected.norm())


def textbook_step(i: Inputs, noise: Tensor | None) -> Tensor:
    """Compute a workload's next sample in float64, without any table, row or kernel of fastguide's."""
    w, (a, a_prev) = i.workload, abar_at(NUM_STEPS, STEP)
    x, z = i.sample.double(), None if noise is None else noise.double()
    if w.solver == "add_noise":
        assert z is not None
        return textbook.noised(x, z, a)
    predictions = [prediction.double() for prediction in i.predictions]
    m = textbook.guided_prediction(predictions, list(COMPOSED_SCALES[: w.count - 1]))
    sg = None if i.gradient is None else GRADIENT_SCALE * i.gradient.double()
    if w.solver == "ddim":
        return textbook.ddim_step(x, m, a, a_prev, form=w.form, sg=sg)
    return textbook.ddpm_step(
        x,
        m,
        a,
        a_prev,
        last=False,
        variance_type="fixed_small" if i.variance is None else "learned_range",
        clip=1.0 if w.solver.endswith("clipped") else None,
        form=w.form,
        sg=sg,
        v=None if i.variance is None else i.variance.double(),
        z=z,
    )


def tolerance(i: Inputs, name: str) -> float:
    """Return the largest relative error that counts as right.

    diffusers computes in the dtypes of the model's output and of the sample, and so has a larger one.
    """
    state = i.sample.dtype
    if name == "diffusers" and i.workload.dtype != torch.float32:
        return 3e-2 if state == torch.float32 else 6e-2
    rounding = 0.0 if state == torch.float32 else torch.finfo(state).eps / 2
    return rounding + (1e-4 if name in ("diffusers", "fastguide's scheduler") else 1e-5)
