"""Forward noising and conversions between what a model may predict: rows of the same kernel, by training timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import guided_step
from .predictions import PredictionType, check_prediction_type
from .predictions import convert as conversion
from .schedule import NoiseSchedule
from .table import StepTable


def add_noise(
    schedule: NoiseSchedule,
    original: Tensor,
    timestep: int | Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * noise (Ho et al. 2020, eq. 4).

    Args:
        schedule: the noise schedule.
        original: x_0, shape (batch, ...).
        timestep: a training timestep, an int or an int64 tensor of shape () or (batch,) on the sample's device.
        noise: standard normal values of the shape of ``original``; or ``generator`` draws them, as in ``guided_step``.
        out, backend: as in ``guided_step``.

    >>> x = add_noise(NoiseSchedule.linear(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.ones(2, 1, 8, 8))
    >>> [f"{v:.4f}" for v in x.mean((1, 2, 3))]
    ['0.0100', '1.0000']
    """
    table = _table(schedule, "original", "sample at t", _device_of("original", original))
    return guided_step(
        table, _checked(timestep, table), original, [], noise=noise, generator=generator, out=out, backend=backend
    )


def convert_prediction(
    schedule: NoiseSchedule,
    sample: Tensor,
    timestep: int | Tensor,
    prediction: Tensor,
    source: PredictionType,
    target: PredictionType,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a model would predict as ``target``, from what it predicts as ``source``, at the same noisy sample.

    ``epsilon``, ``sample`` (x_0), ``v_prediction`` and ``score`` = -epsilon / sqrt(1 - abar_t) are each linear in x_t
    and any other (``fastguide.predictions`` cites the formulas).

    Args:
        schedule: the noise schedule.
        sample: x_t, shape (batch, ...).
        timestep: a training timestep, an int or an int64 tensor of shape () or (batch,) on the sample's device.
        prediction: shape of the sample.
        source, target: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"score"``.
        out, backend: as in ``guided_step``.

    Raises:
        ValueError: the schedule has a timestep of zero signal, where ``source`` does not determine ``target``.

    >>> schedule, x, epsilon = NoiseSchedule.cosine(), torch.randn(2, 3), torch.randn(2, 3)
    >>> v = convert_prediction(schedule, x, 500, epsilon, "epsilon", "v_prediction")
    >>> back = convert_prediction(schedule, x, 500, v, "v_prediction", "epsilon")
    >>> torch.allclose(back, epsilon, atol=1e-5)
    True
    """
    table = _table(schedule, source, target, _device_of("sample", sample))
    return guided_step(table, _checked(timestep, table), sample, [prediction], out=out, backend=backend)


# Tables over all training timesteps, the row being the timestep; one for each use, schedule and device.
_tables: dict[tuple[NoiseSchedule, str, str, torch.device], StepTable] = {}
_MOST_TABLES = 64


def _table(schedule: NoiseSchedule, source: str, target: str, device: torch.device) -> StepTable:
    table = _tables.get((schedule, source, target, device))
    if table is None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"torch.compile: expected the table of {source} to {target} for this schedule and device to exist; "
                "call the function once, with any sample, before compiling"
            )
        if len(_tables) >= _MOST_TABLES:
            _tables.pop(next(iter(_tables)))
        table = _tables[schedule, source, target, device] = _made_table(schedule, source, target).to(device)
    return table


def _made_table(schedule: NoiseSchedule, source: str, target: str) -> StepTable:
    abar = schedule.alphas_cumprod
    if (source, target) == ("original", "sample at t"):
        columns = {"out_sample": abar.sqrt(), "out_noise": (1 - abar).sqrt()}
    else:
        check_prediction_type("source", source)
        check_prediction_type("target", target)
        part = conversion(source, target, abar)
        columns = {"out_sample": part.scale * part.sample, "out_pred": part.scale * part.pred}
    return StepTable(torch.arange(len(schedule)), columns, name=f"conversion from {source} to {target}")


def _checked(timestep: int | Tensor, table: StepTable) -> int | Tensor:
    """The timestep, which is the row; an error of a number speaks of the timestep."""
    if isinstance(timestep, int) and not 0 <= timestep < len(table):
        raise ValueError(f"timestep: expected 0 to {len(table) - 1}, got {timestep}")
    return timestep


def _device_of(name: str, tensor: Tensor) -> torch.device:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return tensor.device
