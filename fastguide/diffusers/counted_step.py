"""Make a step of a scheduler that counts its steps: the count is the row, and the loop keeps what goes on.

Such a scheduler's tables are those that diffusers' ``set_timesteps`` has made, quirks included, and a loop's rows
depend on where it begins. Where diffusers rounds the sample to the model's dtype between two steps, the loop keeps it
in float32 as well, and goes on from that as long as it is handed back the tensor that it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..solvers import StepTable
from ..step.history import History
from ..step.memory import dense, in_layout_of, needs_no_advice
from .counted_again import plain_step_again, step_again
from .counted_anew import begun_anew, end_beginning, ended_loop_again, warn_of_unscaled_inputs
from .counted_loop import GOES_ON, LITTLE, CopiedLoop, CountedLoop, Like, form_of
from .counted_run import run_counted
from .drawing import Drawing
from .dtypes import Dtypes, promoted
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, combined, guidance_of, is_by_value
from .host_tables import HostTables, first_step_at, host_tables, read_tables
from .lazy_guidance import resolved
from .lazy_outputs import LazyOriginal
from .lazy_tensor import plain
from .loop_tables import LoopTable, loop_table
from .scheduler_step import LEFT, SchedulerStep, count, count_fused, counted_as
from .taken import Output, PerFrame
from .timesteps import place_of, value_of
from .written_tables import state_of

_UNCOPIED = ("_counted", "_ended", "_kept_tables", "_given")
_FLOAT32 = torch.float32


class CountedStep(SchedulerStep):
    """Mix this into a scheduler of diffusers that has ``sigmas`` and counts its steps in ``_step_index``.

    A class also has ``set_timesteps = on_host(...)``, ``_loop_table``, and ``step``, which calls ``counted_step``.
    """

    _loop_table: Callable[..., StepTable]
    """The method that makes the table from a step on: of ``HostTables``, the step, and the arguments that rows depend
    on."""
    _why_not: Callable[[], str | None]
    """The method that says why rows cannot express the configuration."""
    _output: Any = None
    """The lazy type of what ``step`` returns, with its x_0; ``None``: there is none in it."""
    _plain_output: Any = None
    """diffusers' type, without an x_0."""
    _state: tuple[str, ...] = ()
    """The names of the attributes that rows depend on besides the configuration and diffusers' tables."""
    _levels_in: ClassVar[str] = "sigmas"
    """The name of the table that says where the steps lie."""
    _further_tables: ClassVar[tuple[str, ...]] = ()
    """The names of more tables of diffusers' that rows are read from."""
    _sigmas_on_device: ClassVar[bool] = False
    """Whether diffusers leaves ``sigmas`` on the device of the timesteps."""
    _sigmas_fall: ClassVar[bool] = True
    """Whether rows need sigmas that fall, or rise, at every step; those of two calls a step are there twice."""
    _steps_before_set_timesteps = False
    _returns_original: ClassVar[bool] = True
    """Whether the second tensor that diffusers returns is the predicted x_0, and not what ``_second_columns`` say."""
    _not_in_tables: ClassVar[str | None] = None
    """What a loop has that a table alone does not say; ``None``: nothing."""
    _history_is_given: ClassVar[bool] = False
    """Whether diffusers' own step goes on from what it is given, so that it can take over in the middle of a loop."""
    _ignores_thresholding: bool = False
    """Whether diffusers' own step has no dynamic thresholding, whatever its configuration says."""
    _refuses_integers: ClassVar[bool] = False
    """Whether diffusers refuses timesteps that are whole numbers."""
    _default_arguments: ClassVar[tuple[Any, ...]] = ()
    """Of ``step``, those that rows depend on, by default."""
    float32_state: bool = True
    """Whether a loop keeps its sample in float32 where diffusers rounds it."""

    _internal_dict: Any
    """diffusers' ``config``, without the time that this takes."""
    _host: HostTables | None = None
    _counted: CountedLoop | None = None
    _ended: CountedLoop | None = None
    """The last loop that came to its end, which a next one may be like."""
    _handed_over: str = ""
    """Why diffusers goes on with the loop, see ``handed_over``; empty: it does not."""
    _copied_loop: CopiedLoop | None = None
    """Of the scheduler that this one is a copy of, if it was copied in the middle of a loop."""
    sigmas: Tensor
    _step_index: int | None
    _begin_index: int | None

    def __getstate__(self) -> dict[str, Any]:
        """Give copies what a loop goes on from, and not the tables, which only save time."""
        kept = {name: value for name, value in super().__getstate__().items() if name not in _UNCOPIED}
        if self._counted is not None:
            kept["_copied_loop"], kept["_handed_over"] = self._counted.copied(), self._counted.handed_over()
        return kept

    def _dtypes(self, sample: torch.dtype, model: torch.dtype) -> Dtypes:
        """Return the dtypes of a step, by those of the sample and of the model's output."""
        return promoted(sample, model)

    def _attributes(self) -> list[Any]:
        """Return what a loop's rows depend on besides the configuration and diffusers' tables."""
        return [getattr(self, name) for name in self._state]

    def _is_at(self, timestep: Any) -> bool:
        """Tell whether a step begins at the counter's timestep, as far as the host knows."""
        told = host_tables(self).timestep_values
        index = self._begin_index if self._step_index is None else self._step_index
        if type(timestep) is Tensor and timestep.is_cpu and timestep.numel() == 1:
            value = timestep.item()
            return value in told if index is None else index < len(told) and value == told[index]
        place = place_of(self.timesteps, told, timestep)
        if index is None:
            return place is not None
        return place is not None and index < len(told) and told[place] == told[index]

    def _second_columns(self, tables: HostTables, begin: int, *arguments: Any) -> Mapping[str, Tensor] | None:
        """Return the columns that lead to the second tensor that diffusers returns; ``None``: it is x_0."""
        return None

    def _why_not_from(self, begin: int) -> str | None:
        """Say why rows cannot express a loop that begins at a step, in this configuration; ``None``: they can."""
        return None

    def _in_scales(self, table: StepTable) -> list[float]:
        """Return what diffusers scales the model's inputs by, in its own rounding; of schedulers that do."""
        return []

    def _tables_are_set(self, device: str | torch.device | None) -> None:
        """Move the tables, which diffusers has made on the host; remember their values there."""
        host = read_tables(self)
        if device is not None and device != self.timesteps.device:
            self.timesteps = self.timesteps.to(device)
            if self._sigmas_on_device:
                self.sigmas = self.sigmas.to(device)
            host.sigmas, host.timesteps = getattr(self, self._levels_in), self.timesteps
            host.versions = state_of(host.sigmas), state_of(host.timesteps), *map(state_of, host.further)
        before = self._host
        if before is not None and before.has_timesteps_of(host):
            host.first_steps = before.first_steps
        self._host = host
        self._counted = self._copied_loop = None
        self._handed_over = ""
        if self._fusion is not None:
            self._fusion.begin()

    def _result(
        self, result: Tensor, original: Callable[[], Tensor] | Tensor | None, dtype: torch.dtype, return_dict: bool
    ) -> Any:
        """Return what diffusers' ``step`` returns; ``dtype``: of the x_0."""
        if self._output is None:
            return self._plain_output(prev_sample=result) if return_dict else (result,)
        if isinstance(original, Tensor):
            if return_dict:
                return self._output.plain(result, original)
            return result, original
        assert original is not None
        return self._output(result, original) if return_dict else (result, LazyOriginal.of(result, original, dtype))

    def _init_step_index(self, timestep: Any) -> None:
        """Find the first step as diffusers does, on the host where it can be known there."""
        if self._begin_index is not None:
            self._step_index = self._begin_index
            return
        host = host_tables(self)
        value = value_of(self.timesteps, host.timestep_values, timestep)
        if value is not None and (value in host.first_steps or value in host.timestep_values):
            self._step_index = first_step_at(self, host, value)
            return
        told = host.host_timesteps
        if not isinstance(timestep, Tensor):
            timestep = torch.as_tensor(timestep, dtype=told.dtype if isinstance(timestep, float) else None)
        self._step_index = self.index_for_timestep(timestep.to("cpu"), told)  # type: ignore[attr-defined]


def counted_step(
    scheduler: CountedStep,
    arguments: tuple[Any, ...],
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    return_dict: bool,
    guidance_scale: Scale | None,
    drawing: Drawing | None = None,
) -> Any:
    """Make a scheduler's step; ``None``: it is left to diffusers' own ``step``.

    Args:
        scheduler: whose step it is.
        arguments: of ``step``, those that rows depend on.
        model_output, timestep, sample, return_dict, guidance_scale: of ``step``.
        drawing: where its noise comes from.

    Raises:
        RuntimeError: the step does not follow the last one, in a loop that goes on from earlier ones.
        IndexError: the loop is over.
    """
    if is_dynamo_compiling():
        return None
    own = scheduler.__dict__
    loop: CountedLoop | None = own.get("_counted")
    refuses = scheduler._refuses_integers if loop is None else loop.refuses_integers
    if refuses and (type(timestep) is not Tensor or timestep.dtype is not _FLOAT32) and is_integer(timestep):
        return None
    if loop is None and scheduler._handed_over:
        count(scheduler, LEFT + scheduler._handed_over)
        return None
    again = begun_anew(scheduler, own, timestep, sample) if loop is None else loop
    if again is not None and again.like is not None:
        make = plain_step_again if again.is_plain else step_again
        done = make(scheduler, own, again, arguments, model_output, sample, return_dict, guidance_scale, drawing)
        if loop is None:
            end_beginning(scheduler, own, again, begun=done is not None)
        if done is not None:
            return done
    output: Output = model_output
    scale = guidance_scale
    if type(model_output) is not Tensor or type(sample) is not Tensor:
        output, scale = resolved(model_output, sample, scale, per_frame=True)
        sample = plain(sample)
    if own.get("num_inference_steps") is None and not scheduler._steps_before_set_timesteps:
        return None  # diffusers says what is missing
    index = index_of(scheduler, timestep)
    _check_is_not_over(loop, index)
    if index >= scheduler.timesteps.numel():
        return None  # diffusers says that there are none
    dtypes = scheduler._dtypes(sample.dtype, output.dtype)
    loop = loop_at(scheduler, index, arguments, sample, dtypes.working)
    if loop.table is not None and index - loop.begin >= len(loop.table):
        return None
    if loop.may_begin_like_an_earlier_one(sample):
        done = step_again(scheduler, own, loop, arguments, output, sample, return_dict, scale, drawing)
        if done is not None:
            return done
        loop.returned = None
        loop.go_on_like(None)
    if type(scale) is PerFrame and (loop.needs_whole_samples() or not sample.is_contiguous()):
        output, scale = plain(model_output, "the step, which does not take it apart"), None
    return _planned_step(scheduler, loop, output, sample, return_dict, scale, drawing, dtypes)


def _check_is_not_over(loop: CountedLoop | None, index: int) -> None:
    if loop is not None and loop.is_over and index >= loop.following:
        raise IndexError(
            f"step: expected no more than the {loop.following - loop.begin} of this loop, got another one; "
            "set_timesteps begins another loop"
        )


def index_of(scheduler: CountedStep, timestep: Any) -> int:
    """Return which step comes next; a loop that goes on from earlier ones ends where the counter is set back."""
    index = scheduler._step_index
    if index is None:
        scheduler._init_step_index(timestep)
        index, loop = scheduler._step_index, scheduler._counted
        if loop is not None and loop.following != index:
            scheduler._counted = None
    assert index is not None
    return index


def _planned_step(
    scheduler: CountedStep,
    loop: CountedLoop,
    output: Output,
    sample: Tensor,
    return_dict: bool,
    scale: Any,
    drawing: Drawing | None,
    dtypes: Dtypes,
) -> Any:
    """Make a step that is checked first; ``None``: it is left to diffusers' own ``step``."""
    index, lead = scheduler._step_index, 1
    assert index is not None
    if type(scale) is PerFrame:
        lead, scale = scale.lead, scale.scale
    noise = None if drawing is None else plain(drawing.noise)
    guidance = guidance_of(output, sample, scale, None, 1.0, "epsilon")
    refusal = refusal_of(sample, output, None, noise)
    fitted = None
    if refusal is None and loop.table is not None:
        history = loop.history
        sample = dense(sample) if history is None else in_layout_of(history.entries[: len(sample)], sample)
        fitted = fitted_predictions(output, sample, guidance, False)
        refusal = SHAPES if fitted is None else None
    if loop.table is None or refusal is not None or fitted is None:
        leave(scheduler, loop, index, refusal)
        return None
    call = index - loop.begin
    drawn: tuple[Any, Any] = (None, None)
    if drawing is not None:
        drawn = drawing.drawn(loop.table, call, sample, loop.inputs(sample, dtypes)[0].dtype, dtypes)
    used, result, original = run_counted(scheduler, loop, call, sample, fitted[0], guidance, dtypes, *drawn, lead)
    like = None
    goes_on = scheduler._dtypes(dtypes.result, output.dtype) == dtypes  # the next sample may be wider
    if goes_on and lead == 1 and is_by_value(scale) and (drawing is None or drawing.path is None):
        like = loop.made.like = Like.of(scale, guidance, used, counted_as(guidance), dtypes)
    loop.go_on_like(like)
    scheduler._step_index = index + 1
    if loop.is_over:
        scheduler._ended = loop
    count_fused(scheduler, guidance, is_last=loop.is_over)
    return scheduler._result(result, original, dtypes.original, return_dict)


def loop_at(
    scheduler: CountedStep, index: int, arguments: tuple[Any, ...], sample: Tensor, dtype: torch.dtype
) -> CountedLoop:
    """Return the loop that goes on at a step, or a new one that begins there.

    Args:
        scheduler, index, arguments, sample: of the step.
        dtype: in which the sample is kept from step to step.

    Raises:
        RuntimeError: the loop under way goes on from earlier steps, and this is not the next one, or its tables or
            configuration are others.
    """
    loop, tables, copied = scheduler._counted, host_tables(scheduler), scheduler._copied_loop
    under_way = loop if loop is not None and loop.is_under_way(index) else None
    if under_way is not None and under_way.tables is not tables and under_way.history is not None:
        _go_by(scheduler, under_way, tables)
    if loop is not None and loop.tables is tables and not loop.is_over:
        fits = loop.shape == sample.shape and (loop.table is None or loop.table.device == sample.device)
        follows = loop.following == index or (loop.history is None and index >= loop.begin)
        same = loop.arguments == arguments and all(map(is_, loop.attributes, scheduler._attributes()))
        if fits and follows and same and (loop.history is None or loop.history.dtype == dtype):
            return loop
        if loop.history is not None:
            raise RuntimeError(
                f"step: expected step {loop.following} of the loop, with samples of {tuple(loop.shape)} in "
                f"{_named(loop.history.dtype)} and options as before, as it goes on from them, got step {index} with "
                f"samples of {tuple(sample.shape)} in {_named(dtype)}{'' if same else ' and others'}; set_timesteps "
                "begins another loop"
            )
    if copied is not None:
        copied = copied if copied.fits(index, arguments, sample) else None
    elif under_way is None:
        again = ended_loop_again(scheduler, tables, index, arguments, sample, dtype)
        if again is not None:
            return again
    begin, scheduler._ended = index if copied is None else copied.begin, None
    made = loop_table(scheduler, tables, begin, arguments, sample.device)
    history = None
    if made.table is not None and under_way is not None and under_way.goes_on_from_theirs():
        made = LoopTable(made.config, made.state, why_not=GOES_ON)
    if made.table is not None and made.table.history_slots:
        history = History(made.table, dense(sample).to(dtype))
    loop = CountedLoop(
        tables, begin, arguments, scheduler._attributes(), form_of(sample), made, made.table, history, index,
        is_small=needs_no_advice(sample), is_little=sample.nbytes <= LITTLE, levels_in=scheduler._levels_in,
        further_in=scheduler._further_tables, refuses_integers=scheduler._refuses_integers,
    )  # fmt: skip
    if copied is not None:
        loop.go_on_from(copied)
    scheduler._counted, scheduler._copied_loop = loop, None
    if loop.table is not None:
        warn_of_unscaled_inputs(scheduler)
    return loop


def _go_by(scheduler: CountedStep, loop: CountedLoop, tables: HostTables) -> None:
    """Let a loop with a history go by tables that have been set since, if they say the same.

    Raises:
        RuntimeError: they do not, or the configuration does not.
    """
    assert loop.table is not None
    if loop_table(scheduler, tables, loop.begin, loop.arguments, loop.table.device) is not loop.made:
        raise RuntimeError(
            "step: expected the tables and the configuration that the loop began with, as it goes on from its earlier "
            f"steps, got others before step {loop.following}; set_timesteps begins another loop"
        )
    loop.go_by(tables)


def _named(dtype: torch.dtype) -> str:
    return "float64" if dtype == torch.float64 else "float32 or less"


def leave(scheduler: CountedStep, loop: CountedLoop, index: int, refusal: str | None) -> None:
    """Leave a step to diffusers; of a loop that goes on from earlier ones, all of them or none.

    Raises:
        RuntimeError: steps of the loop have been made already, of which diffusers' own step knows nothing.
    """
    if loop.table is not None:
        if loop.history is not None and index != loop.begin and not scheduler._history_is_given:
            raise RuntimeError(
                f"step: expected a step like those before it, as it goes on from them, got one that is left to "
                f"diffusers ({refusal}); set_timesteps begins another loop"
            )
        if loop.history is not None:
            loop.table = loop.history = None
    count(scheduler, LEFT + (refusal or loop.made.why_not or SHAPES))
    loop.following, loop.returned, loop.state = index + 1, None, None
    if loop.table is not None and loop.following - loop.begin == loop.calls:
        loop.end()


def is_integer(timestep: Any) -> bool:
    """Tell whether a timestep is one of those that diffusers refuses where its own are real."""
    if type(timestep) is Tensor:
        return timestep.dtype in (torch.int32, torch.int64) and timestep.is_cpu
    return isinstance(timestep, (int, torch.IntTensor, torch.LongTensor))


def left(
    scheduler: CountedStep, output: Tensor, sample: Tensor, guidance_scale: Scale | None, reason: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return the model's output, guided in plain torch, and the sample, for a step that is left to diffusers.

    ``reason``: why, if it is not counted yet.
    """
    if reason is not None:
        count(scheduler, LEFT + reason)
    return combined(scheduler, output, sample, guidance_scale, None), plain(sample)
