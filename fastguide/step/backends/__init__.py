"""Implementations of the step, entered in order of preference: the first that serves a device is its default."""

from __future__ import annotations

from .. import reference
from ..operator import Backend, register_backend
from . import native, triton

register_backend(native.backend())
register_backend(triton.backend(), default=not triton.INTERPRETED)
register_backend(
    Backend(
        name="reference",
        step=reference.guided_step,
        devices=None,
        status="plain torch, the specification",
    )
)
