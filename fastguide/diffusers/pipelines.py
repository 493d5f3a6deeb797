"""Whole pipelines: exchange the scheduler and fuse the pipeline's guidance, without editing the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from . import schedulers
from .deferred import Traced

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


@dataclass
class Acceleration:
    """What ``accelerate`` did to a pipeline, and what it left alone, with the reason."""

    exchanged: dict[str, str] = field(default_factory=dict)
    traced: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)


def accelerate(pipe: Any) -> Acceleration:
    """Give a diffusers pipeline the fused step: text-to-image, class-conditional or unconditional.

    The scheduler becomes fastguide's of the same name, with the state that it has. The model's output is traced: where
    the pipeline computes ``uncond + guidance_scale * (cond - uncond)`` of its halves and gives it to the scheduler, the
    step does both in one pass and in float32; whatever else it computes is computed as before. Calling this again
    changes nothing more; ``restore(pipe)`` undoes it.

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
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    known: Acceleration | None = pipe.__dict__.get(_RECORD)
    if known is not None:
        return known
    done = Acceleration()
    for name in _SCHEDULERS:
        scheduler = getattr(pipe, name, None)
        if scheduler is None or type(scheduler) in _SERVED.values():
            continue
        served = _SERVED.get(type(scheduler))
        if served is None:
            done.left_alone[name] = (
                f"{type(scheduler).__name__}: only {', '.join(c.__name__ for c in _SERVED)} are served"
            )
            continue
        fused = served.__new__(served)
        fused.__dict__.update(scheduler.__dict__)
        done._before[name] = scheduler
        done.exchanged[name] = served.__name__
        setattr(pipe, name, fused)
    if type(getattr(pipe, "scheduler", None)) not in _SERVED.values():
        done.left_alone |= dict.fromkeys(_models(pipe), "its guidance goes to a scheduler that is left alone")
    else:
        for name in _models(pipe):
            done._hooks.append(getattr(pipe, name).register_forward_hook(_trace))
            done.traced.append(name)
    pipe.__dict__[_RECORD] = done
    return done


def restore(pipe: Any) -> None:
    """Undo ``accelerate``: the pipeline has the schedulers that it had before, and its models' outputs are plain.

    Raises:
        ValueError: the pipeline is not accelerated.
    """
    done: Acceleration | None = getattr(pipe, "__dict__", {}).pop(_RECORD, None)
    if done is None:
        raise ValueError(f"pipe: expected one that accelerate() was called on, got {type(pipe).__name__} as it was")
    for hook in done._hooks:
        hook.remove()
    for name, scheduler in done._before.items():
        setattr(pipe, name, scheduler)


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
