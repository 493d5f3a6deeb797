"""Make weights of the arguments of ``step`` that set its guidance, and refuse those that do not fit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..guidance import Classifier, ClassifierFree, Guidance
from ..guidance.scales import as_scale, scale_columns
from ..schedules.predictions import GradientForm
from .lazy_guidance import resolved
from .lazy_tensor import plain
from .taken import Output, Taken, Weights
from .traced import EXACT
from .weights_of_formula import Ahead, Conversion

Scale = float | Sequence[float] | Tensor

_NUMBER_OR_NONE = (float, int, type(None))


def is_by_value(guidance_scale: Any) -> bool:
    """Tell whether a scale is compared by value, as numbers are, but no bool is, and weights that are numbers.

    A guider's guidance is the same object for the same numbers.
    """
    kind = type(guidance_scale)
    if kind in _NUMBER_OR_NONE or (kind is Weights and guidance_scale.scale is None):
        return True
    return isinstance(guidance_scale, Guidance)


def guidance_of(
    output: Output,
    sample: Tensor,
    guidance_scale: Scale | Weights | Guidance | None,
    gradient: Tensor | None,
    gradient_scale: Scale,
    gradient_form: GradientForm,
) -> Guidance | None:
    """Return the guidance of a step; ``None``: its output is the one prediction.

    Args:
        output: the model's, of twice the sample's batch exactly where there is a ``guidance_scale``.
        sample: x_t.
        guidance_scale: a number, one per sample, or as a pipeline multiplies it, of shape (batch, 1, ...); or the
            weights of an output's several predictions; or a guider's guidance.
        gradient: of the sample's shape.
        gradient_scale, gradient_form: its scale and form.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    _check_gradient(gradient, gradient_scale, gradient_form, sample)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = _flattened(guidance_scale, sample)
    _check_doubled(output, sample, guidance_scale is not None)
    scale = None if gradient is None else gradient_scale
    if scale is None and (guidance_scale is None or isinstance(guidance_scale, Guidance)):
        return guidance_scale
    # Tensors are not to be hashed, a bool is refused, and what torch.compile traces is of its graph alone
    numbers = is_by_value(guidance_scale) and type(scale) in _NUMBER_OR_NONE
    make = _cached_guidance if numbers and not torch.compiler.is_compiling() else _guidance_for
    return make(guidance_scale, scale, gradient_form)


@functools.lru_cache(maxsize=64)
def _cached_guidance(guidance_scale: Any, gradient_scale: Any, gradient_form: GradientForm) -> Guidance:
    with _disable_current_modes():  # a FakeTensorMode's weights would be found by steps outside of it
        return _guidance_for(guidance_scale, gradient_scale, gradient_form)


def _guidance_for(guidance_scale: Any, gradient_scale: Any, gradient_form: GradientForm) -> Guidance:
    """Make the guidance of scales, of which one may be ``None``."""
    of_predictions = None
    if isinstance(guidance_scale, Guidance):
        of_predictions = guidance_scale
    elif isinstance(guidance_scale, Weights):
        of_predictions = _weighted(guidance_scale)
    elif guidance_scale is not None:
        of_predictions = ClassifierFree(guidance_scale)
    if gradient_scale is None:
        assert of_predictions is not None
        return of_predictions
    classifier = _classifier(gradient_scale, gradient_form)
    return classifier if of_predictions is None else classifier + of_predictions


def _weighted(weights: Weights) -> Guidance:
    """Make the guidance of a pipeline's own coefficients; in column 0 is their sum, which is 1 but for rounding."""
    constants, factors, scale, is_guidance = weights
    make = (Guidance if len(constants) > 1 else Ahead) if is_guidance else Conversion
    total = sum(constants)
    constants = (1.0 if abs(total - 1) <= EXACT else total, *constants[1:])
    if scale is None:
        return make(scale_columns(*constants, 0.0), None)
    each = torch.as_tensor(as_scale("guidance_scale", scale.reshape(-1)))
    factors = (sum(factors), *factors[1:])
    rows = _rows(constants, tuple([0.0 if abs(f) <= EXACT else f for f in factors]), each.dtype, each.device)
    return make(torch.addcmul(rows[0], rows[1], each[..., None]), None)


@functools.lru_cache(maxsize=64)
def _rows(
    constants: tuple[float, ...], factors: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return coefficients as rows of weights, with a gradient's scale, which is 0."""
    rows = torch.tensor([[*constants, 0.0], [*factors, 0.0]], dtype=dtype, device="cpu").to(device)
    return rows[:1, None], rows[1:, None]


def _classifier(gradient_scale: Scale, gradient_form: GradientForm) -> Classifier:
    if gradient_form not in get_args(GradientForm):
        raise ValueError(f"gradient_form: expected one of {get_args(GradientForm)}, got {gradient_form!r}")
    try:
        return Classifier(None, gradient_scale, gradient_form)
    except (TypeError, ValueError) as error:  # a Classifier's only scale has another name
        raise type(error)(str(error).replace("guidance_scale", "gradient_scale")) from None


def _check_gradient(gradient: Any, gradient_scale: Any, gradient_form: Any, sample: Tensor) -> None:
    """Refuse a gradient of another shape or kind, and a scale and form without one."""
    if gradient is None:
        if gradient_form != "epsilon" or type(gradient_scale) not in (int, float) or gradient_scale != 1:
            raise ValueError("gradient_scale, gradient_form: expected gradient= with them, got None")
    elif not isinstance(gradient, Tensor) or not gradient.is_floating_point():
        got = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
        raise TypeError(f"gradient: expected a tensor of floating-point numbers, got {got}")
    elif gradient.shape != sample.shape:
        raise ValueError(f"gradient: expected {tuple(sample.shape)}, the sample's shape, got {tuple(gradient.shape)}")


def _flattened(guidance_scale: Tensor, sample: Tensor) -> Tensor:
    """Return a scale of shape (batch, 1, ...), as it is multiplied, in shape (batch,)."""
    if guidance_scale.dim() < 2:
        return guidance_scale
    batch = len(sample) if sample.dim() else 0
    if guidance_scale.shape != (batch, *[1] * (guidance_scale.dim() - 1)):
        raise ValueError(
            f"guidance_scale: expected a number, shape ({batch},) or ({batch}, 1, ...), got "
            f"{tuple(guidance_scale.shape)}"
        )
    return guidance_scale.reshape(-1)


def _check_doubled(output: Output, sample: Tensor, guided: bool) -> None:
    """Refuse an output whose batch is not doubled though it is guided, or doubled though it is not."""
    batch = sample.shape[0] if sample.dim() else 0
    if isinstance(output, Taken) or batch == 0:  # twice nothing is nothing
        return
    if output.dim() > 0 and output.shape[0] == 2 * batch:
        if not guided:
            raise ValueError(
                f"model_output: expected the sample's batch, or guidance_scale= with twice that batch; "
                f"{_shapes(output, sample)}"
            )
    elif guided:
        raise ValueError(
            "model_output: expected twice the sample's batch with guidance_scale=, [unconditional, conditional]; "
            f"{_shapes(output, sample)}"
        )


def _shapes(output: Tensor, sample: Tensor) -> str:
    return f"got shapes {tuple(output.shape)} and {tuple(sample.shape)}"


def combined(
    scheduler: Any, model_output: Tensor, sample: Tensor, guidance_scale: Scale | None, gradient: Tensor | None
) -> Tensor:
    """Return the guided output in plain torch, for a step that is left to diffusers' own.

    Raises:
        ValueError: there is a gradient, of which diffusers' own step knows nothing.
    """
    if gradient is not None:
        raise ValueError(
            "gradient: expected None for a step that is left to diffusers (a configuration, autograd, shapes "
            "that broadcast), got a tensor"
        )
    if guidance_scale is None:  # what a pipeline has combined is computed as it does
        model_output = plain(model_output, "a step that is left to diffusers")
    output, guidance_scale = resolved(model_output, sample, guidance_scale)
    assert isinstance(output, Tensor)
    if guidance_scale is None:
        return output
    uncond, cond = output.chunk(2)
    scale = torch.as_tensor(guidance_scale, device=cond.device)
    scale = scale.reshape(-1, *[1] * (cond.dim() - 1)) if scale.dim() else scale
    guided = uncond + scale * (cond - uncond)
    channels = sample.shape[1] if sample.dim() > 1 else 0
    if channels and cond.shape[1:2] == (2 * channels,):
        guided = guided[:, :channels]
        if scheduler.variance_type.startswith("learned"):  # the conditional prediction's variance
            guided = torch.cat([guided, cond[:, channels:]], 1)
    return guided.to(cond.dtype)
