"""The implementations of the step by name, and which one serves a device when none is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..operator import StepArguments

StepFunction = Callable[..., None]
"""Called with the fields of ``StepArguments``, by position."""


class Backend(NamedTuple):
    """One implementation of the step."""

    name: str
    step: StepFunction
    devices: tuple[str, ...] | None
    """Types of device that it can run on in this process; ``None``: all."""
    status: str
    """What it is, or why it runs nowhere, in a line."""
    torch_stream: bool = False
    """Whether its kernel on a GPU draws torch's own noise."""
    makes_weights: tuple[str, ...] = ()
    """Types of devices on which its step makes weights from moments; elsewhere they are made before it."""
    group_elements: int = 0
    """The most elements of a group that has weights of its own, if a step on a GPU makes them; 0: they are made before
    it."""
    group_terms: int = 0
    """The most terms of such weights, predictions and the sample if it has one; with ``compiles_programs``, any
    number."""
    compiles_programs: bool = False
    """Whether a step compiles the program that makes weights of groups, and takes any: then the host has to know the
    words of it, and they need no memory beside the weights."""
    needs_thresholds: bool = False
    """Whether a step gets the thresholds of x_0, rather than finds them."""
    checks_overlap: bool = False
    """Whether it refuses by itself, before it writes, an output that shares a part of an input's memory."""
    backward: StepFunction | None = None
    """Writes the gradients of a step's inputs, called with ``Gradients`` too; ``None``: the reference does."""
    clipped: StepFunction | None = None
    """Makes a step on the CPU, and writes where it clips x_0: ``guided_step_clipped``; ``None``: a backward pass finds
    it out by the inputs."""
    squares: StepFunction | None = None
    """Makes a step and adds up its distance from its mean: ``guided_step_squares``; ``None``: by two steps."""
    repeats: bool = False
    """Whether its steps can be made again by ``fastguide.step.repeat``, with the native library's help."""
    relaunch: Callable[[StepArguments], Callable[..., None]] | None = None
    """Returns what makes such a step again; ``None``: the native library does."""
    most_predictions: int | None = None
    """Of a step on a GPU; ``None``: there is no limit."""
    broken: bool = False
    """Whether it should run on the CPU and cannot: then nothing else is chosen in its place."""

    def serves(self, device: str) -> bool:
        """Tell whether this backend can run on that type of device."""
        return self.devices is None or device in self.devices


BACKENDS: dict[str, Backend] = {}
_defaults: dict[str, Backend] = {}


def register_backend(backend: Backend, *, default: bool = True) -> None:
    """Add a backend; it becomes the default of its devices that have none yet, unless ``default`` is False."""
    BACKENDS[backend.name] = backend
    for device in (backend.devices or ()) if default else ():
        _defaults.setdefault(device, backend)


def default_backend(device: torch.device | str) -> str:
    """Return the name of the backend that serves a device when none is named.

    Raises:
        ValueError: The device is a GPU and no backend runs there, or the compiled backend exists and cannot be loaded.
            ``backend="reference"`` has to be named then.
    """
    return backend_for(None, torch.device(device).type).name


def backend_for(name: str | None, device: str) -> Backend:
    """Return the backend of that name, or the default of a type of device; refuse one that cannot run there."""
    if name is None:
        return _defaults.get(device) or _last_resort(device)
    chosen = BACKENDS.get(name)
    if chosen is None:
        raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {name!r}")
    if not chosen.serves(device):
        raise ValueError(f"backend: {name!r} does not serve a sample on {device!r} here: {chosen.status}")
    return chosen


def _last_resort(device: str) -> Backend:
    if device == "cuda":  # the reference would be a hundred times slower than what was asked for
        reasons = "; ".join(f"{b.name}: {b.status}" for b in BACKENDS.values() if b.devices is not None)
        raise ValueError(
            f"backend: no backend can run on a GPU here ({reasons}); pass backend='reference' for plain torch"
        )
    for backend in BACKENDS.values():
        if backend.broken:
            reason = f"{backend.name}: {backend.status}"
            raise ValueError(
                f"backend: no backend for a sample on {device!r} ({reason}); pass backend='reference' for plain torch"
            )
    return BACKENDS["reference"]
