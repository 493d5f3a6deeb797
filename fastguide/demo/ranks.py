"""The processes that torchrun has started for the demo: a mesh of them, and the models of the first one on all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_First = TypeVar("_First", bound=nn.Module)
_Second = TypeVar("_Second", bound=nn.Module)


@contextmanager
def started() -> Iterator[DeviceMesh | None]:
    """Yield a mesh of all processes of torchrun, which share samples; ``None`` in a process that runs alone."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo")
    try:
        yield init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    finally:
        dist.destroy_process_group()


def is_first(mesh: DeviceMesh | None) -> bool:
    """Tell whether this process prints and writes."""
    return mesh is None or mesh.get_local_rank() == 0


def of_the_first(
    mesh: DeviceMesh | None, train: Callable[[], tuple[_First, _Second]], first: type[_First], second: type[_Second]
) -> tuple[_First, _Second]:
    """Return two models that the first process trains, with the same parameters in all."""
    models = train() if is_first(mesh) else (first().eval(), second().eval())
    if mesh is not None:
        for model in models:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
    return models
