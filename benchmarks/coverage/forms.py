"""Say in which form a pipeline computes guidance, and whether fastguide's tracer can leave that form to the step.

What the tracer fuses is in ``FUSED_FORMS`` and ``SEEN_THROUGH``, and nowhere else: change them as it grows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fastguide.diffusers import tracing

from .reading import X0_OF_A_STEP, Step
from .values import MASK, PER_FRAME, Node, same

FUSED_FORMS: dict[str, bool] = {
    "none": True,  # one prediction, which the step takes as it is
    "embedded": True,  # the scale is an input of the model, so there is one prediction too
    "u + s(c - u)": True,
    "c + s(c - u)": True,
    "weights": True,  # (1 + s) c - s u, multiplied out
    "lerp": True,
    "scale per frame": True,  # by schedulers that count their steps, and keep nothing of earlier ones
    "rescaled": True,  # to each sample's standard deviation of c; most pipelines do so only on demand
    "norm rescaled": True,  # to the norm of c, of each token or row
    "adaptive projected": True,  # of each channel, in a pipeline itself
    "perturbed attention": True,
    "several conditions": True,  # a sum of more than two predictions
    "more conditions": False,  # what is none, or of as many as there are edits
    "extra passes": False,  # of a model with parts left out: spatio-temporal, self-attention guidance
    "own guider": True,  # of diffusers.guiders, in the pipeline
    "other": False,
    "not found": False,  # no step, or its model output was not followed
}
"""The forms of guidance, and whether they are left to the step."""

SEEN_THROUGH: frozenset[str] = frozenset(
    (
        *(
            f"{change} {when}"
            for change in ("cast", "slice", "split", "negate", "shape", "sum", "multiple", "masked")
            for when in ("before", "after")
        ),
        *(  # of what is made by its norms, which is made ahead of the step then
            f"{change} after {form}"
            for change in ("slice", "split", "shape", "masked")
            for form in ("rescaling", "norms")
        ),
        *("conditional first", "not in halves", "halves of two calls"),
        "zeros_like before",  # of Cosmos 3, in the place of a prediction whose mask leaves nothing
        f"{X0_OF_A_STEP} before",  # of EDM's Euler, whose x_0 is traced
        "another output before",  # of unCLIP's priors, whose only output has another name
        "one by one before",  # of a tuple of outputs
        "batch_step_no_noise, not step",  # of parallel schedulers: steps of several timesteps, one a sample
    )
)
"""Changes of a prediction, before guidance or after it, that end no tracing: see ``Guidance.changes``."""

TRACED_MODELS: tuple[str, ...] = tracing._MODELS
"""The attributes of a pipeline whose outputs are traced."""

_FUNCTIONS = {
    "rescale_noise_cfg": "rescaled",
    "normalized_guidance": "adaptive projected",
    "lerp": "lerp",
    "norm": "norm rescaled",
}
_OPERATORS = frozenset(("Add", "Sub", "Mult", "Div", "FloorDiv", "Mod", "Pow", "MatMult"))
_TRANSPARENT = frozenset(("output", "either", "call", "embedded", "scale"))


@dataclass(frozen=True)
class Guidance:
    """How one step's model output was made of the predictions."""

    form: str
    """One of ``FUSED_FORMS``."""
    calls: str = ""
    """``"one call"`` of the model for both predictions, or ``"two calls"``."""
    changes: tuple[str, ...] = ()
    """What else was done to the predictions, ``"before"`` guidance or ``"after"`` it."""

    @property
    def fused(self) -> bool:
        """Whether the step does it."""
        return FUSED_FORMS[self.form] and not set(self.changes) - SEEN_THROUGH


def guidance_of(step: Step, methods: Iterable[str] = ()) -> Guidance:
    """Return how a step's model output was made.

    Args:
        step: the call of the scheduler.
        methods: the names of the pipeline's methods, which name the guidance that has more than two predictions.
    """
    own = () if step.method == "step" else (f"{step.method}, not step",)
    if step.output is None:
        return Guidance("not found", changes=own)
    nodes = list(step.output.walk())
    form = _particular(nodes)
    if form == "rescaled":
        return Guidance(form, changes=(*_after_rescaling(step.output), *own))
    if form == "norm rescaled":
        return Guidance(form, changes=(*_after_norms(step.output), *own))
    predictions = _predictions(nodes)
    if form is None and len(predictions) > 2:
        form = _of_more_than_two(nodes, methods)
    whole = next((node for node in nodes if _plain_form(node)), None)
    if form is None and whole is not None:
        return _plain(step.output, whole, own)
    if form is None and len(predictions) == 1:
        embedded = any(node.kind == "embedded" for node in nodes)
        return Guidance("embedded" if embedded else "none", changes=own)
    return Guidance(form or _of_two(nodes), changes=own)


def _particular(nodes: Sequence[Node]) -> str | None:
    """Return a form that a function or a scale gives away."""
    for node in nodes:
        if node.kind == "guider":
            return "own guider"
        if node.kind == "function" and node.detail in _FUNCTIONS:
            return _FUNCTIONS[node.detail]
        if node.kind == "scale" and node.detail == PER_FRAME.note:
            return f"scale {node.detail}"
        if node.kind == "part" and node.detail.endswith("?"):
            return "more conditions"
    return None


def _after_rescaling(output: Node) -> Iterator[str]:
    """Yield what is done to a rescaled prediction, whose deviations are of the whole, that its step cannot do."""
    rescaled = next(node for node in output.walk() if _FUNCTIONS.get(node.detail) == "rescaled")
    inside = {id(node) for node in rescaled.walk()}
    changes = dict.fromkeys(_change(node) for node in output.walk() if id(node) not in inside)
    for change in changes:
        if change not in ("", "cast", "negate", "sum", "multiple"):
            yield f"{change} after rescaling"


def _after_norms(output: Node) -> Iterator[str]:
    """Yield what is done to a prediction with a factor for each token, which are those of the sample's shape."""
    norms = [node for node in output.walk() if node.kind == "function" and node.detail == "norm"]
    inside = {id(node) for norm in norms for node in norm.walk()}
    for change in dict.fromkeys(_change(node) for node in output.walk() if id(node) not in inside):
        if change in ("slice", "split", "shape"):
            yield f"{change} after norms"


def _of_more_than_two(nodes: Sequence[Node], methods: Iterable[str]) -> str:
    names = " ".join(methods)
    if "perturbed_attention" in names:
        return "perturbed attention"
    if re.search(r"spatio_temporal|modality_isolation|sag_", names):
        return "extra passes"
    return "several conditions" if all(_is_linear(node) for node in nodes) else "more conditions"


_LINEAR = frozenset(
    ("Add", "Sub", "another output", "cast", "negate", "part", "shape", "slice", "split", *_TRANSPARENT)
)


def _is_linear(node: Node) -> bool:
    return node.kind in _LINEAR or (node.kind in ("Mult", "Div") and bool(_operands(node, "scale")))


def _of_two(nodes: Sequence[Node]) -> str:
    weighted = [node for node in nodes if node.kind == "Mult" and _operands(node, "scale")]
    sums = [node for node in nodes if node.kind in ("Add", "Sub") and all(part in weighted for part in node.parts)]
    return "weights" if sums else "other"


def _predictions(nodes: Sequence[Node]) -> list[Node]:
    """Return the different predictions: parts of a batch, and outputs that no part is of."""
    parts = [node for node in nodes if node.kind == "part"]
    batched = {id(call) for part in parts for call in part.walk() if call.kind == "call"}
    outputs = [node for node in nodes if node.kind == "call" and id(node) not in batched]
    named = {(part.detail, *(id(call) for call in part.walk() if call.kind == "call")): part for part in parts}
    return [*named.values(), *outputs]


def _operands(node: Node, kind: str) -> list[Node]:
    return [part for part in node.parts if part.kind == kind]


def _plain_form(node: Node) -> tuple[str, Node, Node] | None:
    """Return the form of ``u + s(c - u)`` or ``c + s(c - u)``, with u and c, if the node is one."""
    if node.kind != "Add" or len(node.parts) != 2:
        return None
    for base, scaled in (node.parts, node.parts[::-1]):
        differences = _operands(scaled, "Sub") if scaled.kind == "Mult" and _operands(scaled, "scale") else []
        for difference in differences:
            cond, uncond = difference.parts
            if same(base, uncond):
                return "u + s(c - u)", uncond, cond
            if same(base, cond):
                return "c + s(c - u)", uncond, cond
    return None


def _plain(output: Node, whole: Node, own: tuple[str, ...]) -> Guidance:
    found = _plain_form(whole)
    assert found is not None
    form, uncond, cond = found
    before = [node for operand in (uncond, cond) for node in operand.walk()]
    inside = {id(node) for node in whole.walk()}
    after = [node for node in output.walk() if id(node) not in inside]
    calls = [{id(node) for node in operand.walk() if node.kind == "call"} for operand in (uncond, cond)]
    one = calls[0] == calls[1]
    changes = [
        *(f"{change} before" for node in before if (change := _change(node))),
        *_untraced(before),
        *_halves(uncond, cond, one),
        *(f"{change} after" for node in after if (change := _change(node))),
        *own,
    ]
    return Guidance(form, "one call" if one else "two calls", tuple(dict.fromkeys(changes)))


def _change(node: Node) -> str:
    """Return in a word what a node does to a prediction; nothing, if it is the prediction."""
    if node.kind in _TRANSPARENT or node.kind == "part":
        return ""
    if node.kind in ("Add", "Sub") and _operands(node, "scale"):
        return "sum"  # with another tensor, such as the latents
    if node.kind in ("Mult", "Div") and (factors := _operands(node, "scale")):
        return "masked" if any(factor.detail == MASK.note for factor in factors) else "multiple"
    if node.kind in _OPERATORS:
        return "arithmetic"
    return node.detail if node.kind == "function" else node.kind


def _untraced(before: Sequence[Node]) -> list[str]:
    models = {name for node in before if node.kind == "call" for name in node.detail.split(" or ")}
    return [f"{name} is not traced" for name in sorted(models - set(TRACED_MODELS))]


def _halves(uncond: Node, cond: Node, one: bool) -> list[str]:
    """Return what is wrong with the parts of a call: they must be the halves of its batch, unconditional first."""
    details = [[node.detail for node in operand.walk() if node.kind == "part"] for operand in (uncond, cond)]
    if not one:
        return ["halves of two calls"] if any(details) else []
    if details in ([[], []], [["0 of 2"], ["1 of 2"]]):
        return []
    return ["conditional first"] if details == [["1 of 2"], ["0 of 2"]] else ["not in halves"]
