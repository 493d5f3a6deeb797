"""Accelerate diffusers: a pipeline by one call, or by schedulers whose ``step`` is the fused kernel.

This needs the extra ``diffusers``.
"""

from __future__ import annotations

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("fastguide.diffusers: expected diffusers: pip install 'diffusers>=0.35'") from error

from . import guiders, served
from .cogvideox_schedulers import *  # noqa: F403
from .distilled_schedulers import *  # noqa: F403
from .edm_schedulers import *  # noqa: F403
from .flow_schedulers import *  # noqa: F403
from .from_pipeline import as_model, sampler_from_pipeline, step_table
from .pipelines import Acceleration, accelerate, restore
from .pndm_schedulers import *  # noqa: F403
from .repaint_schedulers import *  # noqa: F403
from .schedulers import *  # noqa: F403
from .sigma_schedulers import *  # noqa: F403
from .signal_schedulers import *  # noqa: F403
from .unclip_schedulers import *  # noqa: F403
from .ve_schedulers import *  # noqa: F403

if served.HAS_TORCHSDE:
    from .brownian_schedulers import *  # noqa: F403
if served.HAS_FLOW_MAP:
    from .flow_map_schedulers import *  # noqa: F403
if served.HAS_FLOW_ANCESTRAL:
    from .flow_ancestral_schedulers import *  # noqa: F403
if served.HAS_HELIOS:
    from .helios_schedulers import *  # noqa: F403
if served.HAS_PIFLOW:
    from .piflow_schedulers import *  # noqa: F403
if served.HAS_RFD4:
    from .rfd4_schedulers import *  # noqa: F403

__all__ = [
    "Acceleration",
    "accelerate",
    "as_model",
    "guiders",
    "restore",
    "sampler_from_pipeline",
    "step_table",
]
__all__ += served.__all__
