"""diffusers' multistep schedulers in the logarithm of the signal-to-noise ratio, with the fused step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..schedules.levels import Levels
from ..schedules.predictions import Linear, original_from
from ..solvers import StepTable
from ..solvers._dpm import multistep_columns
from ..solvers._signal_steps import SignalSteps, signal_table
from ..solvers.deis import deis_table
from ..solvers.dpm_solver_singlestep import singlestep_table
from ..solvers.entries import Form
from ..solvers.sa_solver import sa_solver_table
from ..solvers.unipc import predictor_forms, unipc_table
from .counted_loop import CountedLoop
from .counted_step import CountedStep, counted_step, left
from .drawing import Drawing
from .dtypes import Dtypes, of_the_model, of_the_sample, promoted
from .guidance_arguments import Scale
from .handed_over import HandsOver
from .host_alphas import HostAlphas
from .host_tables import HostTables, host_tables, on_host
from .joined import Joined
from .noise import Generators
from .noising import noised_by_count
from .step_signatures import NOT_AT, Draws, StepWithGenerator, StepWithoutNoise

__all__ = [
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]


class _Signal(CountedStep):
    """What they share: the levels of diffusers' sigmas, of a noise schedule or of a flow."""

    _plain_output = SchedulerOutput
    predict_x0: bool

    def _why_not(self) -> str | None:
        config = self.config
        flow = bool(config.get("use_flow_sigmas"))
        known = ("epsilon", "sample", "flow_prediction" if flow else "v_prediction")
        return None if config.prediction_type in known else "a configuration that rows do not express"

    def _why_not_from(self, begin: int) -> str | None:
        """Say so of sigmas that noise schedules have, and no flow: Karras' spacing, for one, does not know of flows."""
        beyond = self.config.get("use_flow_sigmas") and max(host_tables(self).sigma_values[begin:]) > 1
        return "sigmas of a flow that are above 1" if beyond else None

    def _predicted(self, output: Any) -> Any:
        """Return a model's output without the variance that it learned, which diffusers drops; of images only."""
        config = self._internal_dict
        if config.get("variance_type") not in ("learned", "learned_range") or config["prediction_type"] != "epsilon":
            return output
        return output.main if type(output) is Joined else output[:, :3]

    def _signal_steps(self, tables: HostTables, begin: int) -> SignalSteps:
        sigmas = tables.sigmas_from(begin)
        if self.config.get("use_flow_sigmas"):
            levels = Levels.flow_matching(sigmas)
        else:
            alpha = 1 / (sigmas.square() + 1).sqrt()
            levels = Levels(alpha, sigmas * alpha)
        return SignalSteps(levels, tables.host_timesteps[begin:], begin)

    def _original(self, steps: SignalSteps) -> Linear:
        return original_from(self.config.prediction_type, steps.here)


class DPMSolverMultistepScheduler(_Signal, diffusers.DPMSolverMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.DPMSolverMultistepScheduler`` with the fused step."""

    set_timesteps = on_host(diffusers.DPMSolverMultistepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.DPMSolverMultistepScheduler.add_noise)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step: diffusers returns that of what it converts the model's output to."""
        config = self._internal_dict
        unconverted = "sample" if config["algorithm_type"].endswith("++") else "epsilon"
        if config["prediction_type"] == unconverted:
            return of_the_model(sample, model)
        return promoted(sample, model)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config, steps = self.config, self._signal_steps(tables, begin)
        columns = multistep_columns(
            steps.levels,
            self._original(steps),
            solver_order=config.solver_order,
            algorithm_type=config.algorithm_type,
            solver_type=config.solver_type,
            lower_order_final=config.lower_order_final,
            euler_at_final=config.euler_at_final,
            total=steps.total,
        )
        return signal_table(steps, columns, "dpm_solver")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        stochastic = self._internal_dict["algorithm_type"].startswith("sde")
        model_output = self._predicted(model_output)
        drawing = Drawing(generator, dtype=torch.float32, noise=variance_noise) if stochastic else None
        done = counted_step(self, (), model_output, timestep, sample, return_dict, guidance_scale, drawing)
        if done is not None:
            return done
        output, sample = left(self, model_output, sample, guidance_scale)
        return super().step(output, timestep, sample, generator, variance_noise, return_dict)  # type: ignore[misc]


class DPMSolverSinglestepScheduler(_Signal, StepWithGenerator, diffusers.DPMSolverSinglestepScheduler):  # type: ignore[metaclass]
    """``diffusers.DPMSolverSinglestepScheduler`` with the fused step."""

    order_list: list[int]
    _noise_dtype = "original"
    """Of what diffusers converts the model's output to."""
    _state = ("order_list",)
    set_timesteps = on_host(diffusers.DPMSolverSinglestepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.DPMSolverSinglestepScheduler.add_noise)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        dtypes = promoted(sample, model)
        return dtypes._replace(original=model) if self._internal_dict["prediction_type"] == "sample" else dtypes

    def _why_not(self) -> str | None:
        stochastic = self.config.algorithm_type.startswith("sde")
        if stochastic and self.config.solver_order == 3:
            return "the third order of sde-dpmsolver++, of which a call leaves two tensors"
        return super()._why_not()

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config, steps = self.config, self._signal_steps(tables, begin)
        orders = [min(order, call + 1) for call, order in enumerate(self.order_list[begin:])]
        return singlestep_table(steps, self._original(steps), orders, config.algorithm_type, config.solver_type)

    def _draws(self) -> Draws:
        return bool(self.config.algorithm_type == "sde-dpmsolver++")


class UniPCMultistepScheduler(_Signal, HandsOver, StepWithoutNoise, diffusers.UniPCMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.UniPCMultistepScheduler`` with the fused step."""

    solver_p: Any
    disable_corrector: list[int]
    _state = ("solver_p", "disable_corrector", "predict_x0")
    set_timesteps = on_host(diffusers.UniPCMultistepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.UniPCMultistepScheduler.add_noise)

    @property
    def _ignores_thresholding(self) -> bool:  # type: ignore[override]
        return not self.predict_x0

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_sample(sample, model)

    def _why_not(self) -> str | None:
        if self.solver_p is not None:
            return "another scheduler for its predictor"
        if not 1 <= self.config.solver_order <= 3:
            return "an order above 3"
        if not self.predict_x0 and self.config.final_sigmas_type == "zero":
            return "predictions of noise down to a sigma of zero, which divide by it"
        return super()._why_not()

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config, steps = self.config, self._signal_steps(tables, begin)
        return unipc_table(
            steps,
            self._original(steps),
            solver_order=config.solver_order,
            solver_type=config.solver_type,
            predict_x0=self.predict_x0,
            disable_corrector=self.disable_corrector,
            lower_order_final=config.lower_order_final,
        )

    def _keeps_sample(self, begin: int, index: int) -> bool:
        return index == begin or index - 1 in self.disable_corrector

    def _predictor_forms(self, loop: CountedLoop) -> list[Form]:
        config, steps = self.config, self._signal_steps(loop.tables, loop.begin)
        options = config.solver_order, config.solver_type, self.predict_x0, config.lower_order_final
        return predictor_forms(steps, *options)


class DEISMultistepScheduler(_Signal, StepWithoutNoise, diffusers.DEISMultistepScheduler):  # type: ignore[metaclass]
    """``diffusers.DEISMultistepScheduler`` with the fused step."""

    set_timesteps = on_host(diffusers.DEISMultistepScheduler.set_timesteps)
    add_noise = noised_by_count(diffusers.DEISMultistepScheduler.add_noise)

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        steps = self._signal_steps(tables, begin)
        return deis_table(steps, self._original(steps), self.config.solver_order, self.config.lower_order_final)


class SASolverScheduler(HostAlphas, _Signal, StepWithGenerator, diffusers.SASolverScheduler):  # type: ignore[metaclass]
    """``diffusers.SASolverScheduler`` with the fused step."""

    tau_func: Callable[[Any], float]
    _state = ("tau_func", "predict_x0")
    set_timesteps = on_host(diffusers.SASolverScheduler.set_timesteps)

    def _why_not_at(self, timestep: Any) -> str | None:
        """Leave a loop to diffusers from a step at another timestep on, whose noise it asks for there.

        Raises:
            RuntimeError: diffusers has not made the loop's earlier steps, from which it would go on.
        """
        if self._is_at(timestep):
            return None
        loop = self._counted
        if loop is not None and loop.history is not None and loop.following == self._step_index:
            told = host_tables(self).timestep_values[self._step_index]
            raise RuntimeError(f"timestep: expected that of the loop's next step, {told}, got {timestep}")
        self._counted, self._handed_over = None, NOT_AT
        return NOT_AT

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_sample(sample, model)

    def _why_not(self) -> str | None:
        if max(self.config.predictor_order, self.config.corrector_order - 1) > 3:
            return "more than three tensors of earlier steps"
        return super()._why_not()

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        config, steps = self.config, self._signal_steps(tables, begin)
        return sa_solver_table(
            steps,
            self._original(steps),
            predictor_order=config.predictor_order,
            corrector_order=config.corrector_order,
            predict_x0=self.predict_x0,
            taus=[float(self.tau_func(timestep)) for timestep in steps.timesteps],
            lower_order_final=config.lower_order_final,
        )
