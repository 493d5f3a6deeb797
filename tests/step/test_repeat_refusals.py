"""What is refused once is refused after thousands of good steps of the same kind, in the same words."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import StepTable
from fastguide.step.backends import native
from fastguide.step.backends.registry import BACKENDS
from tests.step.test_errors import STEP_ERRORS, X
from tests.support.repeated_steps import (  # noqa: F401  # and fixtures
    CURSOR,
    DDIM,
    DDPM,
    DPM,
    GUIDANCE,
    LEARNED,
    SHAPE,
    UNIPC,
    draw,
    each_backend,
    freed,
    freed_view,
    generator,
    in_one,
    no_kinds,
    pair,
    with_cursor,
)

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")


@pytest.mark.parametrize(("call", "kind", "message"), STEP_ERRORS, ids=[m for _, _, m in STEP_ERRORS])
def test_bad_calls_are_refused_after_good_ones(call, kind, message):
    """Good ones of the same table, sample and guidance, so that only what is bad is new."""
    for _ in range(3):
        fastguide.guided_step(DDIM, 0, X, [X])
        fastguide.guided_step(DDIM, 0, X, [X], out=torch.empty_like(X))
        fastguide.guided_step(DDPM, 0, X, [X], noise=X)
        fastguide.guided_step(DDPM, 0, X, [X], seeds=torch.tensor([1, 2]))
        fastguide.guided_step(DDPM, 0, X, [X], generator=torch.default_generator)
        fastguide.guided_step(LEARNED, 0, X, [X], variance=X, noise=X)
    with pytest.raises(kind, match=message):
        call()


BAD = {  # arguments that replace good ones of the same step
    "another device": lambda: {"predictions": [draw(), draw().to("meta")]},
    "another stride": lambda: {"predictions": [draw(), draw(2, 4, 3).mT]},
    "requires grad": lambda: {"predictions": [draw(), draw().requires_grad_()], "out": draw()},
    "a sample that requires grad": lambda: {"sample": draw().requires_grad_(), "out": draw()},
    "freed memory": lambda: {"predictions": [draw(), freed(draw())]},
    "a freed sample": lambda: {"sample": freed(draw())},
    "a view of freed memory": lambda: {"predictions": [draw(), freed_view()]},
    "another size": lambda: {"predictions": [draw(), draw().resize_(2, 3, 5)]},
    "an index beyond the table": lambda: {"index": 10},
    "an index below it": lambda: {"index": -1},
    "an output over a part of the sample": lambda: dict(zip(("out", "sample"), in_one(0, 5), strict=True)),
    "a prediction too many": lambda: {"predictions": [draw(), draw(), draw()]},
    "no tensor": lambda: {"predictions": [draw(), None]},
    "an output of integers": lambda: {"out": torch.zeros(SHAPE, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", BAD)
def test_the_thousandth_call_is_refused_as_the_first(name, each_backend):  # noqa: F811
    def step(index=3, sample=None, predictions=None, out=None):
        out = torch.empty(SHAPE) if out is None else out
        sample, predictions = draw() if sample is None else sample, pair() if predictions is None else predictions
        return fastguide.guided_step(DDIM, index, sample, predictions, GUIDANCE, out=out)

    def refusal():
        with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as caught:
            step(**BAD[name]())
        return type(caught.value), str(caught.value)

    first = refusal()
    for _ in range(999 if each_backend == "native" else 5):
        step()
    assert refusal() == first
    step()


BAD_HISTORIES = {
    "none at all": lambda history: None,
    "another type": lambda history: history.entries,
    "another sample's": lambda history: fastguide.History(DPM, draw(2, 3, 5)),
    "another table's": lambda history: fastguide.History(UNIPC, draw()),
    "another dtype": lambda history: fastguide.History(DPM, draw().double()),
    "a call before": lambda history: noted(history, 4),
    "freed memory": lambda history: freed(history.entries) is None or history,
}


def noted(history, index):
    history.note(index)
    return history


@pytest.mark.parametrize("name", BAD_HISTORIES)
def test_a_bad_history_is_refused_after_good_ones(name, each_backend):  # noqa: F811
    def step(change=lambda history: history):
        sample = draw()
        history = noted(fastguide.History(DPM, sample), 2)
        return fastguide.guided_step(DPM, 3, sample, pair(), GUIDANCE, history=change(history))

    def refusal():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            step(BAD_HISTORIES[name])
        return type(caught.value), str(caught.value)

    first = refusal()
    for _ in range(999 if each_backend == "native" else 5):
        step()
    assert refusal() == first


def test_an_output_over_the_history_is_refused(each_backend):  # noqa: F811
    for _ in range(4):
        sample = draw()
        history = noted(fastguide.History(DPM, sample), 2)
        fastguide.guided_step(DPM, 3, sample, pair(), GUIDANCE, history=history, out=torch.empty(SHAPE))
        history.note(2)
        with pytest.raises((ValueError, RuntimeError), match="history: expected memory"):
            fastguide.guided_step(DPM, 3, sample, pair(), GUIDANCE, history=history, out=history.entries)


def test_an_output_may_be_one_of_stacked_predictions(each_backend):  # noqa: F811
    """Element for element, as where each is a tensor by itself; a part of one it may not be."""
    for _ in range(4):
        both = torch.cat(pair())
        expected = fastguide.guided_step(DDPM, 3, draw(), both.clone(), GUIDANCE, generator=generator())
        got = fastguide.guided_step(DDPM, 3, draw(), both, GUIDANCE, generator=generator(), out=both[2:])
        assert torch.equal(got, expected)
    both = torch.cat(pair())
    with pytest.raises(ValueError, match=r"out: expected memory apart from predictions\[0\], or the same"):
        fastguide.guided_step(DDPM, 3, draw(), both, GUIDANCE, generator=generator(), out=both[1:3])


def test_a_cursor_s_output_is_always_the_sample():
    for _ in range(3):
        with_cursor()
    with pytest.raises(ValueError, match="out: expected the sample itself with a Cursor"):
        fastguide.guided_step(DDIM, CURSOR.start(DDIM, 3), draw(), pair(), GUIDANCE, out=draw())


def test_a_refused_output_costs_no_noise():
    """Refused after good steps, too: an x_0 over a part of a prediction."""
    original, prediction = in_one(0, 5)
    g = generator()
    for _ in range(3):
        fastguide.guided_step(DDPM, 3, draw(), draw(), generator=generator(), original=torch.empty(SHAPE))
    with pytest.raises(ValueError, match="original: expected memory apart from predictions"):
        fastguide.guided_step(DDPM, 3, draw(), prediction, generator=g, original=original)
    assert torch.equal(g.get_state(), generator().get_state())


@pytest.mark.parametrize("name", ["seeds", "index"])
def test_a_staged_input_over_numbers_is_refused(name):
    """After good steps, too."""
    memory = torch.zeros(24)

    def step(numbers):
        more = {"seeds": numbers} if name == "seeds" else {"noise": draw()}
        index = numbers if name == "index" else 3
        staged = memory.view(SHAPE)
        return fastguide.guided_step(DDPM, index, draw(), draw(seed=1), staged=staged, **more)

    for _ in range(3):
        step(torch.tensor([3, 4]))
    with pytest.raises(ValueError, match=f"staged: expected memory apart from {name}"):
        step(memory.zero_().view(torch.int64)[3:5])


def test_undefined_rows_are_refused_at_a_tensor_of_indices():
    infinite = torch.tensor([1.0, torch.inf, 1.0], dtype=torch.float64)
    table = StepTable.from_columns(torch.tensor([2, 1, 0]), {"out_pred": infinite}, undefined="it is infinite")
    for _ in range(4):
        fastguide.guided_step(table, torch.tensor([0, 2]), draw(), draw(seed=1))
    with pytest.raises(ValueError, match="it is infinite"):
        fastguide.guided_step(table, torch.tensor([0, 1]), draw(), draw(seed=1))


@pytest.mark.parametrize("name", ["attach", "describe", "repeat", "follow"])
def test_the_library_s_functions_refuse_another_number_of_objects(name):
    function = getattr(native.python_functions(), name)
    for count in (0, 1, 40):
        with pytest.raises(TypeError, match=rf"^{name}: expected \d+ objects, got {count}$"):
            function(*[None] * count)
