"""A mesh of ranks, as a sampler uses it: each rank's share of a request, what they agree on, and all results again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..cached_states import Cached
from ..request import SampleRequest
from ..trajectory import Trajectory
from .agreement import FACTS, difference, facts
from .dimension import Dimension, check_initialized, device_of, part

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("data", "guidance")
"""The names of a mesh's dimensions, in any order; one that it has not is of one rank."""


def samples_of_rank(batch: int, mesh: DeviceMesh) -> slice:
    """Return which samples of a batch this rank makes: as many as the others, or one more on the first ranks.

    Args:
        batch: number of samples of the whole request.
        mesh: as in ``Sampler``. Ranks along its dimension "guidance" make the same samples.

    Raises:
        TypeError, ValueError: the mesh is none, has other dimensions, or has not this rank.
        RuntimeError: ``torch.distributed`` is not initialized.

    >>> import tempfile
    >>> import torch.distributed as dist
    >>> from torch.distributed.device_mesh import init_device_mesh
    >>> folder = tempfile.TemporaryDirectory()
    >>> dist.init_process_group("gloo", init_method=f"file://{folder.name}/store", rank=0, world_size=1)
    >>> samples_of_rank(5, init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "guidance")))
    slice(0, 5, None)
    >>> dist.destroy_process_group()
    """
    return Ranks(mesh).samples(batch)


class RankRun(NamedTuple):
    """What a rank does in a run; all but the last before ranks agree, so that each hears of another's exception."""

    make: Callable[[], SampleRequest]
    """Makes the whole request."""
    is_cached: Callable[[SampleRequest], bool]
    """Tells whether the buffers for a share are there."""
    borrow: Callable[[SampleRequest], AbstractContextManager[Cached]]
    """Lends the buffers for a share that has samples, which are made if they are not there."""
    sample: Callable[[SampleRequest, Cached], Trajectory]
    """Samples such a share."""


class _Agreed(NamedTuple):
    """What ranks have agreed on."""

    whole: SampleRequest
    share: SampleRequest
    cached: Cached | None
    """The buffers; ``None``: this rank has no samples."""
    borrowed: ExitStack
    """Gives them back."""


class Ranks:
    """The ranks of a mesh."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """Read a mesh, and refuse one that is not as ``Sampler`` describes it."""
        check_initialized()
        from torch.distributed.device_mesh import DeviceMesh

        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
        names = mesh.mesh_dim_names
        if names is None or not set(names) <= set(DIMENSIONS):
            raise ValueError(
                f"mesh: expected dimensions named {' and '.join(map(repr, DIMENSIONS))}, or one of them, got {names}; "
                "mesh['data', 'guidance'] is that part of a larger mesh"
            )
        if mesh.get_coordinate() is None:
            raise ValueError(f"mesh: expected one that has this rank, {mesh.get_rank()}, got {mesh.mesh.tolist()}")
        self.mesh = mesh
        self.data, self.guidance = (Dimension(mesh, name) for name in DIMENSIONS)

    @property
    def first(self) -> bool:
        """Whether this rank has the first samples and the first prediction."""
        return self.data.rank == self.guidance.rank == 0

    def samples(self, batch: int) -> slice:
        """Return which samples of a batch this rank makes."""
        own = self.data.part_of(batch)
        return slice(own.start, own.stop)

    def sampled(
        self,
        run: RankRun,
        settings: str,
        recorded: tuple[bool, bool],
        gather: bool,
    ) -> Trajectory:
        """Make a request on every rank, sample this rank's share of it, and gather what all ranks made.

        Args:
            run: what this rank does.
            settings: the sampler's settings as text.
            recorded: whether samples and originals of every step are asked for.
            gather: whether to return the results of all ranks.
        """
        check_initialized()
        agreed = self._agreed(run, settings)
        whole, share, cached = agreed.whole, agreed.share, agreed.cached
        result, raised = None, None
        try:
            with agreed.borrowed:
                result = _nothing(share, *recorded) if cached is None else run.sample(share, cached)
        except Exception as error:
            # A model that fails later leaves the other ranks of its predictions waiting; then there is nobody to tell.
            if not self.guidance.left_none_waiting(error) or not gather:
                raise
            raised = error
        if not gather or self.data.size == 1:
            if raised is not None:
                raise raised
            assert result is not None
            return result
        self._raise_one(raised, self._all_numbers([int(raised is not None)], "whether each has its samples"))
        assert result is not None
        batch = whole.x_T.shape[0]
        whole_sample = _in_strides_of(whole.x_T, self._of_all(result.sample, batch, 0))
        samples, originals = (
            None if values is None else self._of_all(values, batch, 1) for values in (result.samples, result.originals)
        )
        return Trajectory(whole_sample, samples, originals)

    # ---- Before the run ----

    def _agreed(self, run: RankRun, settings: str) -> _Agreed:
        """Return what this rank samples; refuse it on every rank if ranks differ, or if one of them cannot."""
        raised: Exception | None = None
        found, cached = [], None
        with ExitStack() as borrowed:  # given back if ranks do not agree
            try:
                whole = run.make()
                self._check(whole)
                share = whole.of_samples(self.samples(whole.x_T.shape[0]))
                is_cached = run.is_cached(share)
                cached = borrowed.enter_context(run.borrow(share)) if share.x_T.numel() else None
                found = facts(whole, share, settings, is_cached, self.guidance.size == 1)
            except Exception as error:
                raised = error
            if self.data.size * self.guidance.size > 1:
                hashes = [fact.hashed for fact in found] or [0] * FACTS
                numbers = self._all_numbers([int(raised is not None), *hashes], "the request of each, to be compared")
                self._raise_one(raised, numbers)
                number = difference([[own[1:] for own in ranks] for ranks in numbers], [f.everywhere for f in found])
                if number is not None:
                    name, text, *_ = found[number]
                    told = self._told(text, alike=", and one with other numbers on another rank")
                    raise ValueError(f"{name}: expected the same on all ranks, got {told}")
            elif raised is not None:
                raise raised
            return _Agreed(whole, share, cached, borrowed.pop_all())

    def _check(self, whole: SampleRequest) -> None:
        """Refuse what ranks cannot share."""
        count, of = whole.guidance.num_conditions, self.guidance.size
        if of > count:
            raise ValueError(
                f"mesh: expected at most {count} rank(s) in its dimension 'guidance', one for each prediction of the "
                f"guidance, got {of}"
            )
        device = whole.x_T.device
        if device.type != self.mesh.device_type:
            raise ValueError(f"x_T: expected it on {self.mesh.device_type}, the mesh's devices, got {device}")
        if self.data.size > 1 and not whole.noise.per_sample:
            raise ValueError(
                "seeds: expected one for each sample, as the table adds noise and ranks would draw the same for "
                "different samples, got none, or one generator; a sequence of generators, one for each sample, is "
                "taken too"
            )

    def _raise_one(self, raised: Exception | None, numbers: list[list[list[int]]]) -> None:
        """Raise this rank's exception, or tell of another rank's, whose first number is not 0."""
        if any(own[0] for ranks in numbers for own in ranks):
            told = self._told("" if raised is None else f"{type(raised).__name__}: {raised}")
            raise raised or RuntimeError(f"mesh: expected no exception on any rank, got {told}")

    def _told(self, text: str, alike: str = "") -> str:
        """Return the texts of all ranks for a message, each once, with the first rank that has it.

        ``alike``: what is said besides where all ranks have the same text.
        """
        texts = [(self.mesh.get_rank(), text)]
        for dimension in (self.guidance, self.data):
            texts = [each for of_rank in dimension.all_gather_objects(texts) for each in of_rank]
        ranks: dict[str, int] = {}
        for rank, each in sorted(texts):
            ranks.setdefault(each, rank)
        told = " and ".join(f"{each} on rank {rank}" for each, rank in ranks.items() if each)
        return told + alike if len(ranks) == 1 else told

    def _all_numbers(self, mine: list[int], what: str) -> list[list[list[int]]]:
        """Return the numbers of all ranks by their coordinates, on the host; a message says what they are."""
        numbers = torch.tensor([mine], dtype=torch.int64, device=device_of(self.mesh.device_type))
        for dimension in (self.guidance, self.data):
            numbers = dimension.all_gather(numbers, what)
        found: list[list[list[int]]] = numbers.view(self.data.size, self.guidance.size, len(mine)).tolist()
        return found

    # ---- After the run ----

    def _of_all(self, share: Tensor, batch: int, dim: int) -> Tensor:
        """Return the samples of all ranks in order, along a dimension."""
        mine = share.movedim(dim, 0)
        most = len(part(batch, self.data.size, 0))
        if len(mine) < most:
            mine = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        gathered = self.data.all_gather(mine, "the samples of each").unflatten(0, (self.data.size, most))
        parts = [gathered[rank, : len(self.data.part_of(batch, rank))] for rank in range(self.data.size)]
        return torch.cat(parts).movedim(0, dim).contiguous()


def _nothing(share: SampleRequest, samples: bool, originals: bool) -> Trajectory:
    """Return the results of a rank that has no samples."""
    x, calls = share.x_T, len(share.calls)
    return Trajectory(
        x.clone(),
        x.new_empty(calls + 1, *x.shape) if samples else None,
        x.new_empty(calls, *x.shape) if originals else None,
    )


def _in_strides_of(x_T: Tensor, whole: Tensor) -> Tensor:
    """Return all samples, each in the layout that those of x_T have."""
    strides = (whole[:1].numel(), *x_T.stride()[1:])
    if whole.stride()[1:] == strides[1:]:
        return whole
    return whole.new_empty_strided(whole.shape, strides).copy_(whole)
