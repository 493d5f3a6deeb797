"""The compiled operator's lists are this package's, and it releases its arguments after each call."""

from __future__ import annotations

import gc
import shutil
import subprocess
import weakref

import pytest
import torch

from fastguide import ROW_COLUMNS
from fastguide.guidance.encoded import MOST_TERMS, MOST_VALUES
from fastguide.guidance.symbols import OPERATIONS
from fastguide.step.backends import native
from fastguide.step.call import Call, Facts, Objects
from fastguide.step.operator import THRESHOLD_WORDS

pytestmark = pytest.mark.skipif(
    not native.LIBRARY.exists(), reason="the native library is not built; fastguide info says why"
)

ARGUMENTS = [
    f"{native._ARGUMENT_TYPES[str(a.type)]} {a.name}" for a in torch.ops.fastguide.guided_step.default._schema.arguments
]
BACKWARD = torch.ops.fastguide.guided_step_backward.default._schema.arguments
GRADIENTS = [f"{native._ARGUMENT_TYPES[str(a.type)]} {a.name}" for a in BACKWARD[len(ARGUMENTS) :]]


LISTS = {
    "fastguide_row_columns": ROW_COLUMNS,
    "fastguide_arguments": ARGUMENTS,
    "fastguide_gradients": GRADIENTS,
    "fastguide_call": Call._fields,
    "fastguide_facts": Facts._fields,
    "fastguide_objects": Objects._fields,
    "fastguide_operations": tuple(OPERATIONS),
}
NUMBERS = {
    "fastguide_program_terms": MOST_TERMS,
    "fastguide_program_values": MOST_VALUES,
    "fastguide_threshold_words": THRESHOLD_WORDS,
    "fastguide_gradient_tile": native.GRADIENT_TILE,
}


def library_with(folder, **changed):
    """Compile a library that exports all functions, and the lists, some of them changed."""
    numbers = {name: changed.get(name, number) for name, number in NUMBERS.items()}
    lists = {name: changed.get(name, values) for name, values in LISTS.items()}
    others = [name for name in native._EXPORTS if name not in lists]
    functions = [f"int {name}(void) {{ return {numbers.get(name, 0)}; }}" for name in others]
    for name, values in lists.items():
        functions.append(f'const char* {name}(void) {{ return "{"".join(f"{value}," for value in values)}"; }}')
    source, library = folder / "lists.c", folder / "_native.so"
    source.write_text("\n".join(functions))
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


def swapped(values, i, j):
    values = list(values)
    values[i], values[j] = values[j], values[i]
    return values


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("row_columns", swapped(ROW_COLUMNS, 0, 1), "expected x0_scale, got x0_sample"),
        ("row_columns", ROW_COLUMNS[:-1], "expected quantile, got nothing more"),
        ("row_columns", [*ROW_COLUMNS, "out_more"], "expected nothing more, got out_more"),
        ("arguments", swapped(ARGUMENTS, 9, 10), "expected OptionalTensor gradient, got OptionalTensor variance"),
        ("arguments", ARGUMENTS[:-1], "expected OptionalTensor inverse_thresholds, got nothing more"),
        ("arguments", [*ARGUMENTS, "OptionalTensor history"], "expected nothing more, got OptionalTensor history"),
        ("arguments", ["OptionalTensor out", *ARGUMENTS[1:]], "expected Tensor out, got OptionalTensor out"),
        ("gradients", GRADIENTS[1:], "expected OptionalTensor grad_out, got OptionalTensor grad_original"),
        ("operations", swapped(tuple(OPERATIONS), 0, 1), "expected add, got sub"),
        ("program_terms", MOST_TERMS + 1, f"expected {MOST_TERMS}, got {MOST_TERMS + 1}"),
        ("program_values", 2 * MOST_VALUES, f"expected {MOST_VALUES}, got {2 * MOST_VALUES}"),
        ("threshold_words", 1, f"expected {THRESHOLD_WORDS}, got 1"),
        ("call", swapped(Call._fields, 4, 5), "expected gradient, got variance"),
        ("facts", swapped(Facts._fields, 0, 1), "expected kinds_of, got token"),
        ("objects", swapped(Objects._fields, 0, 1), "expected none, got true_object"),
    ],
)
def test_a_library_with_other_lists_is_refused(tmp_path, monkeypatch, name, values, message):
    """It would read a row's coefficients, the dispatcher's stack or Python's objects by another list."""
    monkeypatch.setattr(native, "LIBRARY", library_with(tmp_path, **{f"fastguide_{name}": values}))
    with pytest.raises(OSError, match=f"another library, or another version: fastguide_{name}: {message}$"):
        native._load()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_library_with_the_same_lists_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY", library_with(tmp_path))
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    native._load()


def every_argument():
    """Make all arguments that a CPU step can have at once, by name."""
    x = torch.zeros(2, 3, 5)
    values = {
        "out": x,
        "original": torch.empty(2, 3, 5),
        "staged": torch.empty(4, 3, 5),
        "sample": x.clone(),
        "predictions": [torch.zeros(2, 3, 5) for _ in range(3)],
        "rows": torch.ones(4, len(ROW_COLUMNS)),
        "weights": torch.ones(1, 1, 4),
        "index": 1,
        "indices": torch.tensor([0, 3]),
        "seeds": torch.tensor([1, 2]),
        "philox_threads": 0,
    }
    values |= {name: torch.zeros(2, 3, 5) for name in ("gradient", "variance", "mask", "known", "known_noise")}
    return values


def call(values):
    """Call the operator with arguments by name; absent ones are None."""
    names = [argument.partition(" ")[2] for argument in ARGUMENTS]
    torch.ops.fastguide.guided_step.default(*(values.get(name) for name in names))


def tensors_of(values):
    flat = [*values.values(), *values["predictions"]]
    return [value for value in flat if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("refused", [False, True])
def test_every_argument_is_released_after_the_call(refused):
    values = every_argument()
    if refused:
        values["indices"] = torch.tensor([0, 4])
    tensors = tensors_of(values)
    before = [tensor._use_count() for tensor in tensors]
    alive = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    if refused:
        with pytest.raises(RuntimeError, match="index: expected values from 0 to 3, got 4"):
            call(values)
    else:
        call(values)
    assert [tensor._use_count() for tensor in tensors] == before
    del tensors, values
    gc.collect()
    assert not any(storage() for storage in alive)
