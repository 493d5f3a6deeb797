"""Say whether the kernels take a step's tensors, and lay its predictions out as its sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..guidance import Guidance
from ..step.memory import DTYPES, in_layout_of, same_layout
from .taken import Output, Taken

SHAPES = "shapes that broadcast, or do not fit"


def refusal_of(sample: Tensor, output: Output, gradient: Tensor | None, noise: Tensor | None) -> str | None:
    """Return why the kernel does not take these tensors as they are; ``None``: it does."""
    if is_transformed():
        return "torch.func or forward-mode differentiation"
    if sample.dim() == 0:
        return SHAPES
    shape, device, grad = sample.shape, sample.device, torch.is_grad_enabled()
    tensors = [sample, output] if isinstance(output, Tensor) else [sample, *output.predictions]
    if isinstance(output, Taken) and output.variance is not None:
        tensors.append(output.variance)
    for elementwise in (gradient, noise):
        if elementwise is not None:
            tensors.append(elementwise)
            if not isinstance(elementwise, Tensor) or elementwise.shape != shape:
                return SHAPES
    for tensor in tensors:
        if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64 and device.type != "cpu"):
            return f"tensors of {tensor.dtype}"
        if tensor.device != device:
            return "tensors of two devices"
        if grad and tensor.requires_grad:
            return "autograd"
    # diffusers' result is of the noise's dtype as well
    wide = noise is not None and noise.dtype == torch.float64 and sample.dtype != torch.float64
    return "noise of torch.float64 for another sample" if wide else None


def is_transformed() -> bool:
    """Tell whether torch.func or forward-mode differentiation sees more in a tensor than its values."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def fitted_predictions(
    output: Output, sample: Tensor, guidance: Guidance | None, learned_variance: bool
) -> tuple[Tensor | list[Tensor], Tensor | None] | None:
    """Return the predictions and the learned variance in the sample's layout; ``None`` if the shapes do not fit.

    The output has the sample's shape as often as guidance weighs it, or that with twice the channels; the second half
    is the learned variance, and is left out where none is expected.
    """
    shape = sample.shape
    if isinstance(output, Tensor) and output.shape[1:] == shape[1:] and not learned_variance:
        if guidance is None and output.shape != shape:
            return None
        if same_layout(output, sample):
            return output, None
        return [in_layout_of(sample, part) for part in _parts(output, guidance)], None
    if isinstance(output, Taken):
        fits = learned_variance == (output.variance is not None)
        if not fits or any(part.shape != shape for part in output.predictions):
            return None
        parts = [in_layout_of(sample, part) for part in output.predictions]
        return parts, None if output.variance is None else in_layout_of(sample, output.variance)
    channels = shape[1] if len(shape) > 1 else 0
    doubled = channels > 0 and output.shape[1:] == (2 * channels, *shape[2:])
    if not (doubled and (learned_variance or guidance is not None)) or (
        guidance is None and output.shape[0] != shape[0]
    ):
        return None
    parts = list(_parts(output, guidance))
    variance = in_layout_of(sample, parts[-1][:, channels:]) if learned_variance else None
    return [in_layout_of(sample, part[:, :channels]) for part in parts], variance


def _parts(output: Tensor, guidance: Guidance | None) -> Sequence[Tensor]:
    """Return the predictions, each of the sample's batch."""
    parts_in_all = 1 if guidance is None else guidance.num_predictions
    parts: Sequence[Tensor] = output.unflatten(0, (parts_in_all, output.shape[0] // parts_in_all)).unbind(0)
    return parts
