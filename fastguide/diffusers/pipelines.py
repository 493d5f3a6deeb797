"""Whole pipelines: exchange the scheduler and fuse the pipeline's guidance, without editing the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from . import schedulers
from .lazy_guidance import Traced
from .scheduler_step import FusedStep

_SERVED = {
    getattr(diffusers, cls.__name__): cls
    for cls in (
        schedulers.DDIMScheduler,
        schedulers.DDPMScheduler,
        schedulers.DDIMParallelScheduler,
        schedulers.DDPMParallelScheduler,
        schedulers.DDIMInverseScheduler,
    )
}
_SCHEDULERS = ("scheduler", "inverse_scheduler")
_MODELS = ("unet", "transformer")
_RECORD = "_fastguide_acceleration"


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate`` did to a pipeline.

    ``exchanged``: the schedulers by their places in the pipeline, with their classes. ``traced``: the models whose
    guidance is fused into the step. ``left_alone``: parts that stay as they were, each with the reason.
    """

    exchanged: dict[str, str]
    traced: list[str]
    left_alone: dict[str, str]


@dataclass
class _Record:
    """What ``restore`` needs: each scheduler of fastguide's with the one before it, each traced model with its hook."""

    schedulers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    models: dict[str, tuple[torch.nn.Module, Any]] = field(default_factory=dict)


def accelerate(pipe: Any) -> Acceleration:
    """Give a diffusers pipeline the fused step, and fuse its classifier-free guidance into it.

    The scheduler becomes fastguide's of the same name, with the state that it has. The model's output is traced: where
    the pipeline computes ``uncond + guidance_scale * (cond - uncond)`` of its halves and gives it to the scheduler, the
    step does both in one pass and in float32; whatever else it computes is computed as before, such as rescaled
    guidance or that of a pipeline's own making. Nothing is traced in inference mode, with gradients, or of a model that
    is compiled afterwards. Who calls the model himself gets a traced tensor as well, a subclass of ``Tensor``.

    Call it again after a scheduler or a model has been exchanged; otherwise that changes nothing. ``restore(pipe)``
    undoes it. A pipeline that is saved is saved as diffusers' own.

    Args:
        pipe: a pipeline with a ``scheduler``; with ``unet`` or ``transformer``, its guidance is fused as well.

    Returns:
        What was exchanged and traced, and what was left alone and why: another scheduler than DDPM or DDIM, mostly.

    Raises:
        TypeError: it is no pipeline.

    >>> import diffusers, fastguide.diffusers
    >>> unet = diffusers.UNet2DModel(
    ...     8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ...     norm_num_groups=4, layers_per_block=1,
    ... )
    >>> pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    >>> fastguide.diffusers.accelerate(pipe)
    Acceleration(exchanged={'scheduler': 'DDIMScheduler'}, traced=['unet'], left_alone={})
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        modular = getattr(diffusers, "ModularPipeline", None)
        hint = ""
        if modular is not None and isinstance(pipe, modular):
            hint = "; a modular one takes a scheduler and a guider of fastguide.diffusers as its components"
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}{hint}")
    record: _Record = pipe.__dict__.setdefault(_RECORD, _Record())
    exchanged: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    for name in _SCHEDULERS:
        scheduler = getattr(pipe, name, None)
        if scheduler is None:
            continue
        if type(scheduler) in _SERVED:
            if scheduler.config.get("thresholding"):
                left_alone[name] = f"{type(scheduler).__name__}: dynamic thresholding is not in the fused step"
                continue
            served = _SERVED[type(scheduler)]
            fused = served.__new__(served)
            fused.__dict__.update(scheduler.__dict__)
            record.schedulers[name] = (fused, scheduler)
            setattr(pipe, name, fused)
            scheduler = fused
        if isinstance(scheduler, FusedStep):
            exchanged[name] = type(scheduler).__name__
        else:
            served_names = ", ".join(c.__name__ for c in _SERVED)
            left_alone[name] = f"{type(scheduler).__name__}: only {served_names} are served, and no subclasses"
    if not exchanged and not left_alone:
        left_alone["pipe"] = f"it has none of {', '.join(_SCHEDULERS)}"
    traced = []
    for name in _models(pipe):
        reason = "its guidance goes to no scheduler of fastguide's"
        if isinstance(pipe, diffusers.DiTPipeline):
            reason = "DiTPipeline combines parts of channels by itself; only its step is fused"
        _remove_hook(record, name)
        if "scheduler" in exchanged and not isinstance(pipe, diffusers.DiTPipeline):
            model = getattr(pipe, name)
            record.models[name] = (model, model.register_forward_hook(_trace))
            traced.append(name)
        else:
            left_alone[name] = reason
    return Acceleration(exchanged, traced, left_alone)


def restore(pipe: Any) -> None:
    """Undo ``accelerate``: the schedulers are those from before, and the models' outputs are plain.

    A scheduler or model that the caller has put in its place since stays.

    Raises:
        TypeError: it is no pipeline.
        ValueError: the pipeline is not accelerated.
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    record: _Record | None = pipe.__dict__.pop(_RECORD, None)
    if record is None:
        raise ValueError(
            f"pipe: expected one that accelerate() was called on, got a {type(pipe).__name__} that was not"
        )
    for name in list(record.models):
        _remove_hook(record, name)
    for name, (fused, before) in record.schedulers.items():
        if getattr(pipe, name, None) is fused:
            setattr(pipe, name, before)


def _remove_hook(record: _Record, name: str) -> None:
    if name in record.models:
        record.models.pop(name)[1].remove()


def _models(pipe: Any) -> list[str]:
    return [name for name in _MODELS if isinstance(getattr(pipe, name, None), torch.nn.Module)]


def _trace(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
    """A forward hook: the output, or the first of several, traced."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return output
    if isinstance(output, tuple) and output and _plain_tensor(output[0]):
        return (Traced.of(output[0]), *output[1:])
    if _plain_tensor(getattr(output, "sample", None)):
        output.sample = Traced.of(output.sample)
        return output
    return Traced.of(output) if _plain_tensor(output) else output


def _plain_tensor(value: Any) -> bool:
    return type(value) is Tensor and not value.is_inference() and value.dim() > 0
