"""UniPC, the unified predictor and corrector: Zhao et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._counts import is_integer
from ..schedules.flow import FlowSchedule
from ..schedules.noise_schedule import NoiseSchedule, TimestepSpacing
from ..schedules.predictions import Linear, PredictionType
from ..schedules.sigmas import SigmaSpacing
from ._dpm import lambda_of, levels_of
from ._options import check_choice, check_flags, check_order
from ._signal_steps import SignalSteps, prediction_of, signal_steps, signal_table
from ._unscaled import FinalSigmasType
from .begin import begins_anywhere
from .entries import Entry, Form, history_columns
from .table import StepTable

UniPCType: TypeAlias = Literal["bh1", "bh2"]


@begins_anywhere
def unipc(
    schedule: NoiseSchedule | FlowSchedule,
    num_inference_steps: int | None = None,
    *,
    solver_order: int = 2,
    solver_type: UniPCType = "bh2",
    predict_x0: bool = True,
    disable_corrector: Collection[int] = (),
    prediction_type: PredictionType | None = None,
    lower_order_final: bool = True,
    final_sigmas_type: FinalSigmasType = "zero",
    timestep_spacing: TimestepSpacing = "linspace",
    steps_offset: int = 0,
    sigma_spacing: SigmaSpacing | None = None,
    timesteps: Tensor | Sequence[int] | None = None,
    sigmas: Tensor | Sequence[float] | None = None,
    mu: float | None = None,
    begin: int = 0,
) -> StepTable:
    """Return UniPC's steps, the default of Wan and Cosmos: each call corrects the last step, and predicts the next.

    The corrector takes in what the model says of the predicted sample, and needs no further call (Zhao et al. 2023,
    algorithms 1 and 2). The corrected sample is not kept: it is the last one plus multiples of entries.

    Args:
        schedule: the noise schedule or the flow that the model was trained with.
        num_inference_steps: number of steps, if ``timesteps`` or ``sigmas`` do not say them.
        solver_order: 1, 2 or 3; the corrector's accuracy is of one order more.
        solver_type: the paper's B(h): ``"bh1"``, h, or ``"bh2"``, e^h - 1.
        predict_x0: the entries are x_0, as in DPM-Solver++; ``False``: epsilon, and ``final_sigmas_type="sigma_min"``.
        disable_corrector: steps that are not corrected.
        lower_order_final: the last steps are of lower order.
        prediction_type, final_sigmas_type, timestep_spacing, steps_offset, sigma_spacing, timesteps: as in
            ``dpm_solver``.
        sigmas, mu: of a flow, as in ``dpm_solver``. Without ``sigmas``, they begin at 1, which becomes 1 - 1e-6.
        begin: the first step; those before it are left out, as image-to-image does.

    Returns:
        The step table, whose calls go on from earlier ones: it has ``history_slots``.

    Raises:
        TypeError, ValueError: an argument is not as described.

    >>> from fastguide import FlowSchedule
    >>> table = unipc(FlowSchedule(shift=5.0), 50)
    >>> table, table.history_slots
    (StepTable(unipc, 50 steps, timesteps 999 .. 96, device=cpu), 2)
    """
    _check_choices(solver_order, solver_type, predict_x0, final_sigmas_type, lower_order_final)
    _check_steps(disable_corrector)
    steps = signal_steps(
        schedule,
        num_inference_steps,
        timestep_spacing=timestep_spacing,
        steps_offset=steps_offset,
        sigma_spacing=sigma_spacing,
        final_sigmas_type=final_sigmas_type,
        timesteps=timesteps,
        sigmas=sigmas,
        mu=mu,
        begin=begin,
        flow_from_one=True,
    )
    x0 = prediction_of(schedule, prediction_type, steps.here)
    return unipc_table(
        steps,
        x0,
        solver_order=solver_order,
        solver_type=solver_type,
        predict_x0=predict_x0,
        disable_corrector=disable_corrector,
        lower_order_final=lower_order_final,
    )


def unipc_table(
    steps: SignalSteps,
    x0: Linear,
    *,
    solver_order: int,
    solver_type: UniPCType,
    predict_x0: bool,
    disable_corrector: Collection[int],
    lower_order_final: bool,
) -> StepTable:
    """Return ``unipc`` over any levels and timesteps."""
    columns = x0.columns()
    forms = _forms(steps, solver_order, solver_type, predict_x0, disable_corrector, lower_order_final)
    columns |= history_columns(forms, Entry.original(steps.here) if predict_x0 else Entry.epsilon(steps.here))
    return signal_table(steps, columns, "unipc")


def predictor_forms(
    steps: SignalSteps, solver_order: int, solver_type: UniPCType, predict_x0: bool, lower_order_final: bool
) -> list[Form]:
    """Return what each call makes of its corrected sample, which is the form's ``sample``, and of entries."""
    return _forms(steps, solver_order, solver_type, predict_x0, range(steps.total), lower_order_final)


class CorrectedSample(NamedTuple):
    """What a call makes of the sample before it predicts: ``anchor * xa + result * x' + sum of entries``."""

    anchor: float
    """The factor of the sample as the last call wrote it."""
    result: float
    """That of the sample that the call leads to, which stands for its own entry."""
    entries: dict[int, float]
    """Those of entries, by the calls that left them."""


def corrected_samples(
    steps: SignalSteps,
    *,
    solver_order: int,
    solver_type: UniPCType,
    disable_corrector: Collection[int],
    lower_order_final: bool,
) -> list[CorrectedSample | None]:
    """Return each call's corrected sample, which its row does not make; ``None``: the call corrects nothing.

    With the row ``x' = a * x_c + sum_i c_i * e_i`` and ``x_c = xa + sum_i k_i * e_i``, the own entry is eliminated. The
    entries are x_0, and no step leads to sigma = 0.
    """
    forms = _forms(steps, solver_order, solver_type, True, disable_corrector, lower_order_final)
    bare = predictor_forms(steps, solver_order, solver_type, True, lower_order_final)
    found: list[CorrectedSample | None] = []
    for call, (form, predictor) in enumerate(zip(forms, bare, strict=True)):
        if form.anchor == 0:
            found.append(None)
            continue
        a, c = predictor.sample, predictor.entries
        k = {each: (value - c.get(each, 0.0)) / a for each, value in form.entries.items()}
        own = k[call] / c[call]
        scale = 1 / (1 + own * a)
        entries = {each: (value - own * c.get(each, 0.0)) * scale for each, value in k.items() if each != call}
        found.append(CorrectedSample(scale, own * scale, entries))
    return found


class _Interval(NamedTuple):
    """A predictor's step: ``sample * x + first * e + factor * sum_i predictor_i * (e_i - e) / r_i``."""

    sample: float
    first: float
    factor: float
    ratios: list[float]
    """r_i, of which the last is 1: where the corrector's entry is."""
    predictor: list[float]
    corrector: list[float]


def _forms(
    steps: SignalSteps,
    solver_order: int,
    solver_type: UniPCType,
    predict_x0: bool,
    disable_corrector: Collection[int],
    lower_order_final: bool,
) -> list[Form]:
    points, forms = levels_of(steps.levels), []
    calls = len(points) - 1
    last: _Interval | None = None
    for call in range(calls):
        order = min(solver_order, call + 1, calls - call if lower_order_final else solver_order)
        over = _interval(points, call, order, solver_type, predict_x0)
        form = Form(sample=over.sample)
        if last is not None and call - 1 + steps.skipped not in disable_corrector:
            form = Form(anchor=over.sample).add(_correction(call, last), over.sample)
        form.add({call: over.first})
        for i, (rho, ratio) in enumerate(zip(over.predictor, over.ratios, strict=False), 1):
            form.add({call - i: rho / ratio, call: -rho / ratio}, over.factor)
        forms.append(form)
        last = over
    return forms


def _correction(call: int, last: _Interval) -> dict[int, float]:
    """Return the entries that turn the last step's sample into the corrected one (Zhao et al. 2023, algorithm 1)."""
    *before, here = last.corrector
    correction = Form().add({call: here, call - 1: -here}, last.factor)
    for i, rho in enumerate(before, 1):
        change = (rho - last.predictor[i - 1]) / last.ratios[i - 1]
        correction.add({call - 1 - i: change, call - 1: -change}, last.factor)
    return correction.entries


def _interval(
    points: Sequence[tuple[float, float]], call: int, order: int, solver_type: UniPCType, predict_x0: bool
) -> _Interval:
    (alpha_s, sigma_s), (alpha, sigma) = points[call], points[call + 1]
    now = lambda_of(points[call])
    h = lambda_of(points[call + 1]) - now
    if h == 0:  # the last sigma, repeated
        return _Interval(1.0, 0.0, 0.0, [1.0], [], [0.0])
    signed = -h if predict_x0 else h
    outer = -alpha if predict_x0 else -sigma
    phi = math.expm1(signed)
    sample = sigma / sigma_s if predict_x0 else alpha / alpha_s
    if h == math.inf:  # of order 1: from noise alone, or to x_0, after which no call comes
        return _Interval(sample, outer * phi, outer * phi if now == -math.inf else 0.0, [1.0], [], [0.5])
    step = signed if solver_type == "bh1" else phi
    ratios = [(lambda_of(points[call - i]) - now) / h for i in range(1, order)] + [1.0]
    predictor, corrector = _weights(ratios, signed, step)
    return _Interval(sample, outer * phi, outer * step, ratios, predictor, corrector)


def _weights(ratios: Sequence[float], signed: float, step: float) -> tuple[list[float], list[float]]:
    """Return the predictor's and the corrector's weights: R * rho = b (Zhao et al. 2023, theorem 3.1)."""
    order = len(ratios)
    b, phi_k, factorial = [], math.expm1(signed) / signed - 1, 1
    for k in range(1, order + 1):
        b.append(phi_k * factorial / step)
        factorial *= k + 1
        phi_k = phi_k / signed - 1 / factorial
    if order == 1:
        return [], [0.5]
    return [0.5] if order == 2 else _solved(ratios[:-1], b[:-1]), _solved(ratios, b)


def _solved(ratios: Sequence[float], b: Sequence[float]) -> list[float]:
    """Return the rho; an entry of noise alone, infinitely far back, weighs nothing, and the last equation is left out.

    That is the limit, as such an entry's rho falls with the square of its distance.
    """
    near = [ratio for ratio in ratios if math.isfinite(ratio)]
    points = torch.tensor(near, dtype=torch.float64, device="cpu")
    target = torch.tensor(b[: len(near)], dtype=torch.float64, device="cpu")
    rhos = iter(torch.linalg.solve(torch.stack([points**k for k in range(len(near))]), target).tolist())
    return [next(rhos) if math.isfinite(ratio) else 0.0 for ratio in ratios]


def _check_steps(disable_corrector: Collection[int]) -> None:
    if not isinstance(disable_corrector, Collection) or not all(
        is_integer(step) and step >= 0 for step in disable_corrector
    ):
        raise ValueError(f"disable_corrector: expected steps, integers from 0 on, got {disable_corrector!r}")


def _check_choices(
    solver_order: int, solver_type: str, predict_x0: bool, final_sigmas_type: str, lower_order_final: bool
) -> None:
    check_order("solver_order", solver_order, 3)
    check_choice("solver_type", solver_type, UniPCType)
    check_flags(predict_x0=predict_x0, lower_order_final=lower_order_final)
    if final_sigmas_type == "zero" and not predict_x0:
        raise ValueError("final_sigmas_type: expected 'sigma_min' with predict_x0=False, got 'zero'")
    if final_sigmas_type == "zero" and not lower_order_final and solver_order > 1:
        raise ValueError("lower_order_final: expected True where the last step leads to sigma 0, got False")
