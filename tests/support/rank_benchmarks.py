"""The benchmarks' measurement of two processes, of a small loop."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import ranks

_SMALL = ranks.Workload("policy", 1, 2, True)
_ONE_BY_ONE = ranks.Workload("policy", 3, 2, False)


def rows() -> list[list[dict[str, Any]]]:
    """Of a loop, of one whose predictions are one by one, and of one in which a contender is wrong."""
    found = [ranks.of_this_rank(workload, 0.01) for workload in (_SMALL, _ONE_BY_ONE)]
    contenders = ranks.Loop.contenders

    def with_a_wrong_one(self: ranks.Loop) -> dict[str, Any]:
        calls = contenders(self)
        right = calls[ranks.PREDICTIONS]
        return calls | {ranks.PREDICTIONS: lambda: 1.01 * right()}

    ranks.Loop.contenders = with_a_wrong_one  # type: ignore[method-assign]
    return [*found, ranks.of_this_rank(_SMALL, 0.01)]
