"""A step of a known kind is made again without checks and dispatcher: with the same bits, and the same refusals."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Cursor, Inpainting
from fastguide.step import checks, memory, repeat
from fastguide.step.backends import native
from fastguide.step.backends.registry import BACKENDS
from tests.step.test_errors import STEP_ERRORS, X
from tests.support.cases import TABLES

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")

SHAPE = (2, 3, 4)
DDIM, DDPM, LEARNED = TABLES["ddim"], TABLES["ddpm"], TABLES["ddpm learned"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def no_kinds():
    repeat._kinds.clear()


@pytest.fixture
def checked(monkeypatch):
    """Count the steps that are checked, which are not repeated."""
    counted = []
    real = checks.validate
    monkeypatch.setattr(checks, "validate", lambda *a, **k: counted.append(1) or real(*a, **k))
    return counted


def pair(seed=1):
    return [draw(seed=seed), draw(seed=seed + 1)]


KINDS = {  # a function that makes one step, of tensors that are new at each call
    "guided": lambda: fastguide.guided_step(DDIM, 3, draw(), pair(), ClassifierFree(7.5)),
    "unguided": lambda: fastguide.guided_step(DDIM, 3, draw(), draw(seed=1)),
    "one tensor of both": lambda: fastguide.guided_step(DDIM, 3, draw(), torch.cat(pair()), GUIDANCE),
    "a tuple of four": lambda: fastguide.guided_step(DDIM, 3, draw(), (*pair(), *pair(5)), COMPOSED),
    "into an output": lambda: fastguide.guided_step(DDIM, 3, draw(), pair(), GUIDANCE, out=torch.empty(SHAPE)),
    "x_0 and a staged input": lambda: with_outputs(),
    "noise": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, noise=draw(seed=9)),
    "a generator": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, generator=generator()),
    "a generator that is not needed": lambda: fastguide.guided_step(
        DDPM, 9, draw(), pair(), GUIDANCE, generator=generator()
    ),
    "seeds": lambda: fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, seeds=torch.tensor([1, 2])),
    "a learned variance": lambda: fastguide.guided_step(
        LEARNED, 3, draw(), pair(), GUIDANCE, variance=draw(seed=7), noise=draw(seed=9)
    ),
    "a gradient": lambda: fastguide.guided_step(DDIM, 3, draw(), draw(seed=1), CLASSIFIER, gradient=draw(seed=2)),
    "inpainting": lambda: fastguide.guided_step(
        DDIM, 3, draw(), pair(), GUIDANCE, inpainting=Inpainting(draw().gt(0).float(), draw(seed=3), draw(seed=4))
    ),
    "mixed dtypes": lambda: fastguide.guided_step(
        DDIM, 3, draw(), [draw(seed=1, dtype=torch.bfloat16)] * 2, GUIDANCE, out=torch.empty(SHAPE, dtype=torch.float16)
    ),
    "double precision": lambda: fastguide.guided_step(DDIM, 3, draw().double(), [p.double() for p in pair()], GUIDANCE),
    "another layout": lambda: fastguide.guided_step(
        DDIM, 3, *(torch.empty(2, 4, 3).mT.copy_(draw(seed=s)) for s in (1, 2))
    ),
    "hundreds of conditions": lambda: fastguide.guided_step(DDIM, 3, draw(), [draw(seed=s) for s in range(301)], MANY),
    "samples apart": lambda: fastguide.guided_step(DDIM, 3, draw(4, 3, 4)[::2], draw(4, 3, 4, seed=1)[1::2]),
    "a cursor": lambda: with_cursor(),
    "many elements": lambda: fastguide.guided_step(
        DDIM, 3, draw(2, 3, 200, 200), draw(4, 3, 200, 200, seed=1), GUIDANCE
    ),
}  # fmt: skip
MANY = Composed([0.01] * 300)
GUIDANCE, COMPOSED, CLASSIFIER = ClassifierFree(7.5), Composed([1.0, 2.0, 3.0]), Classifier(None, 2.0)
CURSOR = Cursor(timesteps=2)


def generator():
    return torch.Generator().manual_seed(5)


def with_outputs():
    original, staged = torch.empty(SHAPE, dtype=torch.float16), torch.empty(4, *SHAPE[1:])
    out = fastguide.guided_step(DDIM, 3, draw(), pair(), GUIDANCE, original=original, staged=staged)
    return torch.cat([out, original, staged])


def with_cursor():
    sample = draw()
    CURSOR.start(DDIM, 3)
    fastguide.guided_step(DDIM, CURSOR, sample, pair(), GUIDANCE, out=sample)
    return torch.cat([sample.flatten(), CURSOR.state.flatten(), CURSOR.timestep])


@pytest.mark.parametrize("name", KINDS)
def test_repeated_steps_have_the_same_bits(name, checked):
    first = KINDS[name]()
    for _ in range(4):
        assert torch.equal(KINDS[name](), first)
    # scales that are new at each call are another kind each time, and so is a generator that draws elsewhere
    assert len(checked) == (5 if name == "guided" else 2)


@pytest.mark.parametrize("index", [0, 5, 9])
def test_every_row_is_its_own(index):
    for _ in range(3):
        fastguide.guided_step(DDIM, 2, draw(), pair(), GUIDANCE)
    got = fastguide.guided_step(DDIM, index, draw(), pair(), GUIDANCE)
    repeat._kinds.clear()
    assert torch.equal(got, fastguide.guided_step(DDIM, index, draw(), pair(), GUIDANCE))


def test_the_generator_is_left_where_the_operator_leaves_it():
    states, results = [], []
    for _ in range(4):
        g = generator()
        results.append(fastguide.guided_step(DDPM, 3, draw(), pair(), GUIDANCE, generator=g))
        states.append(g.get_state())
    assert all(torch.equal(state, states[0]) for state in states)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_write_to_an_output_is_counted():
    out = torch.empty(SHAPE)
    for _ in range(4):
        before = out._version
        fastguide.guided_step(DDIM, 3, draw(), pair(), GUIDANCE, out=out)
        assert out._version == before + 1


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


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def in_one(first, second):
    """Two tensors of SHAPE that share a part of their memory."""
    memory = torch.zeros(60)
    return memory[first : first + 24].view(SHAPE), memory[second : second + 24].view(SHAPE)


BAD = {  # arguments that replace good ones of the same step
    "another device": lambda: {"predictions": [draw(), draw().to("meta")]},
    "another stride": lambda: {"predictions": [draw(), draw(2, 4, 3).mT]},
    "requires grad": lambda: {"predictions": [draw(), draw().requires_grad_()]},
    "a sample that requires grad": lambda: {"sample": draw().requires_grad_()},
    "freed memory": lambda: {"predictions": [draw(), freed(draw())]},
    "a freed sample": lambda: {"sample": freed(draw())},
    "another size": lambda: {"predictions": [draw(), draw().resize_(2, 3, 5)]},
    "an index beyond the table": lambda: {"index": 10},
    "an index below it": lambda: {"index": -1},
    "an output over a part of the sample": lambda: dict(zip(("out", "sample"), in_one(0, 5), strict=True)),
    "a prediction too many": lambda: {"predictions": [draw(), draw(), draw()]},
    "no tensor": lambda: {"predictions": [draw(), None]},
    "an output of integers": lambda: {"out": torch.zeros(SHAPE, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", BAD)
def test_the_thousandth_call_is_refused_as_the_first(name):
    def step(index=3, sample=None, predictions=None, out=None):
        out = torch.empty(SHAPE) if out is None else out
        sample, predictions = draw() if sample is None else sample, pair() if predictions is None else predictions
        return fastguide.guided_step(DDIM, index, sample, predictions, GUIDANCE, out=out)

    def refusal():
        with pytest.raises((TypeError, ValueError, IndexError, RuntimeError)) as caught:
            step(**BAD[name]())
        return type(caught.value), str(caught.value)

    first = refusal()
    for _ in range(999):
        step()
    assert refusal() == first
    step()


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


def test_large_new_outputs_are_in_huge_pages(monkeypatch):
    advised = []
    monkeypatch.setattr(memory, "_in_huge_pages", lambda new: advised.append(new.shape) or new)
    for _ in range(4):
        KINDS["unguided"]()
    assert advised == [SHAPE] * 4


class SeesFunctions(TorchFunctionMode):
    seen = 0

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        SeesFunctions.seen += "guided_step" in str(function)
        return function(*arguments, **(keywords or {}))


class SeesOperators(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        SeesOperators.seen += "fastguide.guided_step" in str(function)
        return function(*arguments, **(keywords or {}))


def test_modes_see_the_operator(checked):
    for _ in range(3):
        KINDS["unguided"]()
    assert len(checked) == 2
    for mode in (SeesFunctions, SeesOperators):
        mode.seen = 0
        with mode():
            KINDS["unguided"]()
        assert mode.seen == 1
    KINDS["unguided"]()
    assert len(checked) == 4


def test_the_profiler_sees_the_operator():
    for _ in range(3):
        KINDS["unguided"]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        KINDS["unguided"]()
    assert "fastguide::guided_step" in {event.key for event in profile.key_averages()}


def test_transforms_and_forward_mode_see_the_operator(checked):
    for _ in range(3):
        KINDS["unguided"]()
    before = len(checked)
    with torch.autograd.forward_ad.dual_level():
        KINDS["unguided"]()
    with pytest.raises(RuntimeError, match="alias annotations: fastguide::guided_step"):
        torch.func.functionalize(lambda x: x + KINDS["unguided"]().sum())(torch.zeros(()))
    assert len(checked) == before + 2


def test_a_compiled_step_is_the_operator():
    for _ in range(3):
        expected = KINDS["unguided"]()
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    step = torch.compile(lambda x, p: fastguide.guided_step(DDIM, torch.tensor(3), x, p), backend=backend)
    assert torch.equal(step(draw(), draw(seed=1)), expected)
    assert "fastguide.guided_step" in "".join(graphs)


def test_kinds_are_bounded_and_keep_what_they_are_known_by(monkeypatch):
    monkeypatch.setattr(repeat, "_MOST_KINDS", 3)
    for _ in range(3):
        for size in range(1, 6):
            x = draw(size, 2)
            assert torch.equal(fastguide.guided_step(DDIM, 3, x, x), fastguide.guided_step(DDIM, 3, x, x))
    assert len(repeat._kinds) == 3
    known = [kind for kind in repeat._kinds.values() if kind is not None]
    assert {id(kind.table) for kind in known} == {id(DDIM)}


def test_threads_have_records_of_their_own():
    x = draw(64, 64)
    outputs = [draw(64, 64, seed=seed) for seed in range(4)]
    expected = [fastguide.guided_step(DDIM, 3, x, output) for output in outputs]
    wrong = []

    def work(place):
        for _ in range(300):
            if not torch.equal(fastguide.guided_step(DDIM, 3, x, outputs[place]), expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_instruction_set_that_is_chosen_later_is_used():
    for _ in range(3):
        KINDS["many elements"]()
    chosen = native.cpu_capability()
    try:
        native.set_cpu_capability("baseline")
        got = KINDS["many elements"]()
        repeat._kinds.clear()
        assert torch.equal(got, KINDS["many elements"]())
    finally:
        native.set_cpu_capability(chosen)
