"""Follow the predictions of a pipeline's models to the scheduler's step, through the source of its methods.

Guidance is on, negative prompts are given, and other arguments have their defaults. A loop is read once. What a test
leaves open is read both ways.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .sources import Source, default_values
from .values import (
    ABOUT,
    MASK,
    PER_FRAME,
    SHAPES,
    SPLITS,
    UNKNOWN,
    ZEROS,
    Component,
    Function,
    Known,
    Many,
    Node,
    Unknown,
    Value,
    any_of,
    joined,
    merged,
    nodes_in,
    of_tensor,
    operation,
    output_of,
    taken,
)

X0_OF_A_STEP = "the scheduler's step"
"""What a function is called that makes the second of what a step returns."""

_DEEPEST = 6  # calls of methods within one another
_GUIDANCE_IS_ON = re.compile(
    r"^_?(prior_)?(do|is|use|apply)?_?(classifier_free_guidance|true_cfg|cfg|perturbed_attention_guidance)$"
)
_SCALE = re.compile(r"(guidance|cfg)_scale(_\w+)?$")
_MASK = re.compile("mask|indicator")
_TRUE_CFG = re.compile(r"true_cfg_scale$")
_STEP = re.compile(r"^(batch_)?step(_\w+)?$")
_NEGATIVE = re.compile(r"^neg(ative)?_|^has_neg_prompt$")
_NO_DENOISER = re.compile(
    "encoder|token|vae|vocoder|safety|extractor|processor|connector|controlnet|adapter|qformer|project|embed|normalizer"
    "|text_|guide_|watermark|upsampl|upscal"
)
_EMBEDDED = ("guidance", "guidance_scale", "cfg_scale", "timestep_cond")
_SETTLED = {  # tests that a model's configuration decides, in the pipelines whose names begin so
    ("EasyAnimate", "noise_pred.size()[1] != self.vae.config.latent_channels"): False,  # 16 channels each
    ("PixArt", "self.transformer.config.out_channels // 2 == latent_channels"): True,  # 8 and 4: a variance is learned
    ("Sana", "self.transformer.config.out_channels // 2 == latent_channels"): False,  # 32 each
}
_NO_TENSOR = frozenset(("len", "isinstance", "range", "print", "id", "type", "hasattr", "getattr"))
_COMPARISONS = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


@dataclass(frozen=True)
class Step:
    """A call of a scheduler's step."""

    scheduler: str
    method: str
    """``"step"``, or another that the scheduler has."""
    output: Node | None
    """The model output that it is given, if that was followed."""


@dataclass
class _Frame:
    """The variables of one call of a method."""

    names: dict[str, Value]
    returned: list[Value] = field(default_factory=list)


def read_steps(source: Source, true_cfg: bool = False) -> list[Step]:
    """Return the steps that ``__call__`` makes, or, if it makes none, the first other method that makes one.

    Args:
        source: the pipeline's.
        true_cfg: guidance by a second call is on in pipelines whose model has the scale as an input; otherwise it is
            as its default says.
    """
    names = ["__call__", *(name for name in source.methods if not name.startswith("__"))]
    for name in names:
        if name in source.methods:
            reader = _Reader(source, true_cfg)
            reader.call(source.methods[name], (), {})
            if reader.steps:
                return reader.steps
    return []


class _Reader:
    """Reads a pipeline's methods; ``steps`` are the calls of its schedulers."""

    def __init__(self, source: Source, true_cfg: bool) -> None:
        self.steps: list[Step] = []
        self._source = source
        self._true_cfg = true_cfg
        self._arguments = source.arguments()
        self._attributes: dict[str, Value] = {}
        self._depth = 0

    def call(
        self,
        function: ast.FunctionDef,
        given: Sequence[Value],
        named: Mapping[str, Value],
        outer: Mapping[str, Value] | None = None,
    ) -> Value:
        """Read a call of a function, in which the names of an outer one are known; return what it returns."""
        if self._depth >= _DEEPEST:
            return UNKNOWN
        arguments = [a.arg for a in (*function.args.posonlyargs, *function.args.args) if a.arg != "self"]
        frame = _Frame(dict(outer or {}))
        frame.names |= {name: Known(value) for name, value in default_values(function).items()}
        frame.names |= {**dict(zip(arguments, given, strict=False)), **named}
        self._depth += 1
        self._run(function.body, frame)
        self._depth -= 1
        return any_of(Many(frame.returned))

    # ---- statements ----

    def _run(self, body: Sequence[ast.stmt], frame: _Frame) -> bool:
        """Read statements; tell whether they end in a return, raise, continue or break."""
        return any(self._statement(statement, frame) for statement in body)

    def _statement(self, node: ast.stmt, frame: _Frame) -> bool:
        match node:
            case ast.Assign(targets=targets, value=expression):
                value = self._value(expression, frame)
                for target in targets:
                    self._assign(target, value, frame)
            case ast.AnnAssign(target=target, value=ast.expr() as expression):
                self._assign(target, self._value(expression, frame), frame)
            case ast.AugAssign(target=ast.Name() | ast.Attribute() as target, op=op, value=expression):
                self._assign(target, self._value(ast.BinOp(target, op, expression), frame), frame)
            case ast.Expr(value=expression):
                self._value(expression, frame)
            case ast.Return(value=returned):
                frame.returned.append(UNKNOWN if returned is None else self._value(returned, frame))
                return True
            case ast.Raise() | ast.Continue() | ast.Break():
                return True
            case ast.If():
                return self._if(node, frame)
            case ast.For(target=target, iter=iterated, body=body):
                self._assign(target, any_of(self._value(iterated, frame)), frame)
                self._run(body, frame)
            case ast.While(body=body):
                self._run(body, frame)
            case ast.With(body=body):
                return self._run(body, frame)
            case ast.Try(body=body, finalbody=last):
                return self._run([*body, *last], frame)
            case ast.FunctionDef(name=name):
                frame.names[name] = Function(node)
        return False

    def _if(self, node: ast.If, frame: _Frame) -> bool:
        truth = self._truth(node.test, frame)
        if truth is not None:
            body, other = (node.body, node.orelse) if truth else (node.orelse, node.body)
            refuses = bool(body) and isinstance(body[-1], ast.Raise)  # the caller gives what is asked for
            return self._run(other if refuses else body, frame)
        before, attributes = dict(frame.names), dict(self._attributes)
        ended = self._run(node.body, frame)
        names, changed = frame.names, self._attributes
        frame.names, self._attributes = before, attributes
        other_ended = self._run(node.orelse, frame)
        if ended:
            return other_ended
        if other_ended:
            frame.names, self._attributes = names, changed
        else:
            frame.names, self._attributes = merged(names, frame.names), merged(changed, self._attributes)
        return False

    def _assign(self, target: ast.expr, value: Value, frame: _Frame) -> None:
        match target:
            case ast.Name(id=name):
                frame.names[name] = value
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name not in self._arguments:
                self._attributes[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for number, part in enumerate(targets):
                    self._assign(part, taken(value, number, len(targets)), frame)
            case ast.Starred(value=part):
                self._assign(part, UNKNOWN, frame)
            case ast.Subscript(value=ast.Name(id=name)):
                before = frame.names.get(name, UNKNOWN)
                parts = nodes_in(before, value)
                if parts and not isinstance(before, Many):
                    frame.names[name] = Node("written", parts)

    # ---- expressions ----

    def _value(self, node: ast.expr, frame: _Frame) -> Value:
        match node:
            case ast.Constant(value=literal):
                return Known(literal)
            case ast.Name(id=name):
                return frame.names.get(name, UNKNOWN)
            case ast.Attribute():
                return self._attribute(node, frame)
            case ast.Subscript():
                return self._subscript(node, frame)
            case ast.Call():
                return self._called(node, frame)
            case ast.BinOp(left=left, op=op, right=right):
                return operation(type(op).__name__, self._operand(left, frame), self._operand(right, frame))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                parts = nodes_in(self._value(operand, frame))
                return Node("negate", parts) if parts else UNKNOWN
            case ast.IfExp(test=test, body=body, orelse=other):
                truth = self._truth(test, frame)
                if truth is not None:
                    return self._value(body if truth else other, frame)
                return joined(self._value(body, frame), self._value(other, frame))
            case ast.Compare() | ast.BoolOp() | ast.UnaryOp():
                truth = self._truth(node, frame)
                unknown = MASK if isinstance(node, ast.Compare) else UNKNOWN
                return unknown if truth is None else Known(truth)
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                return Many([self._value(e, frame) for e in elements])
            case (
                ast.ListComp(elt=element, generators=[ast.comprehension(target=target, iter=iterated), *_])
                | ast.GeneratorExp(elt=element, generators=[ast.comprehension(target=target, iter=iterated), *_])
            ):
                inner = _Frame(dict(frame.names))
                self._assign(target, any_of(self._value(iterated, frame)), inner)
                return Many([self._value(element, inner)])
        return UNKNOWN

    def _operand(self, node: ast.expr, frame: _Frame) -> Value:
        """Return an operand's value; one without predictions that is named so is a mask."""
        value = self._value(node, frame)
        return MASK if isinstance(value, Unknown) and not value.note and _MASK.search(ast.unparse(node)) else value

    def _attribute(self, node: ast.Attribute, frame: _Frame) -> Value:
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return self._own(node.attr)
        if ast.unparse(node.value) == "self.config":
            default = self._arguments.get(node.attr, (None, ...))[1]
            return UNKNOWN if default is ... else Known(default)
        value = self._value(node.value, frame)
        if not isinstance(value, Node) or node.attr in ABOUT:
            return UNKNOWN
        if value.kind == "call":
            return output_of(value) if node.attr == "sample" else Node("another output", (value,), node.attr)
        return Node("function", (value,), node.attr)

    def _own(self, name: str) -> Value:
        """Return an attribute of the pipeline itself."""
        if name in self._attributes:
            return self._attributes[name]
        if self._source.is_property(name):
            return self.call(self._source.methods[name], (), {})
        return Component((name,)) if name in self._arguments else UNKNOWN

    def _subscript(self, node: ast.Subscript, frame: _Frame) -> Value:
        value = self._value(node.value, frame)
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if isinstance(value, Node):
            if value.kind == "call" and index == "sample":
                return output_of(value)
            if isinstance(index, int) and value.kind in ("call", "split", "batch"):
                return taken(value, index)
            return Node("slice", (value,), ast.unparse(node.slice))
        return taken(value, index) if isinstance(index, int) else any_of(value)

    # ---- calls ----

    def _called(self, node: ast.Call, frame: _Frame) -> Value:
        given = [self._value(a.value if isinstance(a, ast.Starred) else a, frame) for a in node.args]
        named = {k.arg: self._value(k.value, frame) for k in node.keywords if k.arg is not None}
        if ast.unparse(node.func) == "torch.zeros_like" and not nodes_in(*given):
            return ZEROS
        if ast.unparse(node.func) == "torch.linspace" and "guidance_scale" in ast.unparse(node):
            return PER_FRAME
        if isinstance(node.func, ast.Attribute):
            return self._method(node.func, given, named, frame)
        called = self._value(node.func, frame)
        return self._object(ast.unparse(node.func), called, given, named, frame)

    def _method(self, func: ast.Attribute, given: list[Value], named: dict[str, Value], frame: _Frame) -> Value:
        name, owner = func.attr, ast.unparse(func.value)
        if owner in ("self", "super()"):
            if name in self._source.methods and not self._source.is_property(name):
                return self.call(self._source.methods[name], given, named)
            return self._object(name, self._own(name), given, named, frame)
        value = self._value(func.value, frame)
        if _STEP.match(name) and "scheduler" in owner:
            return self._step(value, owner, name, given, named)
        if isinstance(value, Component):
            return self._object(owner, value, given, named, frame) if name == "forward" else UNKNOWN
        if isinstance(value, Many) and name in ("append", "extend"):
            value.elements += given
            return UNKNOWN
        if isinstance(value, Node):
            return of_tensor(value, name, given, named)
        parts = nodes_in(*given, *named.values())
        if not parts:
            return PER_FRAME if PER_FRAME in (value, *given) else UNKNOWN
        if owner in ("torch", "np") and name in ("chunk", *SPLITS):
            return of_tensor(parts[0], name, given[1:], named)
        return Node("shape" if name in SHAPES else "function", parts, name)

    def _object(self, name: str, called: Value, given: list[Value], named: dict[str, Value], frame: _Frame) -> Value:
        """Return what comes of calling something by its name: a model, a function within the method, another."""
        if isinstance(called, Component):
            if "guider" in called.names[0]:
                return Node("guider")
            return UNKNOWN if _NO_DENOISER.search(called.names[0]) else _call_of(called, named)
        if isinstance(called, Function):
            return self.call(called.tree, given, named, frame.names)
        if name in ("list", "tuple") and len(given) == 1:
            return given[0]
        if name == "zip":
            return Many([Many([any_of(value) for value in given])])
        if name == "enumerate" and given:
            return Many([Many([UNKNOWN, any_of(given[0])])])
        parts = () if name in _NO_TENSOR else nodes_in(*given, *named.values())
        if not parts:
            return PER_FRAME if PER_FRAME in given else UNKNOWN
        return Node("function", parts, name)

    def _step(self, scheduler: Value, owner: str, method: str, given: list[Value], named: dict[str, Value]) -> Value:
        name = scheduler.names[0] if isinstance(scheduler, Component) else owner.removeprefix("self.")
        stepped = named.get("model_output", given[0] if given else UNKNOWN)
        if stepped == ZEROS:  # to keep a scheduler in step with another one
            return UNKNOWN
        parts = nodes_in(stepped)
        output = output_of(parts[0]) if len(parts) == 1 else Node("shape", parts) if parts else None
        self.steps.append(Step(name, method, output))
        return UNKNOWN if output is None else Many([UNKNOWN, Node("function", (output,), X0_OF_A_STEP)])

    # ---- tests ----

    def _truth(self, node: ast.expr, frame: _Frame) -> bool | None:
        """Return whether a test holds; ``None``: what is assumed does not decide it."""
        match node:
            case ast.Compare() if (settled := self._settled(ast.unparse(node))) is not None:
                return settled
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                truth = self._truth(operand, frame)
                return None if truth is None else not truth
            case ast.BoolOp(op=op, values=values):
                decides = isinstance(op, ast.Or)
                truths = [self._truth(value, frame) for value in values]
                return decides if decides in truths else None if None in truths else not decides
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self._compared(left, op, right, frame)
            case ast.Compare() | ast.UnaryOp():
                return None
        value = self._value(node, frame)
        if isinstance(value, Known):
            return bool(value.value)
        is_on = isinstance(node, (ast.Name, ast.Attribute)) and _GUIDANCE_IS_ON.match(
            ast.unparse(node).rpartition(".")[2]
        )
        return True if is_on else None

    def _settled(self, test: str) -> bool | None:
        answers = (a for (name, text), a in _SETTLED.items() if text == test and self._source.name.startswith(name))
        return next(answers, None)

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr, frame: _Frame) -> bool | None:
        name = ast.unparse(left).rpartition(".")[2]
        asks_for_none = isinstance(right, ast.Constant) and right.value is None
        is_given = _SCALE.search(name) and (self._true_cfg or not _TRUE_CFG.search(name))
        if (is_given and isinstance(right, ast.Constant)) or (asks_for_none and _NEGATIVE.search(name)):
            return isinstance(op, (ast.Gt, ast.GtE, ast.NotEq, ast.IsNot))
        one, other = self._value(left, frame), self._value(right, frame)
        if asks_for_none and not isinstance(one, (Known, Unknown)):
            optional = isinstance(one, Component) and self._arguments[one.names[0]][1] is not ...
            return None if optional else isinstance(op, ast.IsNot)
        if not (isinstance(one, Known) and isinstance(other, Known)) or type(op) not in _COMPARISONS:
            return None
        try:
            return bool(_COMPARISONS[type(op)](one.value, other.value))
        except TypeError:
            return None


def _call_of(model: Component, named: Mapping[str, Value]) -> Node:
    embedded = [Node("embedded", (), name) for name in _EMBEDDED if named.get(name, Known(None)) != Known(None)]
    return Node("call", tuple(embedded), " or ".join(model.names))
