"""Say which scheduler a pipeline class has by default, and by what that is known."""

from __future__ import annotations

import ast
import re

from .checkpoints import AGAINST_ANNOTATION, KNOWN, WITHOUT_EXAMPLE
from .sources import Source

UNKNOWN_SCHEDULER = "unknown"

_SCHEDULER = re.compile(r"\b[A-Z]\w*Schedulers?\b")
_ANY = frozenset(("KarrasDiffusionSchedulers", "SchedulerMixin"))
_LOADED = re.compile(r"\b([A-Z]\w*Scheduler)\.from_\w+\(")
_MADE = re.compile(r"^\s*(?:>>>|\.\.\.).*\b([A-Z]\w*Scheduler)\(", re.MULTILINE)
_EXCHANGED = re.compile(r"\bscheduler = ([A-Z]\w*Scheduler)\.from_config\(")
_CHECKPOINT = re.compile(r"[\"']([\w.-]+/[\w.-]+)[\"']")


def scheduler_arguments(source: Source) -> list[str]:
    """Return the arguments of its ``__init__`` that are schedulers, the one that makes the result first."""
    found = [
        name
        for name, (annotation, _) in source.arguments().items()
        if name.endswith("scheduler") or "SchedulerMixin" in _named(annotation)
    ]
    return sorted(found, key=lambda name: (name != "scheduler", name != "decoder_scheduler"))


def default_scheduler(source: Source, argument: str = "scheduler") -> tuple[str, str, str]:
    """Return the class that a scheduler of a pipeline has by default, by what that is known, and where that is from.

    By ``"annotation"``, if it names one class; by ``"init"``, if ``__init__`` exchanges others for one; by
    ``"example"``, if the docstring's example sets one; by ``"checkpoint"``, if ``KNOWN`` has that of the example. An
    annotation that checkpoints contradict does not count. If nothing says it, ``("unknown", "", "")``.
    """
    annotation, _ = source.arguments()[argument]
    named = _named(annotation)
    if source.name in AGAINST_ANNOTATION:
        return _by_checkpoint(AGAINST_ANNOTATION[source.name])
    if len(named) == 1 and not _ANY & named:
        return named.pop(), "annotation", ""
    init = source.methods.get("__init__")
    exchanged = _EXCHANGED.search(ast.unparse(init)) if init is not None else None
    if exchanged and argument == "scheduler":
        return exchanged[1], "init", ""
    text = "\n".join(source.examples)
    for name in (*_LOADED.findall(text), *_MADE.findall(text)) if argument == "scheduler" else ():
        if "Inverse" not in name:
            return name, "example", ""
    suffix = "" if argument in ("scheduler", "decoder_scheduler") else f", {argument.removesuffix('_scheduler')}"
    for checkpoint in (*_CHECKPOINT.findall(text), WITHOUT_EXAMPLE.get(source.name, "")):
        if checkpoint + suffix in KNOWN:
            return _by_checkpoint(checkpoint + suffix)
    return UNKNOWN_SCHEDULER, "", ""


def _by_checkpoint(checkpoint: str) -> tuple[str, str, str]:
    scheduler, origin = KNOWN[checkpoint]
    return scheduler, "checkpoint", f"{checkpoint}: {origin}"


def _named(annotation: ast.expr | None) -> set[str]:
    """Return the schedulers' classes that an annotation names."""
    return set() if annotation is None else set(_SCHEDULER.findall(ast.unparse(annotation)))
