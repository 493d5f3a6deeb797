"""Guidance whose weights are functions of the predictions' moments: the base of such, and anyone's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .._counts import check_count
from .formulas import check_space
from .groups import Dim, dims_of
from .moment_weights import MomentWeights
from .momentum import AddedUp
from .scales import Scale, as_scale, stand_in_columns
from .spaces import TableSpace
from .symbols import Space, Vector
from .weights import Guidance


class FromMoments(Guidance):
    """Guidance that a function of vectors defines; see ``as_guidance``.

    Args:
        function: called with ``v`` and the parameters and options, by name; returns the guided prediction, a vector.
        num_predictions: number of predictions.
        parameters: by name, each what ``ClassifierFree`` takes as a scale.
        options: by name, what is the same for all steps and samples.
        space: what the function gets predictions as: ``"prediction"``, ``"original"``, x_0, or of ``space_of``.
        added_up: what a loop's steps add up, the first of the predictions; ``None``: nothing.
        dims: the dimensions that norms and inner products are over, see ``dims_of``.
    """

    def __init__(
        self,
        function: Callable[..., Vector],
        num_predictions: int,
        parameters: Mapping[str, Scale],
        options: Mapping[str, Any] | None = None,
        space: Space | TableSpace = "prediction",
        added_up: AddedUp | None = None,
        dims: tuple[int, ...] | None = None,
    ) -> None:
        check_space(space)
        scales = {name: as_scale(name, value) for name, value in parameters.items()}
        made = MomentWeights.of(function, num_predictions, scales, options, space, added_up is not None, dims)
        super().__init__(stand_in_columns(num_predictions, made.scales), None, made, added_up)


def parameters_and_options(**values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the options of a guidance: ``None`` is an option, and so is a rescale of 0."""
    rescale = values.get("guidance_rescale")
    if isinstance(rescale, (int, float)) and not isinstance(rescale, bool) and rescale == 0:
        values["guidance_rescale"] = None
    options = {name: value for name, value in values.items() if value is None}
    return {name: value for name, value in values.items() if value is not None}, options


def as_guidance(
    predictions: int, space: Space | TableSpace = "prediction", *, dim: Dim | None = None
) -> Callable[[Callable[..., Vector]], Callable[..., FromMoments]]:
    """Make a guidance of a function of vectors: it returns the guided prediction, and so defines the weights.

    The function is called once for each guidance that is made, with symbols: ``v``, which has the vectors
    ``v.predictions`` and ``v.sample`` (x_t), the number ``v.step`` of calls that the loop has made before, ``v.dot``,
    ``v.sum``, ``v.norm``, ``v.std`` of vectors, and ``v.sqrt``, ``v.exp``, ``v.minimum``, ``v.maximum`` and ``v.where``
    of numbers, one for each sample; and with its parameters. Norms and inner products are over all but the batch, or
    over ``dim``. It says which moments of the predictions it needs, and a program makes the weights of each sample from
    them at each step, on the device.

    Args:
        predictions: their number, 2 to 4, or 3 if the sample has a weight.
        space: what the function gets predictions as: ``"prediction"``, what the model predicts; or ``"original"``, the
            x_0 that each of them says, where the row says it: not from noise at alpha = 0; or what ``space_of`` a table
            returns.
        dim: the dimensions of a sample that norms, sums and inner products are over, -1 for those of each token in
            (batch, tokens, channels): see ``Normalized``. ``None``: all but the batch.

    Returns:
        The decorator. What it returns is called with the function's own parameters: a number, or one for each sample or
        step as ``ClassifierFree`` takes a scale. A parameter that is ``None``, a bool or a string is an option: it has
        that value while the function is traced, which may branch on it.

    Raises:
        TypeError: when a guidance is made: the function returns no vector, branches on a value that is not known yet,
            or does what is no operation of vectors.

    >>> @as_guidance(predictions=2)
    ... def magnitude_aware(v, guidance_scale, alpha=8.0):
    ...     uncond, cond = v.predictions
    ...     shift = cond - uncond
    ...     return uncond + (1 + (guidance_scale - 1) * v.exp(-alpha * v.norm(shift) / v.norm(uncond))) * shift
    >>> guidance = magnitude_aware([3.0, 10.0])  # a scale for each of two samples
    >>> guidance.num_predictions, guidance.batch
    (2, 2)
    """
    check_count("predictions", predictions, 2)
    dims = dims_of("dim", dim)

    def decorate(function: Callable[..., Vector]) -> Callable[..., FromMoments]:
        if not callable(function):
            raise TypeError(f"function: expected a callable, got {type(function).__name__}")
        signature = inspect.signature(function)

        @functools.wraps(function)
        def made(*arguments: Any, **keywords: Any) -> FromMoments:
            bound = signature.bind(None, *arguments, **keywords)
            bound.apply_defaults()
            values = dict(list(bound.arguments.items())[1:])
            options = {name: value for name, value in values.items() if value is None or isinstance(value, (bool, str))}
            parameters = {name: value for name, value in values.items() if name not in options}
            return FromMoments(function, predictions, parameters, options, space, dims=dims)

        return made

    return decorate
