"""What a step in the interpreter is made of: a case's options."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISES = ("none", "given", "portable", "torch")
STEPS = 3  # rows of the table


@dataclass(frozen=True)
class Case:
    """A step's options and its tensors' layouts; ``None`` for offset, stride or dtype draws one for each tensor."""

    batch: int = 2
    size: int = 1024
    noise: str = "none"
    count: int = 1  # of predictions
    together: bool = False  # the predictions in one tensor
    gradient: bool = False
    variance: bool = False
    masked: bool = False
    original: bool = False
    copies: int = 0
    in_place: bool = True
    offset: int | None = 0  # elements behind a multiple of 256 bytes
    stride: int | None = None  # elements from sample to sample
    dtype: torch.dtype | None = torch.float32
    model: torch.dtype | None = None  # of predictions, gradient, variance and staged, if it is another one
    indices: str = "int"  # int, one, per sample
    scales: str = "both"  # one, per sample, per step, both
    cursor: str = ""  # one, per sample
    ended: bool = False  # some samples are finished
    timestep: str = ""  # int64, float32
    state: bool = False  # torch's stream is on the device
    threads: int = 256  # of torch's kernel
    channels: int = 1  # more: channels_last
    values: str = "normal"  # whole, normal, special, pure: noise alone
    bad: bool = False  # indices that are in no table
    one_seed: bool = False
    launches: int = 1  # one after the other
    few_tiles: int = 0  # launches of more have two vectors a thread, if their kernel has
    waves: str = "together"  # one by one, mixed
    seed: int = 0
    slots: int = 0  # of a history
    anchored: bool = False  # the sample was changed since the last step

    @property
    def variance_is_unused(self) -> bool:
        """Whether the step ignores the variance, which then may be anything."""
        return self.variance and self.noise == "none" and not self.gradient

    @property
    def exact(self) -> bool:
        """Whether compiled code must agree to the bit: exponentials and torch's stream may err in their last bits."""
        return self.noise != "torch" and (not self.variance or self.variance_is_unused)

    @property
    def equals_reference(self) -> bool:
        """Whether no order of operations rounds: of noise alone, and of whole numbers, to which one step adds noise."""
        whole = self.values == "whole" and (self.noise != "portable" or self.launches == 1)
        return self.exact and (whole or self.values == "pure")

    def __str__(self) -> str:
        changed = (f for f in fields(self) if getattr(self, f.name) != f.default or f.name in ("batch", "size"))
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})".replace("torch.", "")
