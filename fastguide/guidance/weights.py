"""Guidance as weights: how the predictions of several conditions, and a classifier's gradient, are combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, get_args

import torch
from torch import Tensor

from ..schedules.predictions import GradientForm

Scale: TypeAlias = "float | Sequence[float] | Tensor"

_HOST = torch.device("cpu")
_LARGEST = torch.finfo(torch.float32).max  # the kernels compute in float32


class Guidance:
    """Weights of ``num_predictions`` predictions, and the scale and form of a gradient, if there is one.

    ``guidance_a + guidance_b`` uses both: predictions by the one, a classifier's gradient by the other.

    The kernels read ``weights(device, dtype)``, of shape ``(steps or 1, batch or 1, num_predictions + 1)``. Its last
    column is the gradient's scale s. The others are anchored at the first prediction: column 0 holds the sum of all
    weights w_k, column k the weight w_k, and ``m = sum_k w_k p_k`` is computed as
    ``m = (sum_k w_k) * p_0 + sum_{k>=1} w_k * (p_k - p_0)``. It is the same number; but predictions of different
    conditions nearly agree, and their exact difference keeps the digits that ``(1 - s) * p_0 + s * p_1`` rounds away.
    """

    num_predictions: int
    classifier: Classifier | None

    def __init__(self, weights: Tensor, classifier: Classifier | None) -> None:
        self.num_predictions = weights.shape[-1] - 1
        self.classifier = classifier
        self.form: GradientForm | None = None if classifier is None else classifier.gradient_form
        self._weights = {(weights.device, dtype): weights.to(dtype) for dtype in (torch.float32, torch.float64)}
        self._source = weights
        self._copies: dict[tuple[torch.device, torch.dtype], torch.cuda.Event] = {}

    @property
    def steps(self) -> int:
        """Number of steps that the weights are given for; 1: the same at every step."""
        return self._source.shape[0]

    @property
    def batch(self) -> int:
        """Number of samples that the weights are given for; 1: the same for every sample."""
        return self._source.shape[1]

    def weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weights on a device, float32 or float64; kept, so that only the first call moves anything."""
        weights = self._weights.get((device, dtype))
        if weights is None:
            weights = self._weights[device, dtype] = self._copied(device, dtype)
        elif self._copies:
            self._wait_for_the_copy(device, dtype)
        return weights

    def _copied(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        source = self._weights[self._source.device, dtype]
        if device.type != "cuda" or torch.compiler.is_compiling():
            return source.to(device)
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"guidance: its weights are not on {device} yet, and cannot be copied there during a capture; run the "
                "step once before, or give the scale as a tensor there"
            )
        weights = source.to(device, non_blocking=True)  # the host does not wait, and keeps the source
        event = self._copies[device, dtype] = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return weights

    def _wait_for_the_copy(self, device: torch.device, dtype: torch.dtype) -> None:
        """On other streams than the one that it is made on; until it is done."""
        event = self._copies.get((device, dtype))
        # torch waits for all streams before a capture, and compiles nothing that is still under way.
        if event is None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return
        if event.query():
            del self._copies[device, dtype]
        else:
            event.wait(torch.cuda.current_stream(device))

    def steps_without_unconditional(self) -> tuple[bool, ...] | None:
        """At which steps the first prediction has no weight in any sample; one for all if the weights are.

        ``None``: the weights are on a device, where the host does not look.
        """
        if self._source.device != _HOST:
            return None
        first = self._source[..., 0] - self._source[..., 1 : self.num_predictions].sum(-1)
        return tuple((first == 0).all(1).tolist())

    def __add__(self, other: Guidance) -> Guidance:
        """Both: prediction weights of the one, a classifier's gradient of the other (then ``.classifier``)."""
        if not isinstance(other, Guidance):
            return NotImplemented
        if self.classifier is not None and other.classifier is not None:
            raise ValueError("guidance: expected at most one Classifier, got two; add their gradients in one grad_fn")
        if self.num_predictions > 1 and other.num_predictions > 1:
            raise ValueError("guidance: expected one set of prediction weights, got two; use Composed for several")
        first, second = (self, other) if self.num_predictions > 1 or other.classifier is not None else (other, self)
        shape = [_common("step", first.steps, second.steps), _common("sample", first.batch, second.batch)]
        device = first._source.device if first._source.device != _HOST else second._source.device
        left, right = (g._source.to(device).expand(*shape, -1) for g in (first, second))
        return Guidance(
            torch.cat([left[..., :-1], left[..., -1:] + right[..., -1:]], -1), first.classifier or second.classifier
        )

    def __repr__(self) -> str:
        form = "" if self.form is None else f", gradient form {self.form!r}"
        return f"{type(self).__name__}({self.num_predictions} predictions{form})"


class ClassifierFree(Guidance):
    """Classifier-free guidance: ``m = uncond + guidance_scale * (cond - uncond)`` (Ho & Salimans 2022, eq. 6).

    Predictions come in the order unconditional, conditional; for a negative prompt, its prediction takes the place
    of the unconditional one. Scale 0 is unconditional, 1 conditional, more amplifies, less than 0 leads away.

    Args:
        guidance_scale: a number; or one per sample, a sequence or tensor of shape ``(batch,)``; or one per step, a
            tensor of shape ``(steps, 1)``, or ``(steps, batch)`` for both; for a sliced table, those of its steps. A
            guidance interval is a column of scales
            that are 1 (or 0) outside of it. A tensor may live on the device; its values are then not checked, as that
            would wait for the device.

    >>> ClassifierFree(7.5), ClassifierFree([3.0, 7.5]).batch, ClassifierFree.per_step([1.0, 7.5, 1.0]).steps
    (ClassifierFree(2 predictions), 2, 3)
    """

    def __init__(self, guidance_scale: Scale) -> None:
        super().__init__(_columns(1.0, _scale("guidance_scale", guidance_scale), 0.0), None)

    @classmethod
    def original(cls, w: Scale) -> ClassifierFree:
        """The paper's own form, ``(1 + w) * cond - w * uncond``, which is ``guidance_scale = 1 + w``."""
        return cls(_scale("w", w) + 1)

    @classmethod
    def per_step(cls, guidance_scale: Sequence[float] | Tensor) -> ClassifierFree:
        """One scale per step, shape ``(steps,)``, the same for every sample."""
        return cls(_per_step("guidance_scale", guidance_scale))


class Composed(Guidance):
    """Several conditions at once: ``m = uncond + sum_i s_i * (cond_i - uncond)`` (Liu et al. 2022, eq. 11).

    Predictions come in the order unconditional, then one for each scale. A negative scale leads away from its
    condition. Each scale is what ``ClassifierFree`` takes.

    >>> Composed([5.0, 3.0, -1.0]).num_predictions
    4
    """

    def __init__(self, guidance_scales: Sequence[Scale]) -> None:
        if not isinstance(guidance_scales, (Sequence, Tensor)) or len(guidance_scales) == 0:
            raise ValueError(
                f"guidance_scales: expected a sequence of scales, one a condition, got {guidance_scales!r}"
            )
        scales = [_scale(f"guidance_scales[{i}]", scale) for i, scale in enumerate(guidance_scales)]
        super().__init__(_columns(1.0, *scales, 0.0), None)


class Classifier(Guidance):
    """Classifier guidance with the gradient ``g = grad_x log p(y | x_t)`` (Dhariwal & Nichol 2021).

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
        super().__init__(_columns(1.0, _scale("guidance_scale", guidance_scale)), self)

    @classmethod
    def per_step(
        cls,
        classifier: Callable[[Tensor, Tensor], Tensor] | None,
        guidance_scale: Sequence[float] | Tensor,
        form: GradientForm = "epsilon",
        *,
        grad_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Classifier:
        """One scale per step, shape ``(steps,)``, the same for every sample."""
        return cls(classifier, _per_step("guidance_scale", guidance_scale), form, grad_fn=grad_fn)

    @property
    def functions(self) -> tuple[object, object]:
        """The classifier and the ``grad_fn``, of which at most one is there."""
        return self._classifier, self._grad_fn

    @property
    def takes_labels(self) -> bool:
        """Whether ``gradient`` needs labels: a classifier does, a ``grad_fn`` does not."""
        return self._classifier is not None

    def gradient(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """The gradient of ``log p(labels | sample)`` at the sample, without the scale; shape and dtype of the sample.

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
            raise ValueError(f"gradient: expected {_shape(sample)}, the sample's shape, got {_shape(gradient)}")
        return gradient.detach().to(sample.dtype)

    def _log_probability_gradient(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        if self._classifier is None:
            raise ValueError("classifier: this Classifier has neither classifier nor grad_fn; pass gradient= instead")
        batch = x.shape[0]
        if labels is None or labels.shape != (batch,) or labels.dtype != torch.int64:
            got = "None" if labels is None else f"{labels.dtype} of shape {_shape(labels)}"
            raise ValueError(f"labels: expected int64 of shape ({batch},), got {got}")
        logits = self._classifier(x, timestep)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != batch:
            got = _shape(logits) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"classifier: expected logits of shape ({batch}, classes), got {got}")
        if labels.device == _HOST and not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
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


def _columns(*columns: float | Tensor) -> Tensor:
    """Weights of shape (steps or 1, batch or 1, columns) from numbers and scales of shape (steps or 1, batch or 1)."""
    scales = [c for c in columns if isinstance(c, Tensor)]
    if not scales:  # cheap, as guidance may be made in the loop
        return torch.tensor([[columns]], dtype=torch.float64, device="cpu")
    like = next((scale for scale in scales if scale.device != _HOST), scales[0])
    for what, dim in (("steps", 0), ("samples", 1)):
        sizes = {scale.shape[dim] for scale in scales} - {1}
        if len(sizes) > 1:
            raise ValueError(f"guidance_scales: expected scales for as many {what} everywhere, got {sorted(sizes)}")
    return torch.stack(
        torch.broadcast_tensors(*(torch.as_tensor(c, dtype=like.dtype, device=like.device) for c in columns)), -1
    )


def _scale(name: str, value: Scale) -> float | Tensor:
    """A scale as a number, or as a tensor of shape (steps or 1, batch or 1): float64 on the host, else float32."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{name}: expected a finite number (in float32), got {value}")
        return float(value)
    if isinstance(value, Tensor):
        if value.requires_grad or value.dtype == torch.bool or value.is_complex():
            got = "one that requires grad" if value.requires_grad else f"one of {value.dtype}"
            raise TypeError(f"{name}: expected a tensor of real numbers without grad, got {got}")
        scale = value.to(torch.float64 if value.device == _HOST else torch.float32)
    elif not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: expected a number, a sequence of numbers or a tensor, got {type(value).__name__}")
    else:
        try:
            scale = torch.tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: expected a sequence of numbers, got {value!r}") from error
    if scale.dim() > 2 or scale.numel() == 0:
        raise ValueError(
            f"{name}: expected a number, shape (batch,), (steps, 1) or (steps, batch), got shape {_shape(scale)}"
        )
    if scale.device == _HOST and not bool((scale.abs() <= _LARGEST).all()):
        bad = next(v for v in scale.flatten().tolist() if not abs(v) <= _LARGEST)
        raise ValueError(f"{name}: expected finite values (in float32), got {bad}")
    return scale.reshape(1, -1) if scale.dim() < 2 else scale


def _per_step(name: str, value: Sequence[float] | Tensor) -> Tensor:
    scale = _scale(name, value)
    if not isinstance(scale, Tensor) or scale.shape[0] != 1:
        got = scale if not isinstance(scale, Tensor) else f"shape {_shape(scale)}"
        raise ValueError(f"{name}: expected one number a step, shape (steps,), got {got}")
    return scale.reshape(-1, 1)


def _common(what: str, first: int, second: int) -> int:
    if first != second and 1 not in (first, second):
        raise ValueError(f"guidance: expected as many scales per {what} in both parts, got {first} and {second}")
    return max(first, second)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
