"""Take apart what a pipeline has combined of its model's outputs: predictions, and the weights that guidance has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .channel_weights import of_channels
from .formula import VECTOR, Formula, general
from .guided import Guided
from .halves import OfHalves
from .joined import Doubled, Joined
from .known import taken_again
from .lazy_tensor import plain
from .taken import Output, PerFrame, Taken, Weights
from .traced import EXACT, Combined, Scale, Term, Traced, leading
from .weights_of_formula import taken_apart as formula_taken_apart


def resolved(output: Any, sample: Tensor, guidance_scale: Any, *, per_frame: bool = False) -> tuple[Output, Any]:
    """Return a step's model output and guidance scale; guidance that was left to the step is taken apart into both.

    Args:
        output, sample, guidance_scale: of ``step``.
        per_frame: whether a scale may be ``PerFrame``; guidance with such is computed otherwise.

    Returns:
        The output, and the scale of the halves of its batch, that of its two predictions, the ``Weights`` of several,
        a guider's guidance, or ``None``.

    Raises:
        TypeError: the output or the sample is no tensor.
        RuntimeError: the output was written to after guidance had been taken from it.
    """
    if type(output) is Tensor and isinstance(sample, Tensor):
        return output, guidance_scale
    sample = plain(sample)
    if not isinstance(sample, Tensor):
        raise TypeError(f"sample: expected a tensor, got {type(sample).__name__}")
    if type(output) is OfHalves:
        whole, shape = output.uncond.source.tensor, sample.shape
        if guidance_scale is None and output.is_whole() and whole.shape == (2 * shape[0], *shape[1:]):
            return whole, output.scale
        output = output.combined()
    taken = taken_apart(output, sample) if guidance_scale is None else None
    if taken is not None and (per_frame or type(taken[1]) is not PerFrame):
        return taken
    output = plain(output, "the step, which does not take it apart")
    if not isinstance(output, Tensor):
        hint = "; its .sample is one" if isinstance(getattr(output, "sample", None), Tensor) else ""
        hint = "; its [0] is one" if isinstance(output, tuple) and output and isinstance(output[0], Tensor) else hint
        raise TypeError(f"model_output: expected a tensor, got {type(output).__name__}{hint}")
    return output, guidance_scale


def taken_apart(output: Any, sample: Tensor) -> tuple[Output, Any] | None:
    """Return the predictions of what waits for a step, and what weighs them; ``None``: it is computed otherwise.

    Args:
        output: of a pipeline or guider.
        sample: has the shape that each prediction is to have.

    Returns:
        As ``resolved``; a scale may be ``PerFrame``.

    Raises:
        RuntimeError: it was written to after guidance had been taken from it.
    """
    return taken_again(output, sample, _taken_apart)  # type: ignore[no-any-return]


def _taken_apart(output: Any, sample: Tensor) -> tuple[Output, Any] | None:
    output = general(output)
    kind = type(output)
    if kind is Guided and output.is_pending() and output.shape == sample.shape:
        output.check_unchanged()
        return Taken(output.predictions, None, output.dtype), output.guidance
    if kind in (Combined, Doubled, Joined) and output.is_pending():
        return _terms_of(output, sample)
    if kind is Traced and output.source.guides and output.shape == sample.shape:
        return Taken((output.value(),), None, output.dtype), Weights((1.0,))
    if kind is Formula and output.is_pending() and output.kind == VECTOR and output.sizes == sample.shape:
        made = formula_taken_apart(output, sample)
        if made is not None:
            predictions, guidance = made
            if isinstance(predictions, Tensor):
                return predictions, guidance
            return Taken(predictions, None, output.dtype), guidance
    return None


def _terms_of(output: Combined | Doubled | Joined, sample: Tensor) -> tuple[Output, Any] | None:
    """Return the predictions of a combination, and what weighs them; ``None``: they are not of the sample's shape."""
    output.check_unchanged()
    channels = of_channels(output, sample) if type(output) is Joined else None
    if channels is not None:
        return Taken(channels[0], None, output.dtype), PerFrame(channels[1], 2)
    joined = output.main if type(output) is Joined else output
    main = joined.main if type(joined) is Doubled else joined
    assert type(main) is Combined
    terms, scale_tensor = _present(main.terms), None if main.scale is None else main.scale.tensor
    if len(main.seen) == 1 and len(terms) > 1 and all([of.piece is not None for of, _, _ in terms]):  # noqa: C419
        terms = tuple(sorted(terms, key=_piece_of))
    elif len(main.seen) > 1 and not terms[0][0].source.is_output:  # differences to the latents would round more
        terms = tuple(sorted(terms, key=lambda term: not term[0].source.is_output))
    scale = _scale_of(terms, scale_tensor)
    if scale is not None and main is output and terms[0][0].piece == (0, 2) and terms[1][0].piece == (1, 2):
        source = terms[0][0].source
        whole, shape = source.tensor, sample.shape
        if terms[1][0].source is source and main.dtype is source.dtype and whole.shape == (2 * shape[0], *shape[1:]):
            return whole, scale
    predictions = tuple([of.value() for of, *_ in terms])
    if type(joined) is Doubled:
        predictions = tuple([_twice(each) for each in predictions])
    if any(prediction.shape != sample.shape for prediction in predictions):
        return None
    variance = output.rest.value() if type(output) is Joined else None
    if variance is not None and variance.shape != sample.shape:
        return None
    taken = Taken(predictions, variance, main.dtype)
    if scale is not None:
        return taken, scale
    if scale_tensor is not None and leading(scale_tensor) > 1:
        return None
    constants = tuple([constant for _, constant, _ in terms])
    is_guidance = len(terms) > 1 and terms[-1][0].source.is_output
    is_guidance = is_guidance or sum([of.source.outputs() for of, *_ in terms]) > 1
    if scale_tensor is None:
        if constants == (1.0,) and variance is None and main.dtype == predictions[0].dtype and not is_guidance:
            return predictions[0], None
        return taken, Weights(constants, is_guidance=is_guidance)
    return taken, Weights(constants, tuple([factor for _, _, factor in terms]), scale_tensor, is_guidance)


def _present(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Return the terms but those of tensors that were added, and taken away again."""
    if all([of.source.is_output for of, _, _ in terms]):  # noqa: C419
        return terms
    return tuple([term for term in terms if term[0].source.is_output or max(map(abs, term[1:])) > EXACT]) or terms[:1]


def _twice(prediction: Tensor) -> Tensor:
    """Return a prediction twice along the batch: of one sample, without a copy."""
    return prediction.expand(2, *prediction.shape[1:]) if len(prediction) == 1 else torch.cat([prediction, prediction])


def _piece_of(term: Term) -> tuple[int, int]:
    piece = term[0].piece
    assert piece is not None
    return piece


def _scale_of(terms: tuple[Term, ...], scale: Tensor | None) -> Scale | PerFrame | None:
    """Return the scale of two predictions' classifier-free guidance, the first one being the unconditional."""
    if len(terms) != 2 or not terms[1][0].source.is_output:
        return None
    (_, first, first_factor), (_, second, second_factor) = terms
    if scale is None:
        return second if abs(first + second - 1) <= EXACT else None
    if (first, first_factor, second, second_factor) == (1.0, -1.0, 0.0, 1.0):
        return scale.reshape(-1) if leading(scale) < 2 else PerFrame(scale.reshape(-1), leading(scale))
    return None
