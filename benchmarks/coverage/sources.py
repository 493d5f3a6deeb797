"""Find diffusers' pipeline classes, and read their source: the syntax trees of their methods, their examples."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import diffusers.pipelines

_PACKAGE = "diffusers.pipelines."
_BASE = "diffusers.pipelines.pipeline_utils"


@dataclass(frozen=True)
class Source:
    """What is read of one pipeline class."""

    name: str
    module: str
    methods: Mapping[str, ast.FunctionDef]
    """Its own methods, and those that it inherits from the pipelines' classes."""
    examples: Sequence[str]
    """The docstrings and constants that have its example."""

    def is_property(self, name: str) -> bool:
        """Tell whether a method is a property."""
        method = self.methods.get(name)
        return method is not None and any(ast.unparse(d) == "property" for d in method.decorator_list)

    def arguments(self) -> dict[str, tuple[ast.expr | None, Any]]:
        """Return the arguments of its ``__init__``, each with its annotation and its default (``...``: none)."""
        init = self.methods.get("__init__")
        if init is None:
            return {}
        defaults = default_values(init)
        named = [*init.args.posonlyargs, *init.args.args, *init.args.kwonlyargs]
        return {a.arg: (a.annotation, defaults.get(a.arg, ...)) for a in named if a.arg != "self"}


def pipeline_classes() -> list[type]:
    """Return the pipeline classes of the installed diffusers, deprecated ones too, by name.

    Classes of a module that needs a package which is not installed are not among them.
    """
    for module in pkgutil.walk_packages(diffusers.pipelines.__path__, _PACKAGE, onerror=lambda name: None):
        try:
            importlib.import_module(module.name)
        except (ImportError, RuntimeError, OSError):
            continue
    found = {cls for cls in _subclasses(diffusers.DiffusionPipeline) if cls.__module__.startswith(_PACKAGE)}
    return sorted(found, key=lambda cls: cls.__name__)


def source_of(cls: type) -> Source:
    """Return what is read of a class."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith(_PACKAGE) and base.__module__ != _BASE]
    trees = [_module_tree(base.__module__) for base in bases]
    nodes = [_class_in(tree, base.__name__) for tree, base in zip(trees, bases, strict=True)]
    return _source(cls.__name__, cls.__module__.removeprefix(_PACKAGE), nodes, trees[0])


def source_in(text: str, name: str) -> Source:
    """Return what is read of a class in a text, whose bases are the classes of the text that it names."""
    tree = ast.parse(text)
    nodes = [_class_in(tree, name)]
    for node in nodes:
        nodes += [_class_in(tree, base.id) for base in node.bases if isinstance(base, ast.Name)]
    return _source(name, "text", nodes, tree)


def default_values(function: ast.FunctionDef) -> dict[str, Any]:
    """Return the defaults of a function's arguments that are literals."""
    named, given = [*function.args.posonlyargs, *function.args.args], function.args.defaults
    pairs = [*zip(named[len(named) - len(given) :], given, strict=True)]
    pairs += [(a, d) for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d is not None]
    values = {}
    for argument, default in pairs:
        try:
            values[argument.arg] = ast.literal_eval(default)
        except ValueError:
            continue
    return values


def _source(name: str, module: str, nodes: Sequence[ast.ClassDef], tree: ast.Module) -> Source:
    methods: dict[str, ast.FunctionDef] = {}
    for node in reversed(nodes):
        methods |= {  # the getter of a property, not its setter
            m.name: m for m in reversed(node.body) if isinstance(m, ast.FunctionDef)
        }
    own = [m for m in nodes[0].body if isinstance(m, ast.FunctionDef)]
    texts = {
        target.id: assign.value.value
        for assign in tree.body
        if isinstance(assign, ast.Assign) and isinstance(assign.value, ast.Constant)
        for target in assign.targets
        if isinstance(target, ast.Name) and isinstance(assign.value.value, str)
    }
    named = {
        n.id: None for method in own for d in method.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)
    }
    documented: list[ast.FunctionDef | ast.ClassDef] = [*own, nodes[0]]
    examples = [texts[n] for n in named if n in texts] or [text for n, text in texts.items() if "EXAMPLE" in n]
    return Source(name, module, methods, examples + [ast.get_docstring(node) or "" for node in documented])


def _subclasses(cls: type) -> Iterator[type]:
    direct: list[type] = cls.__subclasses__()
    for subclass in direct:
        yield subclass
        yield from _subclasses(subclass)


@functools.cache
def _module_tree(name: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[name]))


def _class_in(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
