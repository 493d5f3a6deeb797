"""The forward process: noised samples, training targets, and conversions between what a model may predict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._counts import is_integer
from ..schedules.predictions import PredictionType, check_prediction_type
from ..solvers.noising import Schedule, conversion_table, noising_table, target_table
from ..solvers.table import StepTable
from ..step.guided_step import guided_step


def add_noise(
    schedule: Schedule,
    original: Tensor,
    timestep: int | Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return x_t = sqrt(abar_t) * x_0 + sqrt(1 - abar_t) * noise (Ho et al. 2020, eq. 4).

    Of a ``FlowSchedule``, (1 - sigma) * x_0 + sigma * noise (Lipman et al. 2023), at index i of its ``train_sigmas``;
    and alpha * x_0 + sigma * noise at index i of ``Levels``, such as EDM's, ``Levels.variance_exploding(sigmas)``
    (Karras et al. 2022, eq. 1).

    Args:
        schedule: the noise schedule, the flow's, or ``Levels``, which are not to be changed later: make them once.
        original: x_0, shape (batch, ...).
        timestep: a training timestep, or the index of a level: an int, or an int64 tensor of shape () or (batch,) on
            the sample's device.
        noise: standard normal values of the shape of ``original``; or ``generator`` draws them, as in ``guided_step``.
        out, backend: as in ``guided_step``.

    >>> from fastguide import NoiseSchedule
    >>> x = add_noise(NoiseSchedule.linear(), torch.zeros(2, 1, 8, 8), torch.tensor([0, 999]), torch.ones(2, 1, 8, 8))
    >>> [f"{v:.4f}" for v in x.mean((1, 2, 3))]
    ['0.0100', '1.0000']
    """
    table = _cached(noising_table, schedule, device=_device_of("original", original))
    return guided_step(
        table, _checked(timestep, table), original, [], noise=noise, generator=generator, out=out, backend=backend
    )


def convert_prediction(
    schedule: Schedule,
    sample: Tensor,
    timestep: int | Tensor,
    prediction: Tensor,
    source: PredictionType,
    target: PredictionType,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return what a model would predict as ``target``, from what it predicts as ``source`` at the same noisy sample.

    ``epsilon``, ``sample`` (x_0), ``v_prediction`` and ``score`` = -epsilon / sqrt(1 - abar_t) are each linear in x_t
    and any other (``fastguide.schedules.predictions`` cites the formulas); and so, with a ``FlowSchedule``, is
    ``flow_prediction`` = epsilon - x_0.

    Args:
        schedule: as in ``add_noise``.
        sample: x_t, shape (batch, ...).
        timestep: a training timestep, an int or an int64 tensor of shape () or (batch,) on the sample's device.
        prediction: shape of the sample.
        source, target: ``"epsilon"``, ``"sample"``, ``"v_prediction"``, ``"score"`` or ``"flow_prediction"``.
        out, backend: as in ``guided_step``.

    Raises:
        ValueError: ``flow_prediction`` where alpha is not 1 - sigma; or the timestep has zero signal, where ``source``
            does not determine ``target``; a timestep on another device than the CPU is not looked at, and gives
            infinite or NaN values there.

    >>> from fastguide import NoiseSchedule
    >>> schedule, x, epsilon = NoiseSchedule.cosine(), torch.randn(2, 3), torch.randn(2, 3)
    >>> v = convert_prediction(schedule, x, 500, epsilon, "epsilon", "v_prediction")
    >>> back = convert_prediction(schedule, x, 500, v, "v_prediction", "epsilon")
    >>> torch.allclose(back, epsilon, atol=1e-5)
    True
    """
    check_prediction_type("source", source)
    check_prediction_type("target", target)
    table = _cached(conversion_table, schedule, source, target, device=_device_of("sample", sample))
    return guided_step(table, _checked(timestep, table), sample, [prediction], out=out, backend=backend)


def training_target(
    schedule: Schedule,
    original: Tensor,
    timestep: int | Tensor,
    noise: Tensor,
    prediction_type: PredictionType,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return what a model is trained to predict at x_t = ``add_noise(schedule, original, timestep, noise)``.

    Computed from x_0 and the noise themselves, so that nothing is lost to the rounding of x_t, and defined where the
    schedule has no signal; a flow's velocity is noise - x_0. Arguments as in ``add_noise``; only ``"score"`` of
    abar = 1 would not be finite.

    >>> from fastguide import NoiseSchedule
    >>> x, z = torch.randn(2, 3), torch.randn(2, 3)
    >>> torch.equal(training_target(NoiseSchedule.linear(), x, 7, z, "epsilon"), z)
    True
    """
    check_prediction_type("prediction_type", prediction_type)
    table = _cached(target_table, schedule, prediction_type, device=_device_of("original", original))
    return guided_step(table, _checked(timestep, table), original, [], noise=noise, out=out, backend=backend)


# Tables over all training timesteps, the row being the timestep. Not functools.lru_cache: torch.compile traces through
# that, and would make the table in every compiled function.
_tables: dict[tuple[object, ...], StepTable] = {}
_MOST_TABLES = 64


def _cached(make: Callable[..., StepTable], *arguments: object, device: torch.device) -> StepTable:
    """Return the table of ``make(*arguments)`` on a device, made on first use."""
    key = (make, *arguments, device)
    table = _tables.get(key)
    if table is None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"torch.compile: expected the {make.__name__} of this schedule and device to exist; "
                "call the function once, with any sample, before compiling"
            )
        if len(_tables) >= _MOST_TABLES:
            _tables.pop(next(iter(_tables)), None)
        table = _tables[key] = make(*arguments).to(device)
    return table


def _checked(timestep: int | Tensor, table: StepTable) -> int | Tensor:
    """Return the timestep, which is the row; check it as far as the host can, as callers know no index."""
    values: list[int] = []
    if isinstance(timestep, int) and is_integer(timestep):
        values = [timestep]
    elif not isinstance(timestep, Tensor):
        raise TypeError(f"timestep: expected an int or an int64 tensor, got {type(timestep).__name__}")
    elif isinstance(timestep, Tensor) and timestep.device.type == "cpu" and not torch.compiler.is_compiling():
        if timestep.dtype != torch.int64:
            raise TypeError(f"timestep: expected an int or an int64 tensor, got {timestep.dtype}")
        values = timestep.reshape(-1).tolist()
    for value in values:
        if not 0 <= value < len(table):
            raise ValueError(f"timestep: expected 0 to {len(table) - 1}, got {value}")
        if value in table.undefined_rows:
            raise ValueError(f"timestep: expected one at which {table.name} is defined, got {value}: {table.undefined}")
    return timestep


def _device_of(name: str, tensor: Tensor) -> torch.device:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a tensor of floating-point numbers, got {got}")
    return tensor.device
