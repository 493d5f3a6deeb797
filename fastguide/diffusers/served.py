"""Say which of diffusers' schedulers are served, and by which class."""

from __future__ import annotations

import diffusers

from . import flow_schedulers, pndm_scheduler, schedulers, sigma_schedulers, signal_schedulers
from .scheduler_step import SchedulerStep

_MODULES = (schedulers, flow_schedulers, sigma_schedulers, signal_schedulers, pndm_scheduler)

__all__ = [name for module in _MODULES for name in module.__all__]

SERVED: dict[type, type[SchedulerStep]] = {
    getattr(diffusers, name): getattr(module, name) for module in _MODULES for name in module.__all__
}
"""diffusers' classes, each with the one that has the fused step."""
