"""Implementations of the step, in order of preference: the first that can run on a device is its default."""

from __future__ import annotations

from . import native, reference, triton
from .registry import register_backend

register_backend(native.backend())
register_backend(triton.backend(), default=not triton.INTERPRETED)
register_backend(reference.backend())
