"""Add noise to samples as diffusers' schedulers do, in one pass, by levels that the host knows.

diffusers indexes a table by a tensor at each call, takes roots, and multiplies and adds: ``a * x_0 + b * noise``. Here
a and b of all steps are what its own formula makes of ones and zeros, once, and are rows of a table; so a call of one
or several timesteps is one step of the kernel, with the bits of diffusers' in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..solvers import StepTable
from ..step.guided_step import guided_step
from ..step.memory import DTYPES
from .fitted import is_transformed
from .host_tables import HostTables, first_step_at, host_tables
from .timesteps import place_in
from .written_tables import state_of

Formula = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
"""diffusers' ``add_noise``, of a scheduler, samples, noise and timesteps."""

_BY_THE_COUNT = frozenset(("index_for_timestep", "begin_index", "step_index", "sigmas"))
"""What the code of a formula names that goes by where the loop is, or began."""


class Noising(NamedTuple):
    """What noises samples of one arithmetic."""

    tables: dict[torch.device, StepTable]
    """Rows of ``x' = a * x_0 + m`` on each device, one a step; on the CPU to begin with."""
    noise: Guidance
    """Makes m of noise: b of each step is its weight."""

    @classmethod
    def of(cls, formula: Formula, stand_in: Any, count: int, dtype: torch.dtype) -> Noising | None:
        """Return what a formula of diffusers' says of its steps: a is what it makes of 1 and no noise, b of 0 and 1.

        ``None``: not all of it is finite.
        """
        of_samples, of_noise = torch.eye(2, dtype=dtype, device="cpu").expand(count, 2, 2).unbind(1)
        said = formula(stand_in, of_samples, of_noise, torch.arange(count, device="cpu")).double()
        if not said.isfinite().all():
            return None
        one = torch.ones(count, dtype=torch.float64, device="cpu")
        # b is a weight, so that each product is rounded. x_0 has no part in the result and must not change it: it is
        # NaN where the result is, and otherwise finite, being clipped.
        columns = {"out_sample": said[:, 0], "out_pred": one}
        columns |= {"x0_sample": said[:, 0], "x0_pred": one, "x0_scale": one, "clip": one}
        table = StepTable.from_columns(torch.zeros(count, device="cpu"), columns, name="noised samples")
        weights = torch.stack([said[:, 1], torch.zeros_like(one)], 1).unsqueeze(1)
        return cls({torch.device("cpu"): table}, Guidance(weights, None))

    def noised(self, row: int | Tensor, samples: Tensor, noise: Tensor) -> Tensor:
        """Return noised samples; ``row``: a step, or one for each sample."""
        device = samples.device
        table = self.tables.get(device)
        if table is None:
            table = self.tables[device] = self.tables[torch.device("cpu")].to(device)
        return guided_step(table, row, samples, [noise], self.noise)


Noisings = dict[torch.dtype, Noising | bool]
"""By the arithmetic; ``True``: it was used once, which alone would not repay a table, and diffusers' own call made the
same bits; ``False``: there is none."""


class _StandIn:
    """Stands for a scheduler in diffusers' formula: it has some attributes of its own, and no place in a loop."""

    begin_index = step_index = None

    def __init__(self, scheduler: Any, **own: Any) -> None:
        self._scheduler = scheduler
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def index_for_timestep(self, timestep: Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Return a step, which the formula is given in the place of its timestep."""
        return int(timestep)


def noised_by_count(theirs: Any) -> Any:
    """Return diffusers' ``add_noise``, or ``scale_noise``, of a scheduler whose steps are found by its count.

    Its own is called for whatever the kernel does not serve.
    """
    if not _names_in(theirs.__code__) >= _BY_THE_COUNT:
        return theirs  # of another diffusers
    if "original_samples" in theirs.__code__.co_varnames:

        @functools.wraps(theirs)
        def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            done = _by_count(self, theirs, original_samples, noise, timesteps)
            made: Tensor = theirs(self, original_samples, noise, timesteps) if done is None else done
            return made

        return add_noise

    @functools.wraps(theirs)
    def scale_noise(self: Any, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        done = _by_count(self, _scaling(theirs), sample, noise, timestep)
        made: Tensor = theirs(self, sample, timestep, noise) if done is None else done
        return made

    return scale_noise


def _names_in(code: CodeType) -> set[str]:
    """Return the names of attributes in a function's code, and in that of its comprehensions."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


@functools.cache
def _scaling(theirs: Any) -> Formula:
    return lambda scheduler, sample, noise, timestep: theirs(scheduler, sample, timestep, noise)


def _by_count(scheduler: Any, formula: Formula, samples: Any, noise: Any, timesteps: Any) -> Tensor | None:
    """Return noised samples; ``None``: nothing was done."""
    if not _are_served(samples, noise, timesteps) or timesteps.dim() != 1:
        return None
    host, index = host_tables(scheduler), scheduler._begin_index
    if None in host.versions:  # somebody's own, made in inference mode on a device: who writes to them is not known
        return None
    steps: list[int] | None
    if index is None:
        steps = _steps_of(scheduler, host, timesteps)
    else:
        steps = [index if scheduler._step_index is None else scheduler._step_index]
    if steps is None or not all([0 <= step < len(host.sigma_values) for step in steps]):  # noqa: C419
        return None
    before: tuple[HostTables, Noisings] | None = scheduler._noisings
    if before is None or before[0] is not host:
        same = before is not None and before[0].says_the_same_as(host)
        before = scheduler._noisings = host, before[1] if before is not None and same else {}

    def stand_in() -> tuple[_StandIn, int]:
        sigmas = host.host_sigmas.to(scheduler.sigmas.dtype)
        return _StandIn(scheduler, sigmas=sigmas, timesteps=host.host_timesteps), len(sigmas)

    return _made(before[1], formula, stand_in, steps, samples, noise)


def _steps_of(scheduler: Any, host: HostTables, timesteps: Tensor) -> list[int] | None:
    """Return the step of each timestep, as diffusers finds it; ``None``: the host does not know them all."""
    values, places = host.timestep_values, []
    if timesteps.is_cpu:
        for value in timesteps.tolist():
            if value not in values:
                return None
            places.append(values.index(value))
    else:
        place = place_in(scheduler.timesteps, timesteps) if timesteps.numel() == 1 else None
        if place is None:
            return None
        places.append(place)
    return [first_step_at(scheduler, host, values[place]) for place in places]


def noised_by_timestep(
    scheduler: Any, formula: Callable[[], Formula], samples: Any, noise: Any, timesteps: Any
) -> Tensor | None:
    """Return noised samples of a scheduler whose ``alphas_cumprod`` has a level for each timestep; ``None``: nothing.

    Args:
        scheduler, samples, noise, timesteps: of ``add_noise``.
        formula: returns diffusers' own.
    """
    alphas = scheduler.alphas_cumprod
    if not _are_served(samples, noise, timesteps) or timesteps.dim() > 1 or timesteps.dtype not in _INTEGERS:
        return None
    version = state_of(alphas)
    if version is None or not alphas.is_cpu:
        return None
    steps: Any = _values_of(scheduler, timesteps)
    if steps is None:
        if timesteps.device != samples.device:
            return None
        steps = timesteps.reshape(()) if timesteps.numel() == 1 else timesteps
    elif not all([0 <= step < len(alphas) for step in steps]):  # noqa: C419
        return None
    before: tuple[Tensor, Any, Noisings] | None = scheduler._noisings
    if before is None or before[0] is not alphas or before[1] != version:
        before = scheduler._noisings = alphas, version, {}

    def stand_in() -> tuple[_StandIn, int]:
        return _StandIn(scheduler, alphas_cumprod=alphas), len(alphas)

    return _made(before[2], lambda *of: formula()(*of), stand_in, steps, samples, noise)


_INTEGERS = torch.int64, torch.int32


def _values_of(scheduler: Any, timesteps: Tensor) -> list[int] | None:
    """Return timesteps as numbers; ``None``: they are on a device, and not one of those that were set."""
    if timesteps.is_cpu:
        values = timesteps.tolist()
        return values if isinstance(values, list) else [values]
    own = scheduler.__dict__
    place = place_in(own["timesteps"], timesteps) if timesteps.numel() == 1 else None
    host: HostTables | None = own.get("_host")
    cache = own.get("_timesteps_cache")
    if place is None:
        return None
    if host is not None and host.timesteps is own["timesteps"] and state_of(host.timesteps) == host.versions[1]:
        return [int(host.timestep_values[place])]
    if cache is not None and cache.tensor is own["timesteps"] and state_of(cache.tensor) == cache.version:
        return [cache.values[place]]
    return None


def _are_served(samples: Any, noise: Any, timesteps: Any) -> bool:
    """Tell whether the kernel takes samples and noise as they are, and several samples of these timesteps."""
    if not type(samples) is type(noise) is type(timesteps) is Tensor or torch.compiler.is_compiling():
        return False
    dtype, device, shape = samples.dtype, samples.device, samples.shape
    if dtype is not noise.dtype or dtype not in DTYPES or shape != noise.shape or device != noise.device:
        return False
    if device.type not in ("cpu", "cuda") or (dtype is torch.float64 and device.type != "cpu"):
        return False
    if torch.is_grad_enabled() and (samples.requires_grad or noise.requires_grad):
        return False
    if is_transformed() or not (samples.is_contiguous() and noise.is_contiguous()):
        return False
    return len(shape) > 0 and samples.numel() > 0 and timesteps.numel() in (1, shape[0])


def _made(
    noisings: Noisings,
    formula: Formula,
    stand_in: Callable[[], tuple[_StandIn, int]],
    steps: list[int] | Tensor,
    samples: Tensor,
    noise: Tensor,
) -> Tensor | None:
    """Return noised samples; ``None``: nothing was done."""
    dtype = torch.float64 if samples.dtype is torch.float64 else torch.float32
    noising = noisings.get(dtype)
    if noising is True or (noising is None and samples.dtype is not dtype):  # in 16 bits, each call rounds alike
        noising = noisings[dtype] = Noising.of(formula, *stand_in(), dtype) or False
    if not isinstance(noising, Noising):
        noisings.setdefault(dtype, True)
        return None
    row: int | Tensor
    if isinstance(steps, Tensor):
        row = steps.to(torch.int64)
    elif len(steps) == 1 or len(set(steps)) == 1:
        row = steps[0]
    elif samples.is_cpu:
        row = torch.tensor(steps, device="cpu")
    else:
        return None  # to move them would wait for the device
    return noising.noised(row, samples, noise)
