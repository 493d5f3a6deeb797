"""``Guidance``: the weights of the predictions and of a classifier's gradient, as a step reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from .._counts import check_count
from .._token import Token
from ..schedules.predictions import GradientForm
from .intervals import Calls, calls_within
from .low_passes import LowPasses
from .moment_weights import MomentWeights
from .momentum import AddedUp
from .scales import conditional_columns, scale_columns

_HOST = torch.device("cpu")


class GradientSource(Protocol):
    """What a ``Guidance`` needs of its ``Classifier``."""

    gradient_form: GradientForm

    @property
    def takes_labels(self) -> bool: ...  # noqa: D102

    @property
    def functions(self) -> tuple[object, object]: ...  # noqa: D102

    def gradient(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor: ...  # noqa: D102


WeightsFrom: TypeAlias = Callable[[Sequence[Tensor]], Tensor] | MomentWeights


class Guidance:
    """The weights w_k of ``num_predictions`` predictions, and the scale and form of a gradient, if there is one.

    ``guidance_a + guidance_b`` uses both: predictions by the one, a classifier's gradient by the other. It never
    changes; a subclass whose weights do overrides ``weights``.

    The guided prediction is ``m = sum_k w_k p_k``. A kernel computes it anchored at the first prediction, as
    ``m = (sum_k w_k) * p_0 + sum_{k>=1} w_k * (p_k - p_0)``. That is the same number; but predictions of different
    conditions nearly agree, and their exact difference keeps the digits that ``(1 - s) * p_0 + s * p_1`` rounds away.
    So it reads ``weights(device, dtype)``, of shape ``(steps or 1, batch or 1, num_predictions + 1)``: column 0 holds
    the sum of all w_k, column k holds w_k, and the last column holds the gradient's scale s.
    """

    steps: int
    """The number of steps that the weights are given for; 1: they are the same at every step."""
    batch: int
    """The number of samples that the weights are given for; 1: they are the same for every sample."""
    num_predictions: int
    classifier: GradientSource | None
    weights_from: WeightsFrom | None
    """Makes the weights from the predictions, see ``from_predictions``; ``None``: they are constants."""

    derived: LowPasses | AddedUp | None
    """Makes further tensors of the model's predictions, which have weights as well, or adds them up over the steps of a
    loop; ``None``: there are none."""

    def __init__(
        self,
        weights: Tensor,
        classifier: GradientSource | None,
        weights_from: WeightsFrom | None = None,
        derived: LowPasses | AddedUp | None = None,
    ) -> None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: expected a tensor, got {type(weights).__name__}")
        if weights.dim() != 3 or weights.shape[2] < 2:
            got = tuple(weights.shape)
            raise ValueError(f"weights: expected shape (steps or 1, batch or 1, num_predictions + 1), got {got}")
        self.steps, self.batch, columns = weights.shape
        self._token = Token()
        """Stands for these weights where steps are remembered, which must not keep a classifier alive."""
        self.num_predictions = columns - 1
        self.classifier = classifier
        self.weights_from = weights_from
        self.derived = derived
        self.form: GradientForm | None = None if classifier is None else classifier.gradient_form
        with torch.inference_mode(False):  # or autograd could not keep them for a recorded step
            self._weights = {(weights.device, dtype): weights.to(dtype) for dtype in (torch.float32, torch.float64)}
        self._source = weights
        self._copies: dict[tuple[torch.device, torch.dtype], torch.cuda.Event] = {}
        self._of_samples: tuple[slice, Guidance] | None = None

    @classmethod
    def from_predictions(cls, weights_from: Callable[[Sequence[Tensor]], Tensor], num_predictions: int) -> Guidance:
        """Return guidance whose weights are computed from each step's predictions, such as rescaled guidance.

        Args:
            weights_from: called at every step with the predictions, unconditional first, each of the sample's shape
                (batch, ...) and of the model's dtype; returns the weights w_k, shape (batch, num_predictions). It must
                not wait for the device, and within a captured loop it runs once, like the model.
            num_predictions: number of predictions, at least 2.

        >>> def normalized(predictions):  # the guided prediction gets the norm of the conditional one
        ...     uncond, cond = predictions
        ...     guided = uncond + 5.0 * (cond - uncond)
        ...     ratio = cond.flatten(1).norm(dim=1) / guided.flatten(1).norm(dim=1)
        ...     return torch.stack([-4.0 * ratio, 5.0 * ratio], 1)
        >>> Guidance.from_predictions(normalized, 2)
        Guidance(2 predictions)
        """
        if not callable(weights_from):
            raise TypeError(f"weights_from: expected a callable, got {type(weights_from).__name__}")
        check_count("num_predictions", num_predictions, 2)
        return Guidance(scale_columns(*[1.0] * num_predictions, 0.0), None, weights_from)

    @property
    def num_conditions(self) -> int:
        """The number of conditions that the model predicts for: as many as there are weights, without derived terms."""
        return self.num_predictions - (0 if self.derived is None else self.derived.number)

    def terms(self, predictions: Sequence[Tensor]) -> list[Tensor]:
        """Return what the weights are of: the model's predictions, and what is derived from them."""
        if isinstance(self.derived, AddedUp):
            raise TypeError("guidance: expected guidance without momentum, which a step makes terms of by momentum=")
        return list(predictions) if self.derived is None else self.derived.extended(predictions)

    def of_terms(self) -> Guidance:
        """Return guidance with the same weights, whose predictions are the terms, made already."""
        return Guidance(self._source, self.classifier, self.weights_from)

    def weights(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return constant weights on a device, in float32 or float64; only the first call moves anything."""
        weights = self._weights.get((device, dtype))
        if weights is None:
            with torch.inference_mode(False), torch.set_grad_enabled(self._source.requires_grad):  # for later, too
                weights = self._weights[device, dtype] = self._copied(device, dtype)
        elif self._copies:
            self._wait_for_the_copy(device, dtype)
        return weights

    def is_constant_on(self, device: torch.device) -> bool:
        """Tell whether ``weights`` returns the same memory from now on, on this device, and nobody has to wait."""
        kind = type(self)
        ours = kind.weights is Guidance.weights and kind.weights_for is Guidance.weights_for
        return ours and not self.requires_grad and all(where != device for where, _ in self._copies)

    @property
    def requires_grad(self) -> bool:
        """Whether a scale was a tensor that requires a gradient."""
        made_by = self.weights_from
        return self._source.requires_grad or (isinstance(made_by, MomentWeights) and made_by.requires_grad)

    def with_constants(self) -> Guidance:
        """Return guidance of as many predictions, and the same classifier, that makes no weights of predictions."""
        return Guidance(self._source, self.classifier)

    def weights_for(self, predictions: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the weights of a step with these predictions: constants, or what ``weights_from`` makes of them."""
        constants = self.weights(device, dtype)
        if self.weights_from is None:
            return constants
        return self.anchored_weights(predictions, constants[..., -1:])

    def anchored_weights(self, predictions: Sequence[Tensor], gradient_scale: Tensor) -> Tensor:
        """Return what ``weights_from`` makes of the predictions, as kernels read it: (steps or 1, batch, columns).

        Args:
            predictions: one tensor for each weight, or one that holds them all along the batch.
            gradient_scale: the scale s, of shape (steps or 1, batch or 1, 1).
        """
        if self.weights_from is None or isinstance(self.weights_from, MomentWeights):
            raise TypeError("guidance: expected weights that a function makes of the predictions")
        count = self.num_predictions
        if len(predictions) == 1:
            predictions = predictions[0].unflatten(0, (count, -1)).unbind(0)
        batch = predictions[0].shape[0]
        weights = self.weights_from(predictions)
        if not isinstance(weights, Tensor) or weights.shape != (batch, count):
            got = f"shape {_shape(weights)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights_from: expected it to return shape ({batch}, {count}), got {got}")
        weights = weights.to(gradient_scale.dtype).expand(gradient_scale.shape[0], -1, -1)
        total = weights.sum(-1, keepdim=True)
        return torch.cat([total, weights[..., 1:], gradient_scale.expand(-1, batch, -1)], -1)

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
        """Let other streams than the copy's own wait for it, until it is done."""
        event = self._copies.get((device, dtype))
        # torch waits for all streams before a capture, and compiles nothing that is still under way.
        if event is None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return
        if event.query():
            del self._copies[device, dtype]
        else:
            event.wait(torch.cuda.current_stream(device))

    def steps_without_unconditional(self) -> tuple[bool, ...] | None:
        """Tell for each step whether the first prediction has no weight in any sample; one answer if all steps agree.

        ``None``: the host does not know, as the weights are on a device or made from the predictions.
        """
        if isinstance(self.weights_from, MomentWeights) and self.weights_from.active is not None:
            return tuple((~self.weights_from.active).tolist())
        if self._source.device != _HOST or self.weights_from is not None:
            return None
        first = self._source[..., 0] - self._source[..., 1 : self.num_predictions].sum(-1)
        derived = self._source[..., self.num_conditions : self.num_predictions].any(-1)  # which are made of it
        return tuple(((first == 0) & ~derived).all(1).tolist())

    @property
    def last_weights(self) -> Tensor | None:
        """What was made of the predictions last, on the device, for logging; ``None``: nothing, or not from moments.

        The sum of all weights, those of all predictions but the first, a classifier's scale, and the sample's own
        weight if it has one; shape (1, batch, num_predictions + 1 or 2), or with ``dim``
        (1, batch, groups, num_predictions + 1 or 2). The next step overwrites it. On a GPU, such guidance is for one
        stream at a time.
        """
        made_by = self.weights_from
        if not isinstance(made_by, MomentWeights) or made_by.last_weights is None:
            return None
        return made_by.last_weights if made_by.dims is None else made_by.last_weights.flatten(2, -2)

    def within(
        self, table: Calls, start: float = 0.0, stop: float = 1.0, *, sigma: tuple[float, float] | None = None
    ) -> Guidance:
        """Return this guidance in an interval of a table's calls, and the conditional prediction alone outside of it.

        Outside, a classifier has no part either. The sampler's ``skip_unconditional`` leaves the unconditional
        prediction out there (Kynkäänniemi et al. 2024, arXiv 2404.07724).

        Args:
            table: of the loop, whole; a slice of it needs guidance of its own.
            start: the fraction of the calls, 0 to 1, before the first that is guided.
            stop: the fraction of them that the last guided one ends; ``0.2, 0.8`` of 50 calls are 10 to 39.
            sigma: a low and a high noise level sigma / alpha: guided are, of these, calls above the one and up to the
                other. The table has to know its levels.

        Raises:
            ValueError: a bound is not as described, or the scales are for another number of steps.
            TypeError: the weights are made by ``from_predictions``: the function itself may tell steps apart.

        >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
        >>> guidance = ClassifierFree(7.5).within(ddim(NoiseSchedule.linear(), 10), 0.2, 0.8)
        >>> guidance.steps, sum(guidance.steps_without_unconditional())
        (10, 4)
        """
        active = calls_within(table, start, stop, sigma)
        if self.steps not in (1, len(active)):
            raise ValueError(f"table: expected as many calls as there are scales, {self.steps}, got {len(active)}")
        inside = active.view(-1, 1, 1).to(self._source.device)
        conditional = conditional_columns(self.num_predictions).to(self._source)
        weights = torch.where(inside, self._source, conditional)
        if self.weights_from is None:
            return Guidance(weights, self.classifier, derived=self.derived)
        if not isinstance(self.weights_from, MomentWeights):
            raise TypeError("guidance: expected weights that are no function's of the predictions, to be left out")
        return Guidance(weights, self.classifier, self.weights_from.where(active), self.derived)

    def of_samples(self, samples: slice) -> Guidance:
        """Return the guidance of some samples: itself where the weights are the same for every sample.

        Otherwise one that is made anew where other samples are asked for than at the last time.

        Raises:
            TypeError: a subclass makes the weights, one for each sample, itself.

        >>> from fastguide import ClassifierFree
        >>> ClassifierFree([1.0, 5.0, 7.5]).of_samples(slice(1, 3)).batch
        2
        """
        if self.batch == 1:
            return self
        if type(self).weights is not Guidance.weights:
            raise TypeError(f"guidance: expected weights that stay as they are, to take some of, got {self!r}")
        if self._of_samples is None or self._of_samples[0] != samples:
            made = self.weights_from
            made = made.of_samples(samples) if isinstance(made, MomentWeights) else made
            self._of_samples = samples, Guidance(self._source[:, samples], self.classifier, made, self.derived)
        return self._of_samples[1]

    def __add__(self, other: Guidance) -> Guidance:
        """Return guidance with the prediction weights of one operand and the classifier's gradient of the other."""
        if not isinstance(other, Guidance):
            return NotImplemented
        if self.classifier is not None and other.classifier is not None:
            raise ValueError("guidance: expected at most one Classifier, got two; add their gradients in one grad_fn")
        if self.num_predictions > 1 and other.num_predictions > 1:
            raise ValueError("guidance: expected one set of prediction weights, got two; use Composed for several")
        mine = self.num_predictions > 1 or (other.num_predictions == 1 and other.classifier is not None)
        first, second = (self, other) if mine else (other, self)
        shape = [_common("step", first.steps, second.steps), _common("sample", first.batch, second.batch)]
        device = first._source.device if first._source.device != _HOST else second._source.device
        left, right = (g._source.to(device).expand(*shape, -1) for g in (first, second))
        weights = torch.cat([left[..., :-1], left[..., -1:] + right[..., -1:]], -1)
        return Guidance(weights, first.classifier or second.classifier, first.weights_from, first.derived)

    def __repr__(self) -> str:
        form = "" if self.form is None else f", gradient form {self.form!r}"
        made_by = self.weights_from
        dims = made_by.dims if isinstance(made_by, MomentWeights) else None
        over = "" if dims is None else f", dim={dims[0] if len(dims) == 1 else dims}"
        return f"{type(self).__name__}({self.num_conditions} predictions{over}{form})"


def _common(what: str, first: int, second: int) -> int:
    if first != second and 1 not in (first, second):
        raise ValueError(f"guidance: expected as many scales per {what} in both parts, got {first} and {second}")
    return max(first, second)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


UNGUIDED = Guidance(scale_columns(1.0, 0.0), None)
"""No guidance: the model's single prediction."""
