"""What a model is conditioned on: checked, and copied to buffers that hold the conditions of all predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..guidance import Guidance

Condition: TypeAlias = "Tensor | Mapping[str, Condition]"
"""A tensor with the batch in front, or several by the name of the model's argument, of which each may be a mapping."""

NamedConditions: TypeAlias = "list[tuple[str, Condition]]"
"""The condition of each prediction, in the order of the weights, with the argument that it came in for messages."""


class TensorSignature(NamedTuple):
    """A condition's tensor without its values and its batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Signature: TypeAlias = "tuple[tuple[str, Signature], ...] | TensorSignature | None"
"""A condition without its values and its batch; a mapping is its items, sorted by name."""


def as_list(
    cond: Condition | Sequence[Condition] | None, uncond: Condition | None, num_predictions: int
) -> NamedConditions:
    """Return the condition of each prediction; refuse conditions if there are more or fewer."""
    several: list[tuple[str, Condition]]
    if isinstance(cond, (Tensor, Mapping)):
        several = [("cond", cond)]
    elif cond is None or isinstance(cond, (list, tuple)):
        several = [(f"cond[{i}]", c) for i, c in enumerate(cond or [])]
    else:
        raise TypeError(f"cond: expected a tensor or a mapping of tensors, got {type(cond).__name__}")
    if num_predictions == 1:
        if uncond is not None:
            raise ValueError("uncond: expected None, as the guidance weighs no unconditional prediction")
        if len(several) > 1:
            raise ValueError(f"cond: expected one condition, got {len(several)}")
        return several
    if uncond is None:
        raise ValueError("uncond: expected the null (or a negative) condition, as the guidance weighs it, got None")
    if len(several) != num_predictions - 1:
        raise ValueError(f"cond: expected {num_predictions - 1} condition(s) for this guidance, got {len(several)}")
    return [("uncond", uncond), *several]


def signature(conditions: NamedConditions, batch: int) -> Signature:
    """Return the one signature that all conditions have; refuse them if they differ, or have another batch in front."""
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
    return TensorSignature(tuple(first.shape[1:]), first.dtype)


def buffers(of: Signature, samples: int, device: torch.device) -> Condition | None:
    """Return zeros for the conditions of that number of samples."""
    if isinstance(of, TensorSignature):
        return torch.zeros(samples, *of.shape, dtype=of.dtype, device=device)
    if of is None:
        return None
    return {name: part for name, inner in of if (part := buffers(inner, samples, device)) is not None}


def tensors(condition: Condition) -> list[Tensor]:
    """Return the tensors of a condition."""
    if isinstance(condition, Tensor):
        return [condition]
    return [tensor for part in condition.values() for tensor in tensors(part)]


def at(condition: Condition, samples: slice) -> Condition:
    """Return the condition of some samples, in the same memory."""
    if isinstance(condition, Tensor):
        return condition[samples]
    return {name: at(part, samples) for name, part in condition.items()}


def write(buffer: Condition, samples: slice, condition: Condition) -> None:
    """Copy a condition, of the same signature, to the buffer's samples; the host does not wait."""
    if isinstance(buffer, Tensor):
        assert isinstance(condition, Tensor)
        buffer[samples].copy_(condition, non_blocking=True)
        return
    assert isinstance(condition, Mapping)
    for name, part in buffer.items():
        write(part, samples, condition[name])


def check_labels(labels: Tensor | None, guidance: Guidance, batch: int) -> None:
    """Refuse labels that no classifier takes, or the lack of labels that one needs."""
    takes = guidance.classifier is not None and guidance.classifier.takes_labels
    if labels is not None and not takes:
        raise ValueError("labels: expected None, as the guidance has no classifier to give them to, got some")
    if takes and (not isinstance(labels, Tensor) or labels.shape != (batch,) or labels.dtype != torch.int64):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected int64 of shape ({batch},), got {got}")
