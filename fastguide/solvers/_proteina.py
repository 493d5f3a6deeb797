"""The sampler of La-Proteina (Geffner et al. 2025), a flow from noise to data, as RFD4-Proteina takes it.

Its scores are rescaled for a lower temperature (Xu et al. 2025, "Temporal Score Rescaling for Temperature Sampling in
Diffusion and Flow Models"). ``fastguide`` has no solver of this name; a drop-in has its rows here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .table import StepTable


def proteina_table(
    times: Tensor, lengths: Tensor, noise: Tensor, stochastic: Tensor, *, tsr_k: float, tsr_sigma: float
) -> StepTable:
    """Return the rows from each time on, for a model of the velocity v of ``x = t * x_0 + (1 - t) * z``.

    ``score = (t * v - x) / (1 - t)`` is rescaled to ``r * score``, whose velocity is ``(x + (1 - t) * r * score) / t``.
    A step adds ``dt`` times that velocity, and where it is stochastic ``g * r * score * dt + sqrt(2 * g * dt) * z``.

    Args:
        times: above 0 and below 1, where calls begin, float64.
        lengths: dt of each call.
        noise: g of each call.
        stochastic: whether each call is.
        tsr_k, tsr_sigma: of the rescaling, ``r = (s * tsr_sigma^2 + 1) / (s * tsr_sigma^2 / tsr_k + 1)``, with the
            signal-to-noise ratio ``s = t^2 / (1 - t)^2``.
    """
    t, dt = times, lengths
    ratio_of_signal = t.square() / (1 - t).square() * tsr_sigma**2
    r = (ratio_of_signal + 1) / (ratio_of_signal / tsr_k + 1)
    g = torch.where(stochastic, noise, 0.0)
    columns = {
        "out_sample": 1 + dt * ((1 - r) / t - g * r / (1 - t)),
        "out_pred": dt * r * (1 + g * t / (1 - t)),
        "out_noise": (2 * g * dt).sqrt(),
    }
    return StepTable.from_columns(t, columns, name="proteina")
