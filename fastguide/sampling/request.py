"""What a call asks for, resolved and checked in one place, for ``Sampler`` and ``Slots`` alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .._plain_tensors import check_that_they_are_plain
from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers.table import StepTable
from ..step.backends.registry import Backend, backend_for
from ..step.checks import check_guidance, check_number, check_sample
from ..step.inpainting import Inpainting
from . import conditioning as conditioning
from .conditioning import Condition, NamedConditions
from .image_to_image import first_sample
from .model_call import ModelOptions
from .noise import Generators, NoNoise, noise_source


@dataclass(frozen=True)
class SampleRequest:
    """A fully checked run over a table: ``SamplerState.load`` takes it."""

    table: StepTable
    guidance: Guidance
    begin: int
    """The first model call; ``len(table)``: the table is not run."""
    x_T: Tensor
    first: Tensor
    """The sample that the run begins with, of x_T's shape."""
    inpainting: Inpainting | None
    conditions: NamedConditions
    conditions_signature: conditioning.Signature
    labels: Tensor | None
    noise: NoNoise
    backend: Backend
    skips_uncond: tuple[bool, ...]
    """For each model call, whether the unconditional prediction is left out."""

    @property
    def calls(self) -> range:
        """The model calls of the run."""
        return range(self.begin, len(self.table))

    def of_samples(self, samples: slice) -> SampleRequest:
        """Return the request for some of the samples alone."""
        painted = self.inpainting
        return replace(
            self,
            guidance=self.guidance.of_samples(samples),
            x_T=self.x_T[samples],
            first=self.first[samples],
            inpainting=None if painted is None else Inpainting(*[values[samples] for values in painted]),
            conditions=[(name, conditioning.at(condition, samples)) for name, condition in self.conditions],
            labels=None if self.labels is None else self.labels[samples],
            noise=self.noise.of_samples(samples),
        )


def make_request(
    options: ModelOptions,
    table: StepTable,
    guidance: Guidance | None,
    x_T: Tensor,
    *,
    cond: Condition | Sequence[Condition] | None = None,
    uncond: Condition | None = None,
    labels: Tensor | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float | None = None,
    generator: Generators | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    recorded: bool = False,
) -> SampleRequest:
    """Return the request of a call, its arguments as ``Sampler.__call__`` describes them; nothing is drawn or copied.

    ``recorded``: whether autograd may follow the run.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    table = checked_table(table)
    guidance = checked_guidance(guidance) or UNGUIDED
    if not isinstance(x_T, Tensor) or x_T.dim() == 0:
        got = "one without dimensions" if isinstance(x_T, Tensor) else type(x_T).__name__
        raise TypeError(f"x_T: expected a tensor of shape (batch, ...), got {got}")
    batch = x_T.shape[0]
    backend = backend_for(options.backend, x_T.device.type)
    _check_run(table, guidance, x_T, options, recorded)
    check_number(backend, x_T.device, guidance)
    whole = table
    table, first, begin, mask = first_sample(whole, x_T, image, mask, strength)
    table.device_rows(guidance.form, torch.float32)
    if guidance.steps > 1 and table.host_timesteps[begin:] != whole.host_timesteps[begin:]:
        raise ValueError(
            f"guidance: expected scales that are the same at all steps, as {whole.name} makes other model calls where "
            f"it begins later, got {guidance.steps}"
        )
    conditions = conditioning.as_list(cond, uncond, guidance.num_conditions)
    signature = conditioning.signature(conditions, batch)
    given = [tensor for _, condition in conditions for tensor in conditioning.tensors(condition)]
    check_that_they_are_plain([tensor for tensor in (x_T, image, *given) if tensor is not None], "Sampler")
    conditioning.check_labels(labels, guidance, batch)
    return SampleRequest(
        table=table,
        guidance=guidance,
        begin=begin,
        x_T=x_T,
        first=first,
        inpainting=None if mask is None or image is None else Inpainting(mask, image, x_T),
        conditions=conditions,
        conditions_signature=signature,
        labels=labels,
        noise=noise_source(table, x_T, generator, seeds, backend),
        backend=backend,
        skips_uncond=_skips_uncond(options, guidance, len(table)),
    )


def checked_table(table: StepTable) -> StepTable:
    """Return the table; refuse anything that is not a StepTable."""
    if not isinstance(table, StepTable):
        raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
    return table


def checked_guidance(guidance: Guidance | None) -> Guidance | None:
    """Return guidance or None; refuse what is neither."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise TypeError(f"guidance: expected a Guidance or None, got {type(guidance).__name__}")
    return guidance


def _check_run(table: StepTable, guidance: Guidance, x_T: Tensor, options: ModelOptions, recorded: bool) -> None:
    """Refuse, before the model is called, what a step would refuse after it."""
    if x_T.device != table.device:
        raise ValueError(f"table: expected it on {x_T.device}, the device of x_T, got {table.device}; use .to()")
    check_guidance(table, guidance, x_T.shape[0])
    check_sample("x_T", x_T, torch.is_grad_enabled() and not recorded)
    if table.learned_variance and x_T.dim() < 2:
        raise ValueError("x_T: expected shape (batch, channels, ...) for a table of learned variance")
    if table.timesteps.is_floating_point() and not options.told_in(table).is_floating_point:
        raise ValueError("timestep_dtype: expected torch.float32 for a table of real timesteps, got torch.int64")


def _skips_uncond(options: ModelOptions, guidance: Guidance, calls: int) -> tuple[bool, ...]:
    if not options.skip_unconditional or guidance.num_predictions < 2:
        return (False,) * calls
    flags = guidance.steps_without_unconditional()
    if flags is None and guidance.weights_from is not None:
        raise ValueError(
            "skip_unconditional: expected constant weights, or guidance within an interval, got weights that are made "
            "from the predictions at every step, among them the unconditional one"
        )
    if flags is None:
        raise ValueError("skip_unconditional: expected scales that the host knows, got a tensor on a device")
    return flags * calls if len(flags) == 1 else flags
