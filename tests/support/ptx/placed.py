"""Tensors in the interpreter's memory, each allowed to be read or written as a step does, and launches over them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguide.step.backward import Gradients
from tests.support.ptx.launch import Launch
from tests.support.ptx.memory import INITIALISED, READ, WRITE, Memory
from tests.support.ptx.races import races

_KINDS = {"out": WRITE, "original": WRITE, "made": READ | WRITE}
_KINDS |= dict.fromkeys(("scratch", "inverse_thresholds"), READ | WRITE | INITIALISED)
_KINDS |= dict.fromkeys((name for name in Gradients._fields[3:]), WRITE)
"""By the names of arguments; all others are read."""


class Placed:
    """Place tensors, when called with the name and the tensor; launch kernels over what was placed.

    ``kinds``: what else is allowed, by the names of arguments.
    """

    def __init__(self, **kinds: int) -> None:
        self.memory, self._kinds = Memory(), _KINDS | kinds

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor's copy in the interpreter's memory."""
        size = tensor.numel() * tensor.element_size()
        begin = self.memory.allocate(size, name)
        self.memory.allow(begin, size, self._kinds.get(name, READ | INITIALISED))
        view = torch.from_numpy(self.memory.bytes[begin : begin + size]).view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        return view

    def launch(self, library, recorded, waves=None) -> list[str]:
        """Run a recorded launch; return what was found, races included."""
        code = library.code(recorded.kernel)
        launch = Launch(
            self.memory, code, recorded.blocks, recorded.threads, recorded.parameters, cluster=recorded.cluster
        )
        launch.run(waves)
        return launch.findings + races(launch)
