"""Say which of diffusers' schedulers are served, and by which class."""

from __future__ import annotations

import diffusers
from diffusers.utils import import_utils

from . import (
    cogvideox_schedulers,
    distilled_schedulers,
    edm_schedulers,
    flow_schedulers,
    pndm_schedulers,
    repaint_schedulers,
    schedulers,
    sigma_schedulers,
    signal_schedulers,
    unclip_schedulers,
    ve_schedulers,
)
from .scheduler_step import SchedulerStep

_MODULES = [
    schedulers,
    flow_schedulers,
    sigma_schedulers,
    signal_schedulers,
    pndm_schedulers,
    edm_schedulers,
    distilled_schedulers,
    cogvideox_schedulers,
    unclip_schedulers,
    repaint_schedulers,
    ve_schedulers,
]
HAS_TORCHSDE: bool = import_utils.is_torchsde_available()  # type: ignore[no-untyped-call]
"""Whether diffusers has schedulers of Brownian motion."""
if HAS_TORCHSDE:
    from . import brownian_schedulers

    _MODULES.append(brownian_schedulers)

HAS_FLOW_MAP, HAS_FLOW_ANCESTRAL, HAS_HELIOS, HAS_PIFLOW, HAS_RFD4 = (
    hasattr(diffusers, name)
    for name in (
        "FlowMapEulerDiscreteScheduler",
        "LTXEulerAncestralRFScheduler",
        "HeliosScheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
    )
)
"""Whether diffusers is new enough to have these schedulers."""
if HAS_FLOW_MAP:
    from . import flow_map_schedulers

    _MODULES.append(flow_map_schedulers)
if HAS_FLOW_ANCESTRAL:
    from . import flow_ancestral_schedulers

    _MODULES.append(flow_ancestral_schedulers)
if HAS_HELIOS:
    from . import helios_schedulers

    _MODULES.append(helios_schedulers)
if HAS_PIFLOW:
    from . import piflow_schedulers

    _MODULES.append(piflow_schedulers)
if HAS_RFD4:
    from . import rfd4_schedulers

    _MODULES.append(rfd4_schedulers)

__all__ = [name for module in _MODULES for name in module.__all__]

SERVED: dict[type, type[SchedulerStep]] = {
    getattr(diffusers, name): getattr(module, name) for module in _MODULES for name in module.__all__
}
"""diffusers' classes, each with the one that has the fused step."""
