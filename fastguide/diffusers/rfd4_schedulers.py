"""diffusers' scheduler of RFD4-Proteina with the fused step: a flow whose tokens are masked in the same pass."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_rfd4_proteina import RFD4ProteinaSchedulerOutput
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..solvers import StepTable
from ..solvers._proteina import proteina_table
from ..step.guided_step import guided_step
from ..step.inpainting import Inpainting
from ..step.memory import empty_like, in_layout_of
from .counted_step import CountedStep, leave, left, loop_at
from .dtypes import Dtypes
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, guidance_of
from .host_tables import HostTables, host_tables, on_host
from .lazy_guidance import resolved
from .lazy_tensor import plain
from .noise import noise_of
from .scheduler_step import count_fused

__all__ = ["RFD4ProteinaScheduler"]


class RFD4ProteinaScheduler(CountedStep, diffusers.RFD4ProteinaScheduler):  # type: ignore[metaclass]
    """``diffusers.RFD4ProteinaScheduler`` with the fused step."""

    _plain_output = RFD4ProteinaSchedulerOutput
    _levels_in = "_times"
    _further_tables = ("_noise",)
    _sigmas_fall = False
    _not_in_tables = "a mask in each of its steps"
    _times: Tensor
    _noise: Tensor
    set_timesteps = on_host(diffusers.RFD4ProteinaScheduler.set_timesteps)

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return those of a step: its timesteps are no numbers to torch's promotion."""
        both = torch.promote_types(torch.promote_types(sample, model), self.timesteps.dtype)
        return Dtypes(model, both, both)

    def _why_not(self) -> str | None:
        count = len(self.timesteps)
        if len(self._times) != count + 1 or len(self._noise) < count:
            return "timesteps that are not set"
        between = all(0 < time < 1 for time in host_tables(self).timestep_values)
        return None if between else "times that are not between 0 and 1"

    def _is_stochastic(self, tables: HostTables) -> Tensor:
        """Tell which calls are: not those of times near either end, compared in the timesteps' dtype."""
        config, times = self.config, tables.host_timesteps
        deterministic: Tensor = (times > config.t_lim_ode) | (times < config.t_lim_ode_below)
        return ~deterministic

    def _loop_table(self, tables: HostTables, begin: int) -> StepTable:
        every = slice(begin, len(tables.host_timesteps))
        return proteina_table(
            tables.host_timesteps[every].double(),
            tables.sigmas_from(begin).diff(),
            tables.host_further[0][every].double(),
            self._is_stochastic(tables)[every],
            tsr_k=self.config.tsr_k,
            tsr_sigma=self.config.tsr_sigma,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        emit_mask: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        guidance_scale: Scale | None = None,
    ) -> Any:
        """Make one step: diffusers' own, and guidance with it; ``guidance_scale`` as in ``DDIMScheduler.step``."""
        index, result = self._step_index, None
        is_one = isinstance(timestep, Tensor) and timestep.dim() == 0  # diffusers takes no other
        if is_one and index is not None and index < len(self.timesteps) and not is_dynamo_compiling():
            usual = timestep.dtype == self.timesteps.dtype  # or diffusers computes in that dtype
            if usual and self._is_at(timestep):
                result = self._made(model_output, sample, emit_mask, generator, guidance_scale)
        if result is None:
            output, sample = left(self, model_output, sample, guidance_scale)
            return super().step(output, timestep, sample, emit_mask, generator, return_dict)  # type: ignore[misc]
        return self._result(result, None, result.dtype, return_dict)

    def _made(
        self, model_output: Tensor, sample: Tensor, emit_mask: Tensor, generator: Any, guidance_scale: Scale | None
    ) -> Tensor | None:
        """Return the next sample; ``None``: it is left to diffusers' own ``step``."""
        index, tables = self._step_index, host_tables(self)
        assert index is not None
        output, scale = resolved(model_output, sample, guidance_scale)
        sample, emit_mask = plain(sample).contiguous(), plain(emit_mask)
        guidance = guidance_of(output, sample, scale, None, 1.0, "epsilon")
        generators = diffusers.RFD4ProteinaScheduler._generators(generator, sample.shape[0])  # refuses what misfits
        dtypes = self._dtypes(sample.dtype, output.dtype)
        loop = loop_at(self, index, (), sample, dtypes.working)
        refusal = refusal_of(sample, output, None, None)
        if emit_mask.shape != sample.shape[:-1] or sample.dim() != 3:
            refusal = SHAPES
        elif emit_mask.dtype != torch.bool or emit_mask.device != sample.device:
            refusal = "a mask that is not as described"
        fitted = None if refusal else fitted_predictions(output, sample, guidance, False)
        if loop.table is None or fitted is None:
            leave(self, loop, index, refusal)
            return None
        call, given = index - loop.begin, loop.inputs(sample, dtypes)[0]
        noise = source = None
        if self._is_stochastic(tables)[index]:
            every = None if generators is None else list(generators)
            adds, in_step = loop.table.adds_noise[call], given.dtype == sample.dtype
            noise, source = noise_of(every, given, sample.dtype, adds=adds, in_step=in_step)
        emits = in_layout_of(given, emit_mask.to(torch.float32)[..., None].expand(given.shape))
        result = guided_step(
            loop.table,
            call,
            given,
            fitted[0],
            guidance,
            noise=noise,
            generator=source,
            inpainting=Inpainting(emits, emits, emits),  # of which a row of this table takes the mask alone
            out=empty_like(given, dtypes.result),
        )
        self._step_index = index + 1
        loop.note(call, result, None, None)
        count_fused(self, guidance, is_last=loop.is_over)
        return result
