"""Keep what a loop over a scheduler's steps goes on from: samples, the history, and what its last step was like."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..solvers import StepTable
from ..step.call import Facts
from ..step.history import History
from ..step.memory import in_layout_of
from ..step.repeat import kinds_of, token_of
from .dtypes import Dtypes
from .host_tables import HostTables
from .loop_tables import LoopTable
from .timesteps import version_of
from .written_tables import state_of

GOES_ON = "a loop that goes on from diffusers' own steps"
"""Why one is left to diffusers."""
LITTLE = 2**20
"""Bytes of a sample up to which a new object for x_0 costs more than to keep its inputs during a model's call."""


@dataclass(slots=True)
class Like:
    """What a loop's last step and those like it have in common, but their tensors: see ``step_again``."""

    scale: Any
    """A number, the weights of several predictions, or ``None``."""
    guidance: Guidance | None
    guidance_token: Any
    table: StepTable
    """The loop's, or the one that scales the model's inputs as well."""
    token: object
    counted_as: str
    """In ``Acceleration.counts``."""
    dtypes: Dtypes
    dtype: torch.dtype
    """The model's output's. This and those below are of ``dtypes``, whose attributes take longer to read."""
    dtype_of_original: torch.dtype
    is_rounded: bool
    begins: bool
    """Whether a loop may begin with such a step: where the sample that is kept is the one that is returned."""

    @classmethod
    def of(cls, scale: Any, guidance: Guidance | None, table: StepTable, counted_as: str, dtypes: Dtypes) -> Like:
        """Return what steps with this table and guidance have in common."""
        return cls(
            scale=scale,
            guidance=guidance,
            guidance_token=token_of(guidance),
            table=table,
            token=table._token,
            counted_as=counted_as,
            dtypes=dtypes,
            dtype=dtypes.model,
            dtype_of_original=dtypes.original,
            is_rounded=dtypes.is_rounded,
            begins=dtypes.model == dtypes.result and not dtypes.is_rounded,
        )


class CopiedLoop(NamedTuple):
    """What a loop goes on from, for the copy of a scheduler: plain data and tensors of its own."""

    begin: int
    following: int
    arguments: tuple[Any, ...]
    shape: torch.Size
    entries: Tensor
    """The history's."""
    last: Tensor | None
    """What the last step wrote."""

    def fits(self, index: int, arguments: tuple[Any, ...], sample: Tensor) -> bool:
        """Tell whether a step goes on from it."""
        same = self.following == index and self.arguments == arguments and self.shape == sample.shape
        return same and self.entries.device == sample.device


def form_of(sample: Tensor) -> tuple[Any, ...]:
    """Return what a loop's memory depends on, of its first sample."""
    return sample.shape, sample.stride(), sample.dtype, sample.device


@dataclass(slots=True)
class CountedLoop:
    """A loop over a scheduler's steps, from its first on."""

    tables: HostTables
    begin: int
    arguments: tuple[Any, ...]
    """Of ``step``, those that rows depend on."""
    attributes: list[Any]
    """The scheduler's, on which they depend as well."""
    sample_form: tuple[Any, ...]
    """See ``form_of``."""
    made: LoopTable
    table: StepTable | None
    """``None``: the loop is left to diffusers."""
    history: History | None = None
    following: int = 0
    """The step that comes next."""
    returned: Tensor | None = None
    """What the last step returned."""
    version: int = 0
    """How often it had been written to."""
    state: Tensor | None = None
    """The same in float32, where ``returned`` is rounded, or kept for a next call that goes back to it."""
    spare: Tensor | None = None
    """A tensor that nobody else has, for a next ``state``."""
    staged: Tensor | None = None
    """The model's input of ``returned``, where the step has written it."""
    original: Any = None
    """The lazy x_0 that the last step has returned in a tuple: torch spends as long on a new one as on its elements."""
    like_of_original: Like | None = None
    """What steps are like whose x_0 it may be."""
    like: Like | None = None
    facts: Facts | None = None
    """What makes a further step like the last one in all but its tensors; ``None``: a step needs more than that."""
    is_plain: bool = False
    """Whether ``facts`` are all, as a step goes on from its sample alone and returns nothing besides the next one."""
    is_over: bool = False
    is_small: bool = False
    """Whether a new tensor like its sample is just what ``torch.empty_like`` returns."""
    is_little: bool = False
    """Whether an x_0 that nobody reads may keep what it is computed from until the next step."""
    levels_in: str = "sigmas"
    """The scheduler's name of the table that says where the steps lie."""
    further_in: tuple[str, ...] = ()
    """Its names of further tables."""
    refuses_integers: bool = False
    """Whether diffusers refuses timesteps that are whole numbers."""
    kept_history: History | None = None
    """That of a loop that is over, for one like it; diffusers' schedulers keep their model outputs as well."""
    sigmas: Tensor = field(init=False)
    timesteps: Tensor = field(init=False)
    further: tuple[Tensor, ...] = field(init=False)
    config: Any = field(init=False)
    versions: tuple[Any, ...] = field(init=False)
    """These are of ``tables``, whose attributes take longer to read."""
    calls: int = field(init=False)
    """Of the table."""

    def __post_init__(self) -> None:
        self.go_by(self.tables)
        self.calls = 0 if self.table is None else len(self.table)

    def go_by(self, tables: HostTables) -> None:
        """Go by a scheduler's tables, which say the same as those before."""
        self.tables, self.sigmas, self.timesteps = tables, tables.sigmas, tables.timesteps
        self.config, self.versions, self.further = tables.config, tables.versions, tables.further
        self.facts, self.is_plain = None, False

    @property
    def shape(self) -> torch.Size:
        """The sample's."""
        shape: torch.Size = self.sample_form[0]
        return shape

    def scales_like(self, tables: HostTables, index: int) -> bool:
        """Tell whether a loop over a scheduler's tables from a step on has the sigmas of this one."""
        return self.begin == index and self.tables.says_the_same_as(tables)

    def is_like(
        self,
        tables: HostTables,
        index: int,
        arguments: tuple[Any, ...],
        attributes: list[Any],
        sample: Tensor,
        dtype: torch.dtype,
    ) -> bool:
        """Tell whether a loop that begins at a step would be this one, which is over, but for what it wrote."""
        history = self.kept_history
        return (
            self.scales_like(tables, index)
            and (history is None or history.dtype == dtype)
            and self.arguments == arguments
            and self.sample_form == form_of(sample)
            and self.made.is_of(tables.config, tuple(attributes))
        )

    def begin_again(self, tables: HostTables, attributes: list[Any]) -> None:
        """Begin the loop anew, over tables that say the same: in the memory that its history has."""
        if tables is not self.tables:
            self.go_by(tables)
        self.attributes, self.following, self.is_over = attributes, self.begin, False
        self.history, self.kept_history = self.kept_history, None
        if self.history is not None:
            self.history.restart()

    def may_begin_like_an_earlier_one(self, sample: Tensor) -> bool:
        """Tell whether its first step may be like a step of an earlier loop over the same table; prepare for that."""
        like: Like | None = self.made.like
        if self.returned is not None or like is None or sample.is_inference():
            return False
        if not like.begins or like.dtype != sample.dtype:
            return False  # a state that is kept besides the sample begins with a plan
        self.go_on_like(like)
        self.returned, self.version = sample, sample._version
        return True

    def go_on_like(self, like: Like | None) -> None:
        """Let the next step be like one that was made; ``None``: it is planned."""
        if like is not None and like is self.like and self.facts is not None:
            return
        self.like = like
        self.facts, self.is_plain = None, False
        if like is None or like.is_rounded or any(self.made.churned):
            return
        if like.table is (self.made.staging or self.table):
            tensors = self.sigmas, self.timesteps, *self.further
            names = self.levels_in, "timesteps", *self.further_in, "_internal_dict"
            alone = self.history is None and self.made.second is None and not any(self.made.keeps)
            self.is_plain = alone and self.made.staging is None and not self.attributes
            self.facts = Facts(
                kinds_of, like.token, like.guidance_token, like.scale, self.arguments,
                None if self.is_plain else like.dtype, names, (*tensors, self.config), tensors, self.versions,
            )  # fmt: skip

    def stage(self) -> None:
        """Let steps write the model's next input as well, from one on that is planned."""
        self.made.stage()
        self.facts, self.is_plain = None, False

    def is_untouched(self) -> bool:
        """Tell whether torch counts who writes to what the last step returned, and nobody has since."""
        return self.returned is not None and version_of(self.returned) == self.version

    def needs_whole_samples(self) -> bool:
        """Tell whether no part of a sample can be one to the kernel: histories and quantiles are of whole ones."""
        return self.history is not None or (self.table is not None and self.table.thresholds)

    def is_next(self, index: int | None) -> bool:
        """Tell whether a step is the next one of those that are left."""
        return self.following == index and not self.is_over

    def is_under_way(self, index: int) -> bool:
        """Tell whether a step is one after its first, and some have been made."""
        return not self.is_over and self.begin < min(index, self.following)

    def goes_on_from_theirs(self) -> bool:
        """Tell whether what is left needs the history of steps that diffusers has made; its last may need none."""
        whole = self.made.table
        return self.table is None and (whole is None or whole.history_slots > 0)

    def is_current(self, scheduler: Any) -> bool:
        """Tell whether the scheduler's tables and configuration are those that the loop began with."""
        return self.has_tables_of(scheduler.__dict__) and (
            not self.attributes or all(map(is_, self.attributes, scheduler._attributes()))
        )

    def has_tables_of(self, own: dict[str, Any]) -> bool:
        """Tell the same of diffusers' tables and the configuration, of a scheduler's ``__dict__``."""
        sigmas, timesteps = self.sigmas, self.timesteps
        if own[self.levels_in] is not sigmas or own["timesteps"] is not timesteps:
            return False
        if own["_internal_dict"] is not self.config:
            return False
        try:
            versions: Any = sigmas._version, timesteps._version
        except RuntimeError:  # inference tensors, which count nothing
            versions = state_of(sigmas), state_of(timesteps)
        if self.further:
            if not all(own[name] is each for name, each in zip(self.further_in, self.further, strict=True)):
                return False
            versions = (*versions, *map(state_of, self.further))
        same: bool = versions == self.versions
        return same

    def inputs(self, sample: Tensor, dtypes: Dtypes) -> tuple[Tensor, Tensor | None]:
        """Return what a step computes from, and what the last one wrote, if that is something else."""
        given, anchor, returned, state = sample, None, self.returned, self.state
        if returned is not None:
            untouched = self.version == version_of(returned)
            if sample is returned and untouched:
                given = sample if state is None or state.dtype == sample.dtype else state
            elif self.history is not None and (untouched or state is not None):
                anchor = returned if state is None else state  # solvers that go back find what they wrote
        if torch.float64 in (dtypes.result, given.dtype):
            given = given.to(dtypes.working)
        if anchor is not None and anchor.dtype != given.dtype:
            given, anchor = given.to(dtypes.working), anchor.to(dtypes.working)
        return given, anchor

    def private(self, given: Tensor, anchor: Tensor | None = None) -> Tensor | None:
        """Return a tensor like a step's sample that nobody else has, to be written; ``None``: there is none yet."""
        found = self.spare if self.state is None else self.state
        if found is None or found is anchor or found.dtype != given.dtype or found.stride() != given.stride():
            return None
        return found

    def note(self, call: int, result: Tensor, returned: Tensor | None, staged: Tensor | None) -> Tensor:
        """Note a step that was made; return what the scheduler returns.

        Args:
            call: of the table.
            result: what the kernel wrote.
            returned: the same for others, if that is another tensor.
            staged: the model's next input.
        """
        self.following = self.begin + call + 1
        if self.table is not None and call + 1 == self.calls:
            self.end()
            return result if returned is None else returned
        if self.state is not None:
            self.spare = self.state
        self.state = None if returned is None else result
        self.returned = answer = result if returned is None else returned
        self.version, self.staged = version_of(answer) or 0, staged
        return answer

    def end(self) -> None:
        """Let go of what nothing goes on from after the last step."""
        self.is_over, self.kept_history = True, self.history
        self.returned = self.state = self.spare = self.staged = self.history = None
        self.original = self.like_of_original = None

    def copied(self) -> CopiedLoop | None:
        """Return what a copy goes on from; ``None``: a copy begins its own loop."""
        if self.history is None or self.returned is None:
            return None
        last = self.state
        if last is None and self.version == version_of(self.returned):
            last = self.returned
        last = None if last is None else last.detach().clone()
        entries = self.history.entries.clone()
        return CopiedLoop(self.begin, self.following, self.arguments, self.shape, entries, last)

    def handed_over(self) -> str:
        """Say why a copy leaves the rest to diffusers, whose own steps the loop has begun with; empty: it does not."""
        began = self.table is None and self.begin < self.following and not self.is_over
        return self.made.why_not or GOES_ON if began else ""

    def go_on_from(self, copied: CopiedLoop) -> None:
        """Go on from what another loop was copied at."""
        assert self.history is not None
        self.history.entries.copy_(copied.entries)
        self.history.note(copied.following - self.begin - 1)
        self.following, last = copied.following, copied.last
        if last is not None:  # its sample may have another layout now
            self.returned = in_layout_of(self.history.entries[: len(last)], last)
            self.version = version_of(self.returned) or 0
