"""Refuses a torch that is too old, before anything of it is used."""

from __future__ import annotations

import torch

from ._version import TORCH_FLOOR, __version__


def check(found: str) -> None:
    """Refuse a version of torch, such as ``2.9.1+cpu``, that is older than the floor.

    Raises:
        ImportError: the version is older.
    """
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ImportError(
            f"fastguide {__version__}: expected torch {floor} or newer, got {found}: pip install 'torch>={floor}'"
        )


check(torch.__version__)
