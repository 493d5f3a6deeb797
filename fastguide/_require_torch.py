"""Refuses a torch that is too old, before anything of it is used."""

from __future__ import annotations

import torch

from ._version import TORCH_FLOOR, __version__


def check(found: str) -> None:
    """A torch's version, such as ``2.13.0+cpu``.

    Raises:
        ImportError: it is older than the floor.
    """
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        raise ImportError(
            f"fastguide {__version__}: expected torch {floor} or newer, got {found}: pip install 'torch>={floor}'"
        )


check(torch.__version__)
