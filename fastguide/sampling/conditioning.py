"""What a model is conditioned on: checked, and kept in buffers that hold the conditions of all predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..guidance import Guidance

Condition: TypeAlias = "Tensor | Mapping[str, Condition]"
"""A tensor with the batch in front, or several by the name of the model's argument, of which each may be a mapping."""

Signature: TypeAlias = "tuple[tuple[str, Signature], ...] | tuple[tuple[int, ...], torch.dtype] | None"
"""Of a condition: names, and each tensor's shape without the batch and its dtype."""


def listed(
    cond: Condition | Sequence[Condition] | None, uncond: Condition | None, count: int
) -> list[tuple[str, Condition]]:
    """The condition of each of ``count`` predictions, with its argument's name, in the order of the weights."""
    several: list[tuple[str, Condition]]
    if isinstance(cond, (Tensor, Mapping)):
        several = [("cond", cond)]
    elif cond is None or isinstance(cond, (list, tuple)):
        several = [(f"cond[{i}]", c) for i, c in enumerate(cond or [])]
    else:
        raise TypeError(f"cond: expected a tensor or a mapping of tensors, got {type(cond).__name__}")
    if count == 1:
        if uncond is not None:
            raise ValueError("uncond: expected None, as the guidance weighs no unconditional prediction")
        if len(several) > 1:
            raise ValueError(f"cond: expected one condition, got {len(several)}")
        return several
    if uncond is None:
        raise ValueError("uncond: expected the null (or a negative) condition, as the guidance weighs it, got None")
    if len(several) != count - 1:
        raise ValueError(f"cond: expected {count - 1} condition(s) for this guidance, got {len(several)}")
    return [("uncond", uncond), *several]


def signature(conditions: Sequence[tuple[str, Condition]], batch: int) -> Signature:
    """The one signature that all conditions have; refused if they differ, or have another batch in front."""
    if not conditions:
        return None
    first = conditions[-1][1]
    if isinstance(first, Mapping):
        for name, condition in conditions:
            if not isinstance(condition, Mapping) or condition.keys() != first.keys():
                raise ValueError(
                    f"{name}: expected a mapping with the keys {sorted(first)}, as the other conditions have"
                )
        return tuple(
            (key, signature([(f"{n}[{key!r}]", c[key]) for n, c in conditions if isinstance(c, Mapping)], batch))
            for key in sorted(first)
        )
    for name, condition in conditions:
        if not isinstance(condition, Tensor):
            raise TypeError(f"{name}: expected a tensor, or mappings throughout, got {type(condition).__name__}")
        if condition.dim() == 0 or condition.shape[0] != batch:
            raise ValueError(f"{name}: expected the batch of {batch} in front, got shape {tuple(condition.shape)}")
        if isinstance(first, Tensor) and (condition.shape[1:], condition.dtype) != (first.shape[1:], first.dtype):
            raise ValueError(
                f"{name}: expected {first.dtype} of shape {tuple(first.shape)}, as the other conditions are, got "
                f"{condition.dtype} of {tuple(condition.shape)}"
            )
    assert isinstance(first, Tensor)
    return tuple(first.shape[1:]), first.dtype


def buffers(of: Signature, samples: int, device: torch.device) -> Condition | None:
    """Room for the conditions of so many samples."""
    if of is None:
        return None
    if len(of) == 2 and isinstance(of[1], torch.dtype):
        shape, dtype = of
        return torch.zeros(samples, *shape, dtype=dtype, device=device)
    return {name: part for name, inner in of if (part := buffers(inner, samples, device)) is not None}


def each(function: Callable[..., None], *conditions: Condition) -> None:
    """Call a function with the tensors of conditions that are alike."""
    first = conditions[0]
    if isinstance(first, Mapping):
        for key in first:
            each(function, *(c[key] for c in conditions if isinstance(c, Mapping)))
    else:
        function(*conditions)


def rows_of(condition: Condition, rows: slice) -> Condition:
    """Some samples' condition, in the same memory."""
    if isinstance(condition, Mapping):
        return {key: rows_of(value, rows) for key, value in condition.items()}
    return condition[rows]


def check_labels(labels: Tensor | None, guidance: Guidance, batch: int) -> None:
    """Labels are there exactly where a classifier takes them."""
    takes = guidance.classifier is not None and guidance.classifier.takes_labels
    if labels is not None and not takes:
        raise ValueError("labels: expected None, as the guidance has no classifier to give them to, got some")
    if takes and (not isinstance(labels, Tensor) or labels.shape != (batch,) or labels.dtype != torch.int64):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected int64 of shape ({batch},), got {got}")
