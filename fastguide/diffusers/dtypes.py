"""Say which dtypes diffusers' steps have for a sample and a model's output of different ones.

Most of diffusers' schedulers leave it to torch's promotion; some make the sample float32 first, and give the result the
dtype of the model's output, or that of the sample.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch


class Dtypes(NamedTuple):
    """The dtypes of one step."""

    model: torch.dtype
    """Of the model's output."""
    result: torch.dtype
    """Of the sample that ``step`` returns."""
    original: torch.dtype
    """Of the predicted x_0, or what is in its place."""

    @property
    def working(self) -> torch.dtype:
        """In which the sample is kept from step to step, but for 16 bits: float64 if that is returned."""
        return torch.float64 if self.result == torch.float64 else torch.float32

    @property
    def is_rounded(self) -> bool:
        """Whether the result has 16 bits only."""
        return self.result in (torch.bfloat16, torch.float16)

    def of_noise(self, rule: NoiseRule) -> torch.dtype:
        """Return the dtype in which diffusers draws noise."""
        if rule == "model":
            return self.model
        return self.original if rule == "original" else rule


NoiseRule = torch.dtype | Literal["model", "original"]
"""In which dtype diffusers draws: the model's output's, that of the predicted x_0, or always the same one."""


def promoted(sample: torch.dtype, model: torch.dtype) -> Dtypes:
    """Return the dtypes of schedulers that leave it to torch."""
    both = sample if sample == model else torch.promote_types(sample, model)
    return Dtypes(model, both, both)


def of_the_model(sample: torch.dtype, model: torch.dtype) -> Dtypes:
    """Return the dtypes of schedulers that make the sample float32, and then return the model's dtype."""
    return Dtypes(model, model, torch.promote_types(torch.float32, model))


def of_the_sample(sample: torch.dtype, model: torch.dtype) -> Dtypes:
    """Return the dtypes of schedulers that return the sample's own."""
    return Dtypes(model, sample, torch.promote_types(sample, model))


def with_default_noise(sample: torch.dtype, model: torch.dtype) -> Dtypes:
    """Return the dtypes of a scheduler that adds noise of torch's default dtype."""
    both = torch.promote_types(sample, model)
    return Dtypes(model, torch.promote_types(both, torch.get_default_dtype()), both)
