"""Accelerate whole pipelines: exchange the schedulers and fuse the pipelines' guidance, without editing either."""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers

from .scheduler_step import SchedulerStep
from .served import SERVED
from .thresholding import why_not_thresholded
from .traced import Fusion
from .tracing import Traces, trace_models

_CHANGES = "_fastguide_changes"


@dataclass(frozen=True)
class Acceleration:
    """What ``accelerate`` did to a pipeline, and what its steps have been since.

    Parts of a pipeline within the pipeline have its name before their own: ``decoder_pipe.scheduler``. What is in
    several places is named at the first.
    """

    exchanged: dict[str, str]
    """The schedulers that are fastguide's now, with their classes."""
    tried: list[str]
    """The models whose guidance is fused if the pipeline computes it in the form that the step can take apart."""
    left_alone: dict[str, str]
    """Parts that stay as they were, each with the reason."""
    counts: Counter[str] = field(default_factory=Counter)
    """Steps made since, by what was done: ``"fused with guidance"``, in the step or in a launch before it,
    ``"fused without guidance"`` (the pipeline had none, or computed it by itself), and ``"left to diffusers: "`` with
    the reason. Not counted: compiled steps."""
    computed: Counter[str] = field(default_factory=Counter)
    """Operations that are not traced, for which guidance, or what else the pipeline makes of predictions, was computed
    before the step since, such as ``"norm over dim -1"``; one a run, as the rest of the run is not traced then."""


@dataclass
class _Changes:
    """What ``restore`` undoes; it is kept as an attribute of the pipeline."""

    owner: weakref.ref[Any] | None
    """The pipeline; ``None``: it was unpickled, and is not traced."""
    fusion: Fusion = field(default_factory=Fusion)
    schedulers: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """fastguide's scheduler at each place, and the one before it."""
    traces: list[Traces] = field(default_factory=list)
    """Those of its models."""

    def __reduce__(self) -> Any:
        """Leave the traces out of a pickle, where they would be of other models."""
        return _Changes, (None, self.fusion, self.schedulers)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Changes:
        """Return those of a copied pipeline, which counts its own steps."""
        fusion = copy.deepcopy(self.fusion, memo)
        fusion.counts, fusion.computed = Counter(), Counter()
        schedulers = copy.deepcopy(self.schedulers, memo)
        return _Changes(self.owner, fusion, schedulers, copy.deepcopy(self.traces, memo))


def accelerate(pipe: Any) -> Acceleration:
    """Give a diffusers pipeline the fused step, and fuse its classifier-free guidance into it.

    The scheduler becomes fastguide's of the same name, with the state that it has. The models' outputs are traced:
    where the pipeline gives the scheduler a sum of them, such as ``uncond + guidance_scale * (cond - uncond)``, also
    one that is rescaled to a deviation or norm of each sample, or goes on to a sum with the latents, the step does all
    of it, in float32. Guidance that is masked before the step is made in a launch of its own. Whatever else the
    pipeline computes is computed as before, and named in ``computed``. Nothing is traced with gradients, or where a
    model is called by other code than the pipeline's methods. A model that is compiled in place, by
    ``model.compile()``, has to be before.

    Pipelines within the pipeline are accelerated with it: the prior and the decoder of a combined one.

    Call it again after you have exchanged a scheduler or a model; calling it again otherwise changes nothing.
    ``restore(pipe)`` undoes it. A saved pipeline is diffusers' own.

    Args:
        pipe: a pipeline with a scheduler; with ``unet``, ``transformer`` and the like, its guidance is fused as well.

    Returns:
        What was exchanged and tried, what was left alone and why (mostly a scheduler that is not served), and the
        counts of steps, which go on while the pipeline runs.

    Raises:
        TypeError: it is no pipeline.

    >>> import diffusers, fastguide.diffusers
    >>> unet = diffusers.UNet2DModel(
    ...     8, 3, 3, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ...     norm_num_groups=4, layers_per_block=1,
    ... )
    >>> pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> done = fastguide.diffusers.accelerate(pipe)
    >>> done.exchanged, done.tried, done.left_alone
    ({'scheduler': 'DDIMScheduler'}, ['unet'], {})
    >>> _ = pipe(num_inference_steps=4)
    >>> done.counts
    Counter({'fused without guidance': 4})
    """
    _check(pipe)
    changes = _changes_of(pipe)
    exchanged, left_alone = _exchange(pipe, changes)
    tried = trace_models(_pipelines(pipe), changes.fusion, changes.traces)
    if not exchanged and not left_alone:
        left_alone["pipe"] = "it has no scheduler"
    return Acceleration(exchanged, tried, left_alone, changes.fusion.counts, changes.fusion.computed)


def restore(pipe: Any) -> None:
    """Undo ``accelerate``: put the original schedulers back, and stop tracing the models' outputs.

    A scheduler or model that you have put in its place since stays. A copy, ``copy.copy(pipe)``, has the models of the
    pipeline that it is a copy of: restoring the copy leaves them traced for that one.

    Raises:
        TypeError: it is no pipeline.
        ValueError: the pipeline is not accelerated.
    """
    _check(pipe)
    changes: _Changes | None = pipe.__dict__.pop(_CHANGES, None)
    if changes is None:
        raise ValueError(
            f"pipe: expected one that accelerate() was called on, got a {type(pipe).__name__} that was not, or was "
            "restored since"
        )
    is_copy = _is_copy(pipe, changes)
    for path, part in _pipelines(pipe):
        for name in _schedulers(part):
            fused, before = changes.schedulers.get(path + name, (None, None))
            if getattr(part, name) is fused and not (is_copy and path):
                setattr(part, name, before)
    while changes.traces and not is_copy:
        changes.traces.pop().remove()


def _check(pipe: Any) -> None:
    if isinstance(pipe, diffusers.DiffusionPipeline):
        return
    modular = getattr(diffusers, "ModularPipeline", None)
    hint = ""
    if modular is not None and isinstance(pipe, modular):
        hint = "; a modular one takes a scheduler and a guider of fastguide.diffusers as its components"
    if isinstance(pipe, type) and issubclass(pipe, diffusers.DiffusionPipeline):
        hint = f" {pipe.__name__}; make one of it first"
    raise TypeError(f"pipe: expected a diffusers pipeline, got {type(pipe).__name__}{hint}")


def _is_copy(pipe: Any, changes: _Changes) -> bool:
    """Tell whether a pipeline has its changes, and so its models, from another that has them still."""
    owner = None if changes.owner is None else changes.owner()
    return owner is not None and owner is not pipe and owner.__dict__.get(_CHANGES) is changes


def _changes_of(pipe: Any) -> _Changes:
    """Return the changes of a pipeline, without traces; new ones if it has none, or those of another."""
    changes: _Changes | None = pipe.__dict__.get(_CHANGES)
    if changes is None or _is_copy(pipe, changes):
        before = {} if changes is None else dict(changes.schedulers)
        changes = pipe.__dict__[_CHANGES] = _Changes(weakref.ref(pipe), schedulers=before)
    changes.owner = weakref.ref(pipe)
    while changes.traces:
        changes.traces.pop().remove()
    return changes


def _pipelines(pipe: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield a pipeline and those within it, each with what its parts' names begin with."""
    seen = set() if seen is None else seen
    seen.add(id(pipe))
    yield path, pipe
    for name, value in list(vars(pipe).items()):
        if isinstance(value, diffusers.DiffusionPipeline) and id(value) not in seen:
            yield from _pipelines(value, f"{path}{name}.", seen)


def _schedulers(pipe: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(pipe).items() if isinstance(value, diffusers.SchedulerMixin)}


def _exchange(pipe: Any, changes: _Changes) -> tuple[dict[str, str], dict[str, str]]:
    """Put fastguide's schedulers in their places; return their classes, and the reasons of those that stay."""
    exchanged: dict[str, str] = {}
    left_alone: dict[str, str] = {}
    fused_for: dict[int, SchedulerStep | None] = {}
    for path, part in _pipelines(pipe):
        for name, scheduler in _schedulers(part).items():
            if id(scheduler) not in fused_for:
                fused_for[id(scheduler)] = fused = _fused(scheduler)
                if fused is None:
                    left_alone[path + name] = _reason(scheduler)
                else:
                    exchanged[path + name] = type(fused).__name__
            fused = fused_for[id(scheduler)]
            if fused is not None and fused._before is not None:
                changes.schedulers[path + name] = (fused, fused._before)
                setattr(part, name, fused)
    changes.fusion = next((f._fusion for f in fused_for.values() if f is not None and f._fusion), changes.fusion)
    for fused in fused_for.values():
        if fused is not None:
            fused._fusion = changes.fusion
    return exchanged, left_alone


def _fused(scheduler: Any) -> SchedulerStep | None:
    """Return fastguide's scheduler for one of diffusers', with its state; itself if it is that; ``None``: none is."""
    if isinstance(scheduler, SchedulerStep):
        return scheduler
    own = SERVED.get(type(scheduler))
    if own is None or _never_fused(scheduler) is not None:
        return None
    fused = own.__new__(own)
    fused.__dict__.update(scheduler.__dict__)
    fused._before = scheduler
    return fused


def _never_fused(scheduler: Any) -> str | None:
    """Return what a configuration asks for that no step of a loop is fused with; ``None``: nothing."""
    why_not = why_not_thresholded(scheduler.config)
    if why_not is not None:
        return why_not
    kind: type = type(scheduler)
    if kind is diffusers.PNDMScheduler and not scheduler.config.skip_prk_steps:
        return "a warm-up by Runge and Kutta's method"
    return None


def _reason(scheduler: Any) -> str:
    kind = type(scheduler).__name__
    if type(scheduler) in SERVED:
        return f"{kind}: {_never_fused(scheduler)} is not in the fused step"
    return f"{kind}: it is not served, or a subclass of one that is"
