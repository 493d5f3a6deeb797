"""Save a pipeline that has parts of fastguide as one of diffusers' own, which loads without fastguide.

diffusers writes the module of a component's class into a saved pipeline, and imports it when that is loaded. So our
classes say that they are of the module of the class that they derive from, and have its name.
"""

from __future__ import annotations

import copyreg
import importlib
from typing import Any


class SavedAsDiffusers(type):
    """The class of classes that derive from one of diffusers', and are saved as that."""

    _home: str

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        super().__init__(name, bases, namespace)
        theirs = next((c for c in cls.__mro__ if c.__module__.startswith("diffusers.") and c is not cls), None)
        if theirs is not None and cls.__module__.startswith("fastguide."):
            cls._home, cls.__module__ = cls.__module__, theirs.__module__


def _class_at(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _pickled(cls: SavedAsDiffusers) -> Any:
    """Return how pickle finds a class: ours where it stands, and a user's subclass by its name."""
    return (_class_at, (cls._home, cls.__name__)) if "_home" in vars(cls) else cls.__qualname__


copyreg.pickle(SavedAsDiffusers, _pickled)
