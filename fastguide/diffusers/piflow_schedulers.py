"""diffusers' scheduler of pi-Flow with the fused step: a whole rollout of the policy is one sum of the grid.

A model's output holds ``n_grid`` velocities, one after the other in its last dimension. To the kernel, each token is a
sample, so that a velocity of all tokens is a view of the output, and nothing is copied. Guidance is a sum of outputs,
and so of the velocities of each: its rollout is one sum as well.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_piflow import PiflowSchedulerOutput
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..guidance import Guidance
from ..guidance.scales import scale_columns
from ..solvers import StepTable
from ..solvers._piflow import Rollout, rollouts
from ..step.guided_step import guided_step
from .counted_loop import CountedLoop
from .counted_run import places
from .counted_step import CountedStep, index_of, is_integer, leave, loop_at
from .dtypes import Dtypes, of_the_sample
from .fitted import SHAPES, refusal_of
from .guidance_arguments import Scale, combined, guidance_of, is_by_value
from .host_tables import HostTables, host_tables, on_host
from .lazy_guidance import resolved
from .lazy_tensor import plain
from .scheduler_step import count_fused
from .taken import Output, Taken
from .timesteps import place_of
from .weights_of_formula import Ahead, Conversion

__all__ = ["PiflowScheduler"]

_MOST = 32
"""Velocities, as many as kernels take on a GPU."""
_MOST_SCALES = 64
"""Of guidance, whose weights are kept for a loop's later calls."""


class PiflowScheduler(CountedStep, diffusers.PiflowScheduler):  # type: ignore[metaclass]
    """``diffusers.PiflowScheduler`` with the fused step: one launch for all substeps of a step."""

    _plain_output = PiflowSchedulerOutput
    _sigmas_on_device = True
    _refuses_integers = True
    _not_in_tables = "several predictions in one output of the model"
    _further_tables = ("_piflow_raw_timesteps",)
    _state = ("n_grid", "eps", "num_policy_substeps")
    n_grid: int
    eps: float
    num_policy_substeps: int
    set_timesteps = on_host(diffusers.PiflowScheduler.set_timesteps)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step."""
        return of_the_sample(sample, model)

    def _why_not(self) -> str | None:
        return f"a grid of more than {_MOST} predictions" if self.n_grid > _MOST else None

    def _init_step_index(self, timestep: Any) -> None:
        place = self._begin_index
        if place is None:
            place = place_of(self.timesteps, host_tables(self).timestep_values, timestep)
        if place is None:
            place = diffusers.PiflowScheduler._step_index_for(self, timestep)
        self._step_index = place

    def _rollouts(self, tables: HostTables, begin: int) -> list[Rollout]:
        raw = tables.host_further[0]
        return rollouts(
            raw[begin:],
            tables.host_sigmas[begin : len(raw)],
            shift=float(self.config.shift),
            n_grid=self.n_grid,
            num_substeps=self.num_policy_substeps,
            eps=self.eps,
        )

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        """Return the rows of the sample; the velocities' part, of which rows have one, is in their weights."""
        of_sample = [each.of_sample for each in self._rollouts(tables, begin)]
        columns = {"out_sample": torch.tensor(of_sample, dtype=torch.float64, device="cpu")}
        columns["out_pred"] = torch.ones_like(columns["out_sample"])
        return StepTable.from_columns(tables.host_timesteps[begin:], columns, name="piflow")

    def _weights(self, loop: CountedLoop, guidance: Guidance | None) -> Guidance:
        """Return the weights of the velocities at each call of a loop: those of a rollout, times those of guidance."""
        made = loop.made.weights
        if made is None:
            made = loop.made.weights = {}
        found = made.get(guidance)
        if found is None:
            if len(made) >= _MOST_SCALES:
                made.clear()
            outputs = [1.0] if guidance is None else _weights_of_outputs(guidance)
            is_conversion = len(outputs) == 1 or isinstance(guidance, Conversion)
            make = Ahead if isinstance(guidance, Ahead) else Conversion if is_conversion else Guidance
            grids = [each.of_grid for each in self._rollouts(loop.tables, loop.begin)]
            calls = [[output * velocity for output in outputs for velocity in grid] for grid in grids]
            columns = torch.cat([scale_columns(sum(call), *call[1:], 0.0) for call in calls])
            found = made[guidance] = make(columns, None)
        weights: Guidance = found
        return weights

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``.

        Guidance with a scale for each sample, or of more velocities than kernels take, is computed before. Most models
        that this scheduler is for are distilled from guided ones, and are not guided again.
        """
        sample = plain(sample)
        given, scale = resolved(model_output, self._as_wide(sample), guidance_scale)
        guidance = guidance_of(given, sample, scale, None, 1.0, "epsilon")  # refuses what does not fit
        outputs = _outputs(given, guidance)
        known = is_by_value(scale) and (guidance is None or guidance.weights_from is None)
        if is_dynamo_compiling() or not known or len(outputs) * self.n_grid > _MOST:
            outputs, guidance = (combined(self, model_output, sample, guidance_scale, None),), None
        result = self._rolled_out(outputs, guidance, timestep, sample)
        if result is None:
            output = outputs[0] if guidance is None else combined(self, model_output, sample, guidance_scale, None)
            return super().step(output, timestep, sample, return_dict)  # type: ignore[misc]
        return self._result(result, None, result.dtype, return_dict)

    def _as_wide(self, sample: Any) -> Any:
        """Return a tensor of the shape of a model's outputs for a sample, without memory of its own."""
        if not isinstance(sample, Tensor) or sample.dim() == 0:
            return sample
        return sample.new_empty(()).expand(*sample.shape[:-1], self.n_grid * sample.shape[-1])

    def _rolled_out(
        self, outputs: tuple[Tensor, ...], guidance: Guidance | None, timestep: Any, sample: Tensor
    ) -> Tensor | None:
        """Return the next sample; ``None``: it is left to diffusers' own ``step``."""
        steps = self.__dict__.get("num_inference_steps")
        if steps is None or is_dynamo_compiling() or is_integer(timestep):
            return None
        index = index_of(self, timestep)
        if index >= steps:
            return None  # diffusers says that there are none
        dtypes = self._dtypes(sample.dtype, outputs[0].dtype)
        loop = loop_at(self, index, (), sample, dtypes.working)
        refusal = next(filter(None, [refusal_of(sample, output, None, None) for output in outputs]), None)
        wide = *sample.shape[:-1], self.n_grid * sample.shape[-1]
        if any(output.shape != wide for output in outputs) or sample.dim() < 2:
            refusal = SHAPES
        if loop.table is None or refusal is not None:
            leave(self, loop, index, refusal)
            return None
        weights = self._weights(loop, guidance)
        result = self._run(loop, loop.table, index - loop.begin, outputs, weights, sample.contiguous(), dtypes)
        self._step_index = index + 1
        count_fused(self, weights, is_last=loop.is_over)
        return result

    def _run(
        self, loop: CountedLoop, table: StepTable, call: int, outputs: tuple[Tensor, ...], weights: Guidance,
        sample: Tensor, dtypes: Dtypes,
    ) -> Tensor:  # fmt: skip
        """Make a step with the kernel."""
        given, _ = loop.inputs(sample, dtypes)
        keeps = self.float32_state and dtypes.is_rounded
        out, returned = places(loop, given, None, sample, dtypes.result, keeps, keeps)
        tokens = -1, sample.shape[-1]
        grids = [output.reshape(-1, output.shape[-1]).unflatten(-1, (self.n_grid, -1)) for output in outputs]
        predictions = [velocity for grid in grids for velocity in grid.unbind(1)]
        result = guided_step(
            table,
            call,
            given.view(tokens),
            predictions,
            weights,
            out=None if out is None else out.view(tokens),
            staged=None if returned is None else returned.view(tokens),
        ).view(sample.shape)
        return loop.note(call, result, returned, None)


def _outputs(given: Output, guidance: Guidance | None) -> tuple[Tensor, ...]:
    """Return the outputs that guidance is of, each with a grid of velocities."""
    if isinstance(given, Taken):
        return given.predictions
    return (given,) if guidance is None else given.chunk(2)


def _weights_of_outputs(guidance: Guidance) -> list[float]:
    """Return the weights of guidance, which was made of numbers."""
    total, *others, _ = guidance.weights(torch.device("cpu"), torch.float64).flatten().tolist()
    return [total - sum(others), *others]
