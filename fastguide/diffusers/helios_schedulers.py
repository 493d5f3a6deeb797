"""diffusers' scheduler of Helios with the fused step: UniPC or Euler's method, over a flow or one stage of it."""

from __future__ import annotations

from typing import Any, NoReturn

import diffusers
import torch
from diffusers.schedulers.scheduling_helios import HeliosSchedulerOutput
from torch import Tensor

from ..schedules.flow import FlowSteps
from ..schedules.levels import Levels
from ..schedules.predictions import original_from
from ..solvers import StepTable
from ..solvers._signal_steps import SignalSteps
from ..solvers.flow_match_euler import flow_match_euler_table
from ..solvers.unipc import corrected_samples, unipc_table
from .counted_step import CountedStep, counted_step, left
from .dtypes import Dtypes, of_the_model, of_the_sample
from .guidance_arguments import Scale
from .host_tables import HostTables, host_tables, on_host
from .lazy_outputs import LazyOriginal
from .lazy_tensor import plain
from .noise import Generators

__all__ = ["HeliosScheduler"]


class HeliosScheduler(CountedStep, diffusers.HeliosScheduler):  # type: ignore[metaclass]
    """``diffusers.HeliosScheduler`` with the fused step.

    Its loops begin at the first step, wherever they are told to, and whatever the timestep is.
    """

    _plain_output = HeliosSchedulerOutput
    _sigmas_on_device = True
    _state = ("solver_p", "disable_corrector", "predict_x0")
    solver_p: Any
    disable_corrector: list[int]
    predict_x0: bool
    set_timesteps = on_host(diffusers.HeliosScheduler.set_timesteps)

    @property
    def _is_euler(self) -> bool:
        return bool(self._internal_dict["scheduler_type"] == "euler")

    @property
    def _ignores_thresholding(self) -> bool:  # type: ignore[override]
        return self._is_euler

    @property
    def _refuses_integers(self) -> bool:  # type: ignore[override]
        return self._is_euler

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_model(sample, model) if self._is_euler else of_the_sample(sample, model)

    def _why_not(self) -> str | None:
        config = self.config
        if self._is_euler:
            return None
        if config.thresholding:  # has no numbers here, nor a method: diffusers' own step raises
            return "dynamic thresholding"
        if self.solver_p is not None:
            return "another scheduler for its predictor"
        if not 1 <= config.solver_order <= 3:
            return "an order above 3"
        of_a_flow = config.use_flow_sigmas and config.prediction_type == "flow_prediction" and self.predict_x0
        known = config.scheduler_type == "unipc" and of_a_flow
        return None if known else "a configuration that rows do not express"

    def _why_not_from(self, begin: int) -> str | None:
        """Say why rows cannot express a loop that begins at a step, in this configuration; ``None``: they can."""
        from_noise = host_tables(self).sigma_values[begin] >= 1
        infinite = from_noise and not self._is_euler and self.config.solver_type == "bh1"
        return "a logarithm of the signal-to-noise ratio that is infinite, with bh1" if infinite else None

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        if self._is_euler:
            steps = FlowSteps(tables.sigmas_from(begin), tables.host_timesteps[begin:])
            return flow_match_euler_table(steps, stochastic=False, inverted=False)
        calls = self._signal_steps(tables, begin)
        return unipc_table(calls, original_from("flow_prediction", calls.here), predict_x0=True, **self._options())

    def _signal_steps(self, tables: HostTables, begin: int) -> SignalSteps:
        sigmas = tables.sigmas_from(begin)
        return SignalSteps(Levels(1 - sigmas, sigmas.clamp(min=1e-8)), tables.host_timesteps[begin:], begin)

    def _options(self) -> dict[str, Any]:
        config = self._internal_dict
        names = ("solver_order", "solver_type", "lower_order_final")
        return {"disable_corrector": self.disable_corrector, **{name: config[name] for name in names}}

    def _begin_at_the_first(self) -> None:
        """Begin a loop where the counter is not set."""
        if self._step_index is None:
            self._step_index = 0
            if self._counted is not None and self._counted.following != 0:
                self._counted = None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor | None = None,
        sample: Tensor = None,  # type: ignore[assignment]
        generator: Generators = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        The row goes on from UniPC's corrected sample without making it. diffusers returns that as well, as
        ``last_sample``: it is made for an output, and refused of a tuple.
        """
        self._begin_at_the_first()
        returns_corrected = return_dict and not self._is_euler
        before = self._before_step(model_output, sample) if returns_corrected else None
        done = counted_step(self, (), model_output, timestep, sample, False, guidance_scale)
        if done is None:
            output, sample = left(self, model_output, sample, guidance_scale)
            return super().step(output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        (result,) = done
        if self._is_euler:
            return HeliosSchedulerOutput(prev_sample=result) if return_dict else done
        if not return_dict:
            return result, None, LazyOriginal.of(result, _not_there), self._order_of_last_step()
        corrected: Any = self._corrected(plain(sample), result, before)
        return HeliosSchedulerOutput(result, None, corrected, self._order_of_last_step())

    def _before_step(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return copies of what the next step's corrected sample is made of: the last sample, and earlier entries."""
        loop = self._counted
        if loop is None or loop.history is None or loop.following != self._step_index:
            return None
        given, anchor = loop.inputs(plain(sample), self._dtypes(sample.dtype, model_output.dtype))
        return (given if anchor is None else anchor).clone(), loop.history.entries.clone()

    def _corrected(self, sample: Tensor, result: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the corrected sample of the step that was made last."""
        loop = self._counted
        assert loop is not None
        assert loop.table is not None
        if loop.made.corrected is None:
            loop.made.corrected = corrected_samples(self._signal_steps(loop.tables, loop.begin), **self._options())
        form = loop.made.corrected[loop.following - loop.begin - 1]
        if form is None or before is None:
            return sample
        anchor, entries = before
        of_slots = entries.unflatten(0, (-1, len(anchor)))
        slots = loop.table.coefficients()["hist_slot"]
        made: Tensor = form.anchor * anchor + form.result * result.to(anchor.dtype)
        for call, factor in form.entries.items():
            if factor:
                made += factor * of_slots[int(slots[call])]
        return made.to(result.dtype)

    def _order_of_last_step(self) -> int:
        assert self._counted is not None
        config, made = self._internal_dict, self._counted.following - self._counted.begin
        remaining = len(self.timesteps) - self._counted.following + 1
        order = min(config["solver_order"], remaining) if config["lower_order_final"] else config["solver_order"]
        return int(min(order, made))


def _not_there() -> NoReturn:
    raise RuntimeError(
        "last_sample: expected to be read of an output, with return_dict=True; of a tuple it is not made, as the fused "
        "step goes on from the corrected sample without it"
    )
