"""What a step must give: the reference's results in float32 and float64, and how much another order may differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastguide import ROW_COLUMNS
from fastguide.step.backends import reference
from fastguide.step.noise import _philox
from fastguide.step.operator import StepArguments
from fastguide.step.weigh import position_of
from tests.support.ptx.cases import Case
from tests.support.ptx.placement import Placement
from tests.support.torch_randn import curand_box_muller

HALF_UNIT = 2.0**-24  # of float32's rounding, relatively
OPERATIONS = 4  # so many roundings of a sum's terms; 2.4 were seen
NEAR_OVERFLOW = 2.0**118  # factors of a thousand from float32's greatest value
PORTABLE_LIMIT = 7.0  # the portable stream has no greater values
OUTPUTS = ("out", "original", "staged", "history")


class Wanted(NamedTuple):
    """An output in float64, and rounded from float32; the sum of its terms' magnitudes; and what its noise may err."""

    exact: Tensor
    rounded: Tensor
    magnitude: Tensor
    noise_error: Tensor


class Expected(NamedTuple):
    """All that a step must leave behind; ``live`` says of which samples."""

    outputs: dict[str, Wanted]
    cursor: Tensor | None
    timestep: Tensor | None
    state: list[int] | None
    live: Tensor


def torch_noise(element: Tensor, threads: int, philox: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return torch.randn's values of elements of a batch in float64, and the radii of Box and Muller's points."""
    seed, offset = (int(value) % 2**64 for value in philox[:2])
    turn, thread = element // threads, element % threads
    call = offset // 4 + turn // 4
    counter = (call & 0xFFFFFFFF, call >> 32, thread, torch.zeros_like(thread))
    key = tuple(torch.full_like(thread, word) for word in (seed & 0xFFFFFFFF, seed >> 32))
    words = np.stack([np.asarray(word).astype(np.uint64) for word in _philox(counter, key)])
    pair = (turn.numpy() % 4 // 2) * 2
    x, y = (np.take_along_axis(words, pair[None] + k, 0)[0] for k in (0, 1))
    first, second = (curand_box_muller(x, y, np.full(x.shape, which)) for which in (False, True))
    return np.where(turn.numpy() % 2 == 1, second, first), np.hypot(first, second)


def _in_precision(a: StepArguments, dtype: torch.dtype) -> StepArguments:
    """Copy all tensors, those of floats in a dtype."""

    def copied(value: object) -> object:
        if isinstance(value, list):
            return [copied(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        value = value.to(dtype) if value.is_floating_point() else value
        return value.clone(memory_format=torch.contiguous_format)

    return StepArguments(*map(copied, a))._replace(
        philox=None, philox_threads=0, timestep=None if a.timestep is None else a.timestep.clone()
    )


def _magnitudes(a: StepArguments, case: Case, noise: Tensor | None) -> dict[str, Tensor]:
    """Sum the magnitudes of all terms: the reference's own sums, of absolute values."""
    a = _in_precision(a, torch.float64)
    rows = a.rows.abs()
    for name in ("logvar_base", "logvar_span", "hist_slot"):
        rows[:, ROW_COLUMNS.index(name)] = a.rows[:, ROW_COLUMNS.index(name)]
    rows[:, ROW_COLUMNS.index("clip")] = torch.inf
    predictions = list(a.predictions)
    if case.together and case.count > 1:
        predictions = list(predictions[0].unflatten(0, (case.count, case.batch)).unbind(0))
    first = predictions[0].abs() if predictions else None
    sums = [p.abs() + (2 * first if k else 0) for k, p in enumerate(predictions)]  # (p_k - p_0) has both
    unsigned = {"sample": a.sample.abs(), "predictions": sums, "rows": rows, "weights": a.weights.abs()}
    unsigned |= {"gradient": None if a.gradient is None else a.gradient.abs(), "noise": noise, "seeds": None}
    unsigned |= {name: None if getattr(a, name) is None else getattr(a, name).abs() for name in ("anchor", "history")}
    if case.variance_is_unused:
        unsigned["variance"] = None
    if case.masked:
        unsigned |= {"mask": None, "known": None, "known_noise": None}
    step = a._replace(**unsigned, staged=None, original=torch.empty_like(a.sample), out=torch.empty_like(a.sample))
    position = position_of(a)[0]
    reference.guided_step(*step)
    column = {name: rows[position, k].view(-1, *[1] * (a.sample.dim() - 1)) for k, name in enumerate(ROW_COLUMNS)}
    out = step.out
    if case.masked:
        level = column["known_sample"] * a.known.abs() + column["known_noise"] * a.known_noise.abs()
        out = (1 + a.mask.abs()) * (out + level)
    found = {"out": out, "original": step.original, "history": step.history}
    if case.copies:
        found["staged"] = (column["in_scale"] * out).repeat(case.copies, *[1] * (out.dim() - 1))
    return found


def expected(placement: Placement) -> Expected:
    """Compute a step's results, of the tensors as they are; nothing of them is changed."""
    case, a = placement.case, placement.arguments._replace(indices=placement.indices)
    noise, error = a.noise, None
    if case.noise == "torch":
        drawn = torch_noise(torch.arange(case.batch * case.size), case.threads, a.philox)
        values, radii = (torch.from_numpy(x).view(a.sample.shape) for x in drawn)
        around = 1.2e-6 * radii  # of sines and cosines that a GPU approximates
        noise = values.float().to(a.sample.dtype)
        ends = [(values + sign * around).float().to(noise.dtype).double() for sign in (1, -1)]
        error = (ends[0] - ends[1]).abs() + around
    results = {}
    for dtype in (torch.float32, torch.float64):
        results[dtype] = _in_precision(a._replace(noise=noise), dtype)
        reference.guided_step(*results[dtype])
        for name in OUTPUTS[:3] if placement.bad else ():
            output = getattr(results[dtype], name)
            for sample in placement.bad if output is not None else ():
                output[sample :: case.batch] = torch.nan
    size = noise.double().abs() if noise is not None else None
    if case.noise == "portable":
        size = torch.full(a.sample.shape, PORTABLE_LIMIT, dtype=torch.float64)
    magnitudes = _magnitudes(a, case, size)
    larger = magnitudes if error is None else _magnitudes(a, case, size + error)
    outputs = {}
    for name in OUTPUTS:
        stored = getattr(a, name)
        if stored is not None:
            single, double = (getattr(results[dtype], name) for dtype in (torch.float32, torch.float64))
            noise_error = larger[name] - magnitudes[name]
            outputs[name] = Wanted(double, single.to(stored.dtype), magnitudes[name], noise_error)
    live = torch.ones(case.batch, dtype=torch.bool)
    if a.cursor is not None:
        live = (a.cursor[:, 0] < a.cursor[:, 1]).expand(case.batch).clone()
    moved = results[torch.float32]
    return Expected(outputs, moved.cursor, moved.timestep, _moved_state(case, a, live), live)


def _moved_state(case: Case, a: StepArguments, live: Tensor) -> list[int] | None:
    """Return the state of torch's stream behind the step: a finished loop and a step without noise draw nothing."""
    if not case.state or a.philox is None:
        return None
    seed, offset, _ = a.philox.tolist()
    draws = True
    if a.cursor is not None:
        draws = bool(live[0]) and float(a.rows[a.cursor[0, 0], ROW_COLUMNS.index("out_noise")]) != 0
    calls = -(-case.batch * case.size // (4 * case.threads))
    return [seed, offset + 4 * calls * draws, 0]


def equal(got: Tensor, wanted: Tensor) -> Tensor:
    """Compare to the bit, but for the bits of a NaN."""
    integers = torch.int32 if got.dtype == torch.float32 else torch.int16
    got, wanted = got.contiguous(), wanted.contiguous()
    return (got.view(integers) == wanted.view(integers)) | (got.isnan() & wanted.isnan())


def errors(got: Tensor, wanted: Wanted, case: Case) -> tuple[Tensor, Tensor]:
    """Return where an output is as near as it must be, and its errors in units of what roundings may make."""
    bits, least = {torch.float32: (24, -149), torch.bfloat16: (8, -133), torch.float16: (11, -24)}[got.dtype]
    exponent = torch.floor(torch.log2(wanted.exact.abs().clamp(min=1e-300)))
    unit = torch.exp2((exponent - (bits - 1)).clamp(min=least))
    # An exponential's relative error is its argument's absolute one, and arguments are less than 3.
    terms = wanted.magnitude * HALF_UNIT * (4 if case.variance else 1)
    error = (got.double() - wanted.exact).abs()
    fine = error <= OPERATIONS * terms + 1.01 * wanted.noise_error + 0.5001 * unit + 1e-44
    fine |= equal(got, wanted.rounded)  # infinities, NaN, and what the storage dtype does not hold
    if case.values == "special":  # what overflows in one order of operations, and not in another
        fine |= ~wanted.magnitude.isfinite() | (~got.isfinite() & (wanted.magnitude > NEAR_OVERFLOW))
    measured = error.isfinite() & wanted.magnitude.isfinite() & (wanted.magnitude > 1e-30)
    units = (error - wanted.noise_error).clamp(min=0) / (terms + 0.5 * unit)
    return fine, torch.where(measured, units, 0.0)
