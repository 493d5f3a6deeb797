"""Tokens, by which tables and guidance are remembered without being kept alive."""

from __future__ import annotations


class Token:
    """Stands for one object, and is compared by identity."""

    __slots__ = ()
