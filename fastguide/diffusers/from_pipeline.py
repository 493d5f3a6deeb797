"""Make a ``Sampler`` of the parts of a diffusers pipeline: its denoiser as a model, its scheduler as a table."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import torch
from torch import Tensor

from .._counts import is_integer
from ..guidance import Guidance
from ..sampling.sampler import Sampler
from ..solvers import StepTable
from .counted_step import CountedStep
from .host_tables import host_tables
from .served import SERVED
from .thresholding import thresholded, why_not_thresholded

_CONDITIONS = ("encoder_hidden_states", "class_labels")


def as_model(denoiser: Callable[..., Any], *, learned_variance: bool = True) -> Callable[..., Tensor]:
    """Return ``model(x, t, condition)`` for ``Sampler``, of a diffusers denoiser that returns ``.sample``.

    A condition that is a tensor goes to ``encoder_hidden_states`` or ``class_labels``, whichever the denoiser needs; a
    mapping goes to its arguments by name, and may hold mappings, such as ``added_cond_kwargs``.

    Args:
        denoiser: a model of diffusers, or a callable with its arguments.
        learned_variance: whether to return the second half of twice the channels too, for a table of learned variance.

    >>> import diffusers
    >>> unet = diffusers.UNet2DModel(
    ...     8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ...     norm_num_groups=4, layers_per_block=1,
    ... )
    >>> as_model(unet)(torch.randn(2, 3, 8, 8), torch.tensor([7, 7])).shape
    torch.Size([2, 3, 8, 8])
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser: expected a model of diffusers, got {type(denoiser).__name__}")
    module = denoiser.forward if isinstance(denoiser, torch.nn.Module) else denoiser
    names = inspect.signature(module).parameters
    needed = [name for name in _CONDITIONS if name in names]

    def model(x: Tensor, t: Tensor, condition: Tensor | None = None, **conditions: Any) -> Tensor:
        if condition is not None:
            if not needed:
                raise ValueError(f"cond: expected none, or a mapping, for {type(denoiser).__name__}, got a tensor")
            conditions[needed[0]] = condition
        output: Tensor = denoiser(x, timestep=t, **conditions, return_dict=False)[0]
        if not learned_variance and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        return output

    return model


def step_table(scheduler: Any, num_inference_steps: int, *, eta: float = 0.0) -> StepTable:
    """Return the steps that a scheduler of diffusers would make; the scheduler stays as it is.

    Args:
        scheduler: of diffusers or of fastguide.
        num_inference_steps: number of steps.
        eta: of DDIM.

    Raises:
        TypeError: it is another scheduler, or an argument is no number.
        ValueError: rows do not express its configuration, its schedule has no signal where the first step begins, or
            a number is out of range.

    >>> import diffusers
    >>> step_table(diffusers.DDIMScheduler(), 20, eta=1.0)
    StepTable(ddim, 20 steps, timesteps 950 .. 0, device=cpu)
    """
    ours = next((ours for theirs, ours in SERVED.items() if isinstance(scheduler, theirs)), None)
    if ours is None or not (ours._loop or issubclass(ours, CountedStep)):
        raise TypeError(f"scheduler: expected one whose loop is a table of steps, got {type(scheduler).__name__}")
    own = copy.copy(scheduler)  # from_config would drop what a pipeline has changed in the configuration
    _refuse(why_not_thresholded(own.config))
    most = own.config.get("num_train_timesteps", math.inf)  # Wuerstchen's are real
    if not is_integer(num_inference_steps):
        raise TypeError(f"num_inference_steps: expected an integer, got {num_inference_steps!r}")
    if not 1 <= num_inference_steps <= most:
        raise ValueError(f"num_inference_steps: expected 1 to {most}, got {num_inference_steps}")
    if issubclass(ours, CountedStep):
        return _counted_table(ours, own, num_inference_steps, eta)
    own.set_timesteps(num_inference_steps)
    table: StepTable = ours._loop(own, eta)
    return table


def _counted_table(ours: type[CountedStep], scheduler: Any, num_inference_steps: int, eta: float) -> StepTable:
    """Return the whole loop of a scheduler that counts its steps."""
    if eta != 0:
        raise ValueError(f"eta: expected 0 with {type(scheduler).__name__}, got {eta!r}")
    if scheduler.config.get("stages", 1) != 1:
        raise ValueError(f"scheduler: expected one with a single loop, got one with {scheduler.config.stages} stages")
    own: Any = ours.__new__(ours)
    own.__dict__.update(scheduler.__dict__)
    own.set_timesteps(num_inference_steps)
    _refuse(own._not_in_tables or own._why_not())
    table: StepTable = own._loop_table(host_tables(own), 0, *own._default_arguments)
    if not own._ignores_thresholding:
        table = thresholded(table, own.config)
    return replace(table, init_noise_sigma=float(getattr(own, "init_noise_sigma", 1.0)))


def sampler_from_pipeline(
    pipe: Any,
    num_inference_steps: int = 50,
    guidance: Guidance | None = None,
    *,
    eta: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Sampler:
    """Make a ``Sampler`` of a pipeline's denoiser and scheduler, for latents and embeddings that exist already.

    Args:
        pipe: a diffusers pipeline with a ``unet`` or ``transformer``, and a scheduler that is served.
        num_inference_steps: number of steps.
        guidance: such as ``fastguide.ClassifierFree(7.5)``; then ``uncond=`` is given with ``cond=``. A mapping goes
            to the denoiser's arguments by name.
        eta: of DDIM.
        dtype: what the latents are cast to for the denoiser; ``None``: its own. They are best float32 themselves.

    Returns:
        ``sampler(x_T, cond=prompt_embeds, uncond=negative_prompt_embeds)`` gives the latents that the pipeline would.

    Raises:
        TypeError, ValueError: it is no such pipeline, and what ``step_table`` raises.

    >>> import diffusers
    >>> unet = diffusers.UNet2DModel(
    ...     8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ...     norm_num_groups=4, layers_per_block=1,
    ... )
    >>> sampler = sampler_from_pipeline(diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()), 4)
    >>> sampler(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}")
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is None:
        raise ValueError(f"pipe: expected one with a unet or a transformer, got {type(pipe).__name__}")
    scheduler = getattr(pipe, "scheduler", None)
    table = step_table(scheduler, num_inference_steps, eta=eta).to(denoiser.device)
    model = as_model(denoiser, learned_variance=table.learned_variance)
    return Sampler(model, table, guidance, dtype=denoiser.dtype if dtype is None else dtype)


def _refuse(why_not: str | None) -> None:
    if why_not is not None:
        raise ValueError(f"scheduler: expected one that rows of a table express, got one with {why_not}")
