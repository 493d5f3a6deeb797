"""Make a row of each pipeline class, and count rows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from fastguide.diffusers.served import SERVED

from .defaults import default_scheduler, scheduler_arguments
from .forms import FUSED_FORMS, SEEN_THROUGH, Guidance, guidance_of
from .reading import X0_OF_A_STEP, Step, read_steps
from .sources import Source, pipeline_classes, source_of

_NO_STEPS = ("image_noising_scheduler", "low_res_scheduler", "inverse_scheduler")
"""Schedulers that add noise, or invert an image before the pipeline is called."""


@dataclass(frozen=True)
class Row:
    """What is served of one pipeline class."""

    pipeline: str
    deprecated: bool
    scheduler: str
    """The class of its scheduler by default; of several, that of the one that makes the result."""
    by: str
    """By what that is known: ``"annotation"``, ``"init"``, ``"example"``, ``"checkpoint"``, or nothing."""
    origin: str
    """For a checkpoint: which, and where that is from."""
    other_schedulers: dict[str, str]
    """Its other schedulers that make steps, by argument."""
    served: bool
    """Whether all these schedulers are served."""
    form: str
    """The form of its guidance; of several, of one that is not fused."""
    calls: str
    changes: tuple[str, ...]
    fused: bool
    """Whether guidance is left to the step, or there is none."""
    rescales_on_demand: bool
    """Whether ``guidance_rescale``, which is 0 by default, makes it another form."""
    on_demand: Guidance | None
    """Guidance by a second call, which a pipeline whose model has the scale as an input makes on demand."""
    reasons: tuple[str, ...]
    """Why the scheduler is not served, or guidance not fused."""


@dataclass(frozen=True)
class Shares:
    """How many pipelines are served and fused."""

    pipelines: int
    served: int
    fully_fused: int
    """Whose scheduler is served and whose guidance is fused."""
    form_fused: int
    """As ``fully_fused``, if nothing were done to the predictions but guidance."""
    guided: int = 0
    """As ``fully_fused``, of those that combine several predictions."""


def served_names() -> frozenset[str]:
    """Return the names of diffusers' schedulers that fastguide serves."""
    return frozenset(cls.__name__ for cls in SERVED)


def installed_rows(served: Collection[str]) -> list[Row]:
    """Return the rows of the installed diffusers' pipelines that take a scheduler.

    Args:
        served: the names of the schedulers that count as served.
    """
    sources = {cls.__name__: source_of(cls) for cls in pipeline_classes()}
    return [row_of(source, served, sources.get) for source in sources.values() if scheduler_arguments(source)]


def row_of(source: Source, served: Collection[str], find: Callable[[str], Source | None] = lambda name: None) -> Row:
    """Return the row of a pipeline.

    Args:
        source: what is read of it.
        served: the names of the schedulers that count as served.
        find: returns the source of a pipeline that this one has within it, by name.
    """
    inner = _inner(source, find)
    steps = _steps(source, inner)
    guidance = _least_fused([guidance_of(step, methods) for step, methods in steps])
    if source.name in _SUMS_WHEN_RUN:
        guidance = replace(
            guidance, changes=tuple(dict.fromkeys(c.replace("arithmetic", "sum") for c in guidance.changes))
        )
    main, *others = [name for name in scheduler_arguments(source) if name not in _NO_STEPS]
    scheduler, by, origin = default_scheduler(source, main)
    stepping = {step.scheduler for step, _ in steps}
    other_schedulers = {name: default_scheduler(source, name)[0] for name in others if inner or name in stepping}
    missing = [name for name in dict.fromkeys((scheduler, *other_schedulers.values())) if name not in served]
    unserved = [f"{name} is not served" for name in missing]
    return Row(
        pipeline=source.name,
        deprecated=source.module.startswith("deprecated"),
        scheduler=scheduler,
        by=by,
        origin=origin,
        other_schedulers=other_schedulers,
        served=not unserved,
        form=guidance.form,
        calls=guidance.calls,
        changes=guidance.changes,
        fused=guidance.fused,
        rescales_on_demand=guidance.form != "rescaled" and _rescales(source),
        on_demand=_on_demand(source, inner, guidance),
        reasons=(*unserved, *_reasons(guidance)),
    )


_SUMS_WHEN_RUN = frozenset(("LTX2HDRPipeline", "PRXPixelPipeline", "StableDiffusionLatentUpscalePipeline"))
"""Pipelines that make sums of predictions and latents, and not of masks, which this reading does not tell apart: seen
in tests/diffusers/test_families.py."""


def shares(rows: Sequence[Row]) -> Shares:
    """Count rows."""
    served = [row for row in rows if row.served]
    return Shares(
        len(rows),
        len(served),
        sum(row.fused for row in served),
        sum(FUSED_FORMS[row.form] for row in served),
        sum(row.fused and row.form not in ("none", "embedded") for row in served),
    )


def _inner(source: Source, find: Callable[[str], Source | None]) -> list[Source]:
    """Return the pipelines that a pipeline makes of its own parts: a combined one's prior and decoder."""
    names = {
        node.func.id: None
        for method in source.methods.values()
        for node in ast.walk(method)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Pipeline")
    }
    return [found for name in names if name != source.name and (found := find(name)) is not None]


def _steps(source: Source, inner: Sequence[Source], true_cfg: bool = False) -> list[tuple[Step, Collection[str]]]:
    """Return the steps of a pipeline, each with its methods; of a combined one, those of its parts."""
    steps: list[tuple[Step, Collection[str]]] = []
    for part in inner or [source]:
        found = read_steps(part, true_cfg)
        if all(guidance_of(step, part.methods).form == "none" for step in found):
            found = read_steps(part, True)  # there is no other guidance
        of_others = _given_to_others(found)
        steps += [(step, part.methods) for step in found if id(step.output) not in of_others]
    return steps


def _given_to_others(steps: Sequence[Step]) -> set[int]:
    """Return the outputs of which a step makes an x_0 that another step is given, by identity."""
    nodes = [node for step in steps if step.output is not None for node in step.output.walk()]
    return {id(part) for node in nodes if node.detail == X0_OF_A_STEP for part in node.parts}


def _least_fused(found: Sequence[Guidance]) -> Guidance:
    """Return what decides: guidance that is not fused and whose form is known, or else the first."""
    if not found:
        return Guidance("not found")
    unfused = [guidance for guidance in found if not guidance.fused]
    known = [guidance for guidance in unfused if guidance.form not in ("other", "not found")]
    guided = [guidance for guidance in found if guidance.form not in ("none", "not found")]
    return (known or unfused or guided or found)[0]


def _on_demand(source: Source, inner: Sequence[Source], guidance: Guidance) -> Guidance | None:
    if guidance.form != "embedded":
        return None
    steps = _steps(source, inner, true_cfg=True)
    other = _least_fused([guidance_of(step, methods) for step, methods in steps])
    return None if other == guidance else other


def _rescales(source: Source) -> bool:
    calls = (node for method in source.methods.values() for node in ast.walk(method) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "rescale_noise_cfg" for call in calls)


def _reasons(guidance: Guidance) -> tuple[str, ...]:
    if guidance.fused:
        return ()
    form = () if FUSED_FORMS[guidance.form] else (f"guidance: {guidance.form}",)
    return (*form, *(change for change in guidance.changes if change not in SEEN_THROUGH))
