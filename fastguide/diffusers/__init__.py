"""Drop-ins for diffusers: schedulers whose ``step`` is fastguide's fused kernel. Needs the extra ``diffusers``."""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("fastguide.diffusers: expected diffusers: pip install 'diffusers>=0.35'") from error

from . import guiders
from .from_pipeline import as_model, sampler_from_pipeline, step_table
from .pipelines import Acceleration, accelerate, restore
from .schedulers import DDIMInverseScheduler, DDIMParallelScheduler, DDIMScheduler, DDPMParallelScheduler, DDPMScheduler

__all__ = [
    "Acceleration",
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "accelerate",
    "as_model",
    "guiders",
    "restore",
    "sampler_from_pipeline",
    "step_table",
]
