"""Accelerate whole pipelines: exchange the scheduler and fuse the pipeline's guidance, without editing either."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from .lazy_guidance import Traced
from .scheduler_step import SchedulerStep
from .schedulers import SERVED

_SCHEDULERS = ("scheduler", "inverse_scheduler")
_MODELS = ("unet", "transformer")
_CHANGES = "_fastguide_changes"


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
class _Changes:
    """What ``restore`` undoes; it is kept as an attribute of the pipeline."""

    schedulers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """fastguide's scheduler at each place, and the one before it."""
    hooks: dict[str, Any] = field(default_factory=dict)
    """The hook of each traced model."""


def accelerate(pipe: Any) -> Acceleration:
    """Give a diffusers pipeline the fused step, and fuse its classifier-free guidance into it.

    The scheduler becomes fastguide's of the same name, with the state that it has. The model's output is traced: where
    the pipeline computes ``uncond + guidance_scale * (cond - uncond)`` of its halves and gives it to the scheduler, the
    step does both in one pass and in float32; whatever else it computes is computed as before, such as rescaled
    guidance or that of a pipeline's own making. Nothing is traced in inference mode, with gradients, or of a model that
    is compiled afterwards. If you call the model yourself, you get a traced tensor too, a subclass of ``Tensor``.

    Call it again after you have exchanged a scheduler or a model; calling it again otherwise changes nothing.
    ``restore(pipe)`` undoes it. A saved pipeline is diffusers' own.

    Args:
        pipe: a pipeline with a ``scheduler``; with ``unet`` or ``transformer``, its guidance is fused as well.

    Returns:
        What was exchanged and traced, and what was left alone and why; mostly a scheduler other than DDPM and DDIM.

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
    changes: _Changes = pipe.__dict__.setdefault(_CHANGES, _Changes())
    exchanged, left_alone = _exchange_schedulers(pipe, changes)
    traced = []
    for name in _MODELS:
        model = getattr(pipe, name, None)
        if not isinstance(model, torch.nn.Module):
            continue
        _remove_hook(changes, name)
        if isinstance(pipe, diffusers.DiTPipeline):
            left_alone[name] = "DiTPipeline combines parts of channels by itself; only its step is fused"
        elif "scheduler" not in exchanged:
            left_alone[name] = "its guidance goes to no scheduler of fastguide's"
        else:
            changes.hooks[name] = model.register_forward_hook(_trace)
            traced.append(name)
    return Acceleration(exchanged, traced, left_alone)


def _exchange_schedulers(pipe: Any, changes: _Changes) -> tuple[dict[str, str], dict[str, str]]:
    """Put fastguide's schedulers in their places; return their classes, and the reasons of those that stay."""
    exchanged: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    for name in _SCHEDULERS:
        scheduler = getattr(pipe, name, None)
        if scheduler is None:
            continue
        own, kind = SERVED.get(type(scheduler)), type(scheduler).__name__
        if isinstance(scheduler, SchedulerStep):
            exchanged[name] = kind
        elif own is None:
            served = ", ".join(c.__name__ for c in SERVED)
            left_alone[name] = f"{kind}: only {served} are served, and no subclasses"
        elif scheduler.config.get("thresholding"):
            left_alone[name] = f"{kind}: dynamic thresholding is not in the fused step"
        else:
            fused = own.__new__(own)
            fused.__dict__.update(scheduler.__dict__)
            changes.schedulers[name] = (fused, scheduler)
            setattr(pipe, name, fused)
            exchanged[name] = own.__name__
    if not exchanged and not left_alone:
        left_alone["pipe"] = f"it has none of {', '.join(_SCHEDULERS)}"
    return exchanged, left_alone


def restore(pipe: Any) -> None:
    """Undo ``accelerate``: put the original schedulers back, and stop tracing the models' outputs.

    A scheduler or model that you have put in its place since stays.

    Raises:
        TypeError: it is no pipeline.
        ValueError: the pipeline is not accelerated.
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    changes: _Changes | None = pipe.__dict__.pop(_CHANGES, None)
    if changes is None:
        raise ValueError(
            f"pipe: expected one that accelerate() was called on, got a {type(pipe).__name__} that was not"
        )
    for name in list(changes.hooks):
        _remove_hook(changes, name)
    for name, (fused, before) in changes.schedulers.items():
        if getattr(pipe, name, None) is fused:
            setattr(pipe, name, before)


def _remove_hook(changes: _Changes, name: str) -> None:
    if name in changes.hooks:
        changes.hooks.pop(name).remove()


def _trace(module: torch.nn.Module, arguments: Any, output: Any) -> Any:
    """Return a model's output, or the first of several, traced: a forward hook."""
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
