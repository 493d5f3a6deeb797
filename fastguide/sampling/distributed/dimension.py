"""The ranks along one dimension of a mesh: what each of them takes, and their all-gathers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.device_mesh import DeviceMesh

_T = TypeVar("_T")


def part(count: int, parts: int, index: int) -> range:
    """Return which of so many things one of the parts has: as many as the others, or one more among the first.

    >>> [part(5, 3, index) for index in range(3)]
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    each, more = divmod(count, parts)
    begin = index * each + min(index, more)
    return range(begin, begin + each + (index < more))


class Dimension:
    """The ranks along one dimension of a mesh, this one among them; compared by identity."""

    def __init__(self, mesh: DeviceMesh, name: str) -> None:
        """Read the dimension of a mesh, which has this rank; without one of that name, this rank is alone."""
        self.name = name
        self.rank, self.group = 0, None
        self.ranks: tuple[int, ...] = (mesh.get_rank(),)
        if name in (mesh.mesh_dim_names or ()):
            self.group = mesh.get_group(name)
            self.rank, self.ranks = mesh.get_local_rank(name), tuple(dist.get_process_group_ranks(self.group))
        self.size = len(self.ranks)
        self._raised: Exception | None = None

    def part_of(self, count: int, rank: int | None = None) -> range:
        """Return which of so many things a rank of this dimension has, by default this one."""
        return part(count, self.size, self.rank if rank is None else rank)

    def begin_all_gather(self, out: Tensor, mine: Tensor, what: str) -> Work:
        """Begin to write what each rank has, one after the other, to ``out``; both are dense, of one dimension.

        Args:
            out, mine: as said.
            what: this is, for the message where a rank is missing.
        """
        # torch 2.13 calls it so, and warns of the older name.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        try:
            work: Work = gather(out, mine, group=self._there, async_op=True)
        except RuntimeError as error:
            raise self._refusal(error, what) from error
        return work

    def end(self, work: Work, what: str) -> None:
        """Wait for an all-gather; on a GPU, the stream waits and the host does not."""
        try:
            work.wait()
        except RuntimeError as error:
            raise self._refusal(error, what) from error

    def all_gather(self, mine: Tensor, what: str) -> Tensor:
        """Return what each rank has, one after the other along the first dimension."""
        if self.size == 1:
            return mine
        mine = mine.contiguous()
        out = mine.new_empty(self.size * mine.shape[0], *mine.shape[1:])
        if out.numel():
            self.end(self.begin_all_gather(out.view(-1), mine.view(-1), what), what)
        return out

    def all_gather_objects(self, mine: _T) -> list[_T]:
        """Return the objects of all ranks; for messages, as it waits for the device."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self._there)
        except RuntimeError as error:
            raise self._refusal(error, "what each has, for a message") from error
        return found

    @contextmanager
    def none_waiting(self) -> Iterator[None]:
        """Mark a block at which no rank of this dimension waits for another, whether it raises an exception or not."""
        try:
            yield
        except Exception as error:
            self._raised = error
            raise

    def left_none_waiting(self, error: Exception) -> bool:
        """Return whether an exception comes from such a block, or this rank is alone; asked once, to keep no errors."""
        raised, self._raised = self._raised, None
        return self.size == 1 or raised is error

    @property
    def _there(self) -> ProcessGroup | None:
        check_initialized()
        return self.group

    def _refusal(self, error: RuntimeError, what: str) -> RuntimeError:
        return RuntimeError(
            f"mesh: expected all ranks of dimension {self.name!r}, {list(self.ranks)}, to take part, but one of them "
            f"has ended, has failed, or did not come within the timeout of the process group; this rank, "
            f"{self.ranks[self.rank]}, waited for {what}: {error}"
        )

    def __repr__(self) -> str:
        return f"Dimension({self.name}, rank {self.rank} of {self.size})"


def check_initialized() -> None:
    """Refuse to go on without a process group.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialized, or no more.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "mesh: expected torch.distributed to be initialized, got no process group; call "
            "torch.distributed.init_process_group(), or init_device_mesh(), which does so, in processes that torchrun "
            "has started"
        )


def device_of(kind: str) -> torch.device:
    """Return the device on which ranks of a mesh of this kind exchange numbers: for GPUs, the current one."""
    return torch.empty(0, device=kind).device
