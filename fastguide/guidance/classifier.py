"""Classifier guidance: the gradient of a noise-aware classifier, or of any function of the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from ..schedules.predictions import GradientForm
from .scales import Scale, as_scale, as_scale_per_step, scale_columns
from .weights import Guidance


class Classifier(Guidance):
    """Add the gradient ``g = grad_x log p(y | x_t)`` of a classifier (Dhariwal & Nichol 2021).

    Args:
        classifier: a noise-aware classifier, ``classifier(x, t) -> logits`` of shape ``(batch, classes)``, for the
            sample x and int64 timesteps t of shape ``(batch,)``. ``None``, without ``grad_fn`` too: the caller passes
            ``gradient=`` to ``guided_step``.
        guidance_scale: as in ``ClassifierFree``. 0 leaves the model alone, 1 is Bayes' rule.
        form: ``"epsilon"`` moves the noise prediction by ``-sqrt(1 - abar) * s * g`` before x_0 is clipped (algorithm
            2); ``"epsilon_after_clip"`` does so after the clip, as guided-diffusion's code (the predicted original
            sample that is returned is then the one before the shift); ``"mean"`` moves the mean of the step by
            ``variance * s * g`` (algorithm 1).
        grad_fn: instead of a classifier, any ``grad_fn(x, t) -> g`` of x's shape.

    >>> logits = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 10))
    >>> guidance = Classifier(lambda x, t: logits(x), 2.0, form="mean")
    >>> guidance.gradient(torch.randn(3, 1, 2, 2), torch.tensor([9, 9, 9]), torch.tensor([0, 1, 2])).shape
    torch.Size([3, 1, 2, 2])
    """

    def __init__(
        self,
        classifier: Callable[[Tensor, Tensor], Tensor] | None = None,
        guidance_scale: Scale = 1.0,
        form: GradientForm = "epsilon",
        *,
        grad_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if form not in get_args(GradientForm):
            raise ValueError(f"form: expected one of {get_args(GradientForm)}, got {form!r}")
        if classifier is not None and grad_fn is not None:
            raise ValueError("grad_fn: expected either a classifier or a grad_fn, got both")
        for name, function in (("classifier", classifier), ("grad_fn", grad_fn)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a callable, got {type(function).__name__}")
        self.gradient_form = form
        self._classifier, self._grad_fn = classifier, grad_fn
        super().__init__(scale_columns(1.0, as_scale("guidance_scale", guidance_scale)), self)

    @classmethod
    def per_step(
        cls,
        classifier: Callable[[Tensor, Tensor], Tensor] | None,
        guidance_scale: Sequence[float] | Tensor,
        form: GradientForm = "epsilon",
        *,
        grad_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Classifier:
        """Return guidance with one scale per step, shape ``(steps,)``, the same for every sample."""
        return cls(classifier, as_scale_per_step("guidance_scale", guidance_scale), form, grad_fn=grad_fn)

    @property
    def functions(self) -> tuple[object, object]:
        """The classifier and the ``grad_fn``; at least one of them is None."""
        return self._classifier, self._grad_fn

    @property
    def takes_labels(self) -> bool:
        """Whether ``gradient`` needs labels: a classifier does, a ``grad_fn`` does not."""
        return self._classifier is not None

    def gradient(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the gradient of ``log p(labels | sample)``, without the scale, in the sample's shape and dtype.

        ``timestep`` and ``labels`` are int64 of shape ``(batch,)``. Neither the sample nor the classifier's
        parameters collect a gradient.
        """
        # A sampling loop runs without gradients, or in inference mode; here they are needed all the same.
        with torch.inference_mode(False), torch.enable_grad():
            x, timestep = sample.detach().clone(), timestep.clone()
            if self._grad_fn is not None:
                gradient = self._grad_fn(x, timestep)
            else:
                gradient = self._log_probability_gradient(x.requires_grad_(True), timestep, labels)
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient: expected a tensor, got {type(gradient).__name__}")
        if gradient.shape != sample.shape:
            expected, got = tuple(sample.shape), tuple(gradient.shape)
            raise ValueError(f"gradient: expected {expected}, the sample's shape, got {got}")
        return gradient.detach().to(sample.dtype)

    def _log_probability_gradient(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        if self._classifier is None:
            raise ValueError("classifier: this Classifier has neither classifier nor grad_fn; pass gradient= instead")
        batch = x.shape[0]
        if labels is None or labels.shape != (batch,) or labels.dtype != torch.int64:
            got = "None" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise ValueError(f"labels: expected int64 of shape ({batch},), got {got}")
        logits = self._classifier(x, timestep)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != batch:
            got = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"classifier: expected logits of shape ({batch}, classes), got {got}")
        if labels.device.type == "cpu" and not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
            raise ValueError(
                f"labels: expected 0 to {logits.shape[1] - 1}, the classifier's classes, got {labels.tolist()}"
            )
        gradient = None
        if logits.requires_grad:
            log_probability = logits.log_softmax(-1).gather(1, labels.clone()[:, None])
            (gradient,) = torch.autograd.grad(log_probability.sum(), x, allow_unused=True)
        if gradient is None:
            raise ValueError("classifier: expected logits that depend on x by autograd, got some that do not")
        return gradient
