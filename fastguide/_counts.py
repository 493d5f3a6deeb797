"""A check that the whole package shares: a count is an int, and no bool."""

from __future__ import annotations


def is_integer(value: object) -> bool:
    """Tell whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse what is not an integer from ``least`` on.

    Raises:
        ValueError: it is another number, or no integer.
    """
    if not is_integer(value) or value < least:
        expected = "a positive integer" if least == 1 else f"an integer from {least} on"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
