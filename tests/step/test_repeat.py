"""A step of a known kind is made again without checks and dispatcher: with the same bits, and the same refusals."""

from __future__ import annotations

import gc
import sys
import threading
import weakref

import pytest
import torch

import fastguide
from fastguide import Classifier, Guidance, Inpainting
from fastguide.step import memory, repeat
from fastguide.step.backends import native
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import TABLES
from tests.support.repeated_steps import (  # noqa: F401  # and fixtures
    CURSOR,
    DDIM,
    DDPM,
    GUIDANCE,
    KINDS,
    NOT_TRITON,
    SHAPE,
    checked,
    draw,
    each_backend,
    generator,
    in_one,
    no_kinds,
    pair,
)

pytestmark = pytest.mark.skipif(not BACKENDS["native"].devices, reason="the native library is not here")


@pytest.mark.parametrize("name", KINDS)
def test_repeated_steps_have_the_same_bits(name, checked, each_backend):  # noqa: F811
    if each_backend == "triton" and name in NOT_TRITON:
        pytest.skip(f"not with Triton here: {name}")
    first = KINDS[name]()
    for _ in range(4):
        assert torch.equal(KINDS[name](), first)
    # scales that are new at each call are another kind each time, and so is a generator that draws elsewhere
    assert len(checked) == (5 if name == "guided" else 2)


def test_kinds_that_alternate_are_all_known(checked, each_backend):  # noqa: F811
    names = [name for name in KINDS if name not in ("guided", "another layout", *NOT_TRITON)]
    for _ in range(2):
        for name in names:
            KINDS[name]()
    number = len(checked)
    for name in names * 2:
        KINDS[name]()
    assert len(checked) == number


def test_steps_of_one_table_that_differ_in_layout_alone_are_all_known(checked):  # noqa: F811
    def both():
        return [KINDS[name]() for name in ("unguided", "another layout")]

    first = both()
    for _ in range(6):
        assert all(map(torch.equal, both(), first))
    assert len(checked) == 3  # what is known at first sight is of one layout alone


def test_triton_s_kinds_are_of_one_alignment(checked, each_backend):  # noqa: F811
    """It compiles another kernel for pointers that are no multiples of 16."""
    memory = draw(25)
    aligned, other = memory[:24].view(SHAPE), memory[1:].view(SHAPE)
    assert aligned.data_ptr() % 16 == 0
    for _ in range(3):
        fastguide.guided_step(DDIM, 3, aligned, aligned)
    number = len(checked)
    fastguide.guided_step(DDIM, 3, aligned, other)
    assert len(checked) == number + (each_backend == "triton")


def test_autograd_matters_while_it_is_enabled():
    leaf = draw(seed=1).requires_grad_()
    with torch.no_grad():
        first = fastguide.guided_step(DDIM, 3, draw(), leaf)
        for _ in range(3):
            assert torch.equal(fastguide.guided_step(DDIM, 3, draw(), leaf), first)
    got = fastguide.guided_step(DDIM, 3, draw(), leaf)
    assert got.requires_grad
    assert torch.equal(got, first)


def test_weights_of_the_predictions_are_new_at_each_step():
    guidance = Guidance.from_predictions(
        lambda predictions: torch.stack([p.flatten(1)[:, 0] for p in predictions], 1), 2
    )
    for seed in range(5):
        first, second = pair(seed)
        got = fastguide.guided_step(DDIM, 3, draw(), [first, second], guidance)
        m = first[:, :1, :1] * first + second[:, :1, :1] * second
        torch.testing.assert_close(got, fastguide.guided_step(DDIM, 3, draw(), m), rtol=1e-4, atol=1e-5)


def test_a_sign_that_only_the_dispatcher_knows():
    """The imaginary part of a conjugate is the memory's own, with the other sign; its layout is like another's."""
    pairs = torch.randn(5, 2)
    for _ in range(4):
        fastguide.guided_step(DDIM, 3, pairs[:, 1], draw(5))
    got = fastguide.guided_step(DDIM, 3, torch.view_as_complex(pairs).conj().imag, draw(5))
    assert torch.equal(got, fastguide.guided_step(DDIM, 3, -pairs[:, 1], draw(5)))


@pytest.mark.parametrize("index", [0, 5, 9])
def test_every_row_is_its_own(index):
    for _ in range(3):
        fastguide.guided_step(DDIM, 2, draw(), pair(), GUIDANCE)
    got = fastguide.guided_step(DDIM, index, draw(), pair(), GUIDANCE)
    repeat.forget()
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


class Growing(Guidance):
    """Weights that its user changes."""

    scale = 1.0

    def __init__(self):
        super().__init__(torch.zeros(1, 1, 2, dtype=torch.float64), None)

    def weights(self, device, dtype):
        return torch.tensor([[[self.scale, 0.0]]], dtype=dtype, device=device)


def test_a_guidance_of_one_s_own_is_asked_for_its_weights():
    guidance = Growing()
    for scale in (1.0, 2.0, 3.0, 4.0):
        guidance.scale = scale
        got = fastguide.guided_step(DDIM, 3, draw(), draw(seed=1), guidance)
        torch.testing.assert_close(got, fastguide.guided_step(DDIM, 3, draw(), scale * draw(seed=1)))


@pytest.mark.parametrize("large", [False, True])
def test_large_new_outputs_are_in_huge_pages(monkeypatch, large):
    advised = []
    monkeypatch.setattr(memory, "_madvise", lambda begin, length, advice: advised.append(length.value))
    monkeypatch.setattr(memory, "_LARGE", 2**16 if large else 2**18)
    x = draw(1, 2, 128, 128)  # 2**17 bytes
    for _ in range(4):
        fastguide.guided_step(DDIM, 3, x, x)
    assert len(advised) == (4 if large else 0)


def test_kinds_are_bounded_and_keep_what_they_are_known_by(monkeypatch):
    monkeypatch.setattr(repeat, "_MOST_KINDS", 3)
    for _ in range(3):
        for size in range(1, 6):
            x = draw(size, 2)
            assert torch.equal(fastguide.guided_step(DDIM, 3, x, x), fastguide.guided_step(DDIM, 3, x, x))
    ((token, kinds),) = repeat.kinds_of.items()
    assert token is DDIM._token
    assert len(kinds) - 1 == len(repeat._seen[token]) == 3


def test_what_is_known_keeps_no_classifier_and_no_tensors_alive():
    class Probability:
        def __call__(self, x, t, y):
            return -(x**2).flatten(1).sum(1)

    classifier, tensors = Probability(), [draw(), draw(seed=1), draw(seed=2), torch.empty(SHAPE)]
    guidance, table = Classifier(classifier, 2.0), TABLES["ddim"][1:]
    for _ in range(4):
        x, prediction, gradient, out = tensors
        fastguide.guided_step(table, 3, x, prediction, guidance, gradient=gradient, out=out)
    assert len(repeat.kinds_of[table._token]) == 2
    gone = [weakref.ref(each) for each in (classifier, guidance, table, *tensors)]
    del classifier, guidance, table, tensors, x, prediction, gradient, out
    gc.collect()
    assert [each() for each in gone] == [None] * 7


def test_tables_are_bounded(monkeypatch):
    monkeypatch.setattr(repeat, "_MOST_TABLES", 2)
    tables = [TABLES["ddim"][k:] for k in range(4)]
    for table in tables:
        KINDS["unguided"]()
        fastguide.guided_step(table, 3, draw(), draw(seed=1))
    assert list(repeat._seen) == [table._token for table in tables[2:]]
    assert repeat.kinds_of == {}


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_threads_repeat_steps_of_one_kind_at_once(name):
    """Of so many elements that the library lets other threads of Python run."""
    x = draw(200, 200)
    outputs = [draw(200, 200, seed=seed) for seed in range(4)]

    def step(place):
        return fastguide.guided_step(TABLES[name], 3, x, outputs[place], generator=generator(), out=torch.empty_like(x))

    expected = [step(place) for place in range(4)]
    wrong = []

    def work(place):
        for _ in range(100):
            if not torch.equal(step(place), expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_repeated_and_refused_steps_keep_no_references():
    x, both, out, inpainting = draw(), draw(4, 3, 4), torch.empty(SHAPE), Inpainting(draw(), draw(), draw())
    predictions, random = pair(), generator()
    shared = in_one(0, 5)

    def steps():
        fastguide.guided_step(DDIM, 3, x, predictions, GUIDANCE, inpainting=inpainting)
        fastguide.guided_step(DDPM, 3, x, both, GUIDANCE, generator=random, out=out)
        fastguide.guided_step(DDPM, 3, out, both, GUIDANCE, generator=random, out=out)
        fastguide.guided_step(DDIM, CURSOR.start(DDIM, 3), x, predictions, GUIDANCE, out=x)
        for bad in ({"index": 99}, {"sample": shared[0], "out": shared[1]}, {"predictions": [x, None]}):
            arguments = {"index": 3, "sample": x, "predictions": predictions, "out": out} | bad
            with pytest.raises((ValueError, TypeError, IndexError)):
                fastguide.guided_step(DDIM, guidance=GUIDANCE, **arguments)

    watched = (
        x,
        both,
        out,
        *predictions,
        random,
        predictions,
        inpainting,
        *inpainting,
        *shared,
        GUIDANCE,
        CURSOR,
        DDIM,
    )
    for _ in range(4):
        steps()
    before = [sys.getrefcount(each) for each in watched]
    for _ in range(50):
        steps()
    assert [sys.getrefcount(each) for each in watched] == before


def test_an_instruction_set_that_is_chosen_later_is_used():
    for _ in range(3):
        KINDS["many elements"]()
    chosen = native.cpu_capability()
    try:
        native.set_cpu_capability("baseline")
        got = KINDS["many elements"]()
        repeat.forget()
        assert torch.equal(got, KINDS["many elements"]())
    finally:
        native.set_cpu_capability(chosen)
