"""The CUDA kernel that makes weights: compiled for the host, and interpreted from its PTX, without races."""

from __future__ import annotations

import re

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, ClassifierFree, PerpNeg, Perturbed, ZeroStar, as_guidance
from fastguide.guidance.encoded import PART, scratch_numbers
from fastguide.step.backends import reference
from fastguide.step.operator import StepArguments
from tests.support import device_code
from tests.support.ptx.placed import Placed

pytestmark = [
    pytest.mark.xdist_group("ptx"),  # one process reads the PTX
    pytest.mark.skipif(device_code.why_not() is not None, reason=f"no GPU code: {device_code.why_not()}"),
]
TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)


def of_many(count):
    @as_guidance(predictions=count)
    def many(v, scale):
        first, *others = v.predictions
        total = first
        for number, each in enumerate(others):
            total = total + scale * (number + 1) * v.norm(each - first) / v.norm(first) * (each - first)
        return total

    return many(0.3)


GUIDANCES = {
    "rescaled": ClassifierFree([1.0, 7.5, 3.0], guidance_rescale=0.7),
    "rescaled x_0": ClassifierFree(7.5, guidance_rescale=0.7, space="original"),
    "projected x_0": AdaptiveProjected(7.5, norm_threshold=3.0, base="cond", space="original"),
    "of the step": ZeroStar(4.0, zero_init_steps=3).within(TABLE, 0.2, 0.9),
    "three": Perturbed(7.5, guidance_rescale=0.7),
    "perpendicular": PerpNeg(8.0),
    "four": of_many(4),
}
SHAPES = {"less than a vector": (3, 5), "ragged": (3, 41, 31), "a part": (3, PART), "several parts": (3, 2 * PART + 24)}
DTYPES = {"float32": (torch.float32, torch.float32), "bfloat16": (torch.float32, torch.bfloat16),
          "float16": (torch.float16, torch.float16)}  # fmt: skip


def arguments_of(guidance, shape, dtypes=(torch.float32, torch.float32), place=lambda name, tensor: tensor, **changed):
    """The operator's arguments, each tensor where ``place`` puts it."""
    generator = torch.Generator().manual_seed(shape[-1])
    state, dtype = dtypes
    first = torch.randn(shape, generator=generator)
    given = [
        first,
        *(first + 0.2 * torch.randn(shape, generator=generator) for _ in range(guidance.num_predictions - 1)),
    ]
    x = torch.randn(shape, generator=generator).to(state)
    program, parameters = guidance.weights_from.on(x.device)
    terms, batch = len(guidance.weights_from.program.weights), shape[0]
    numbers = scratch_numbers(terms, batch, x[0].numel())
    tensors = {
        "out": torch.zeros_like(x), "sample": x, "rows": TABLE.device_rows(None, torch.float32),
        "weights": guidance.weights(x.device, torch.float32), "program": program, "parameters": parameters,
        "made": torch.full((batch, terms + 1), torch.nan), "scratch": torch.zeros(numbers, dtype=torch.float64),
    }  # fmt: skip
    tensors |= {name: tensor for name, tensor in changed.items() if isinstance(tensor, torch.Tensor)}
    placed = {name: place(name, tensor.contiguous()) for name, tensor in tensors.items()}
    predictions = [place(f"prediction {k}", p.to(dtype)) for k, p in enumerate(given)]
    others = {name: value for name, value in changed.items() if not isinstance(value, torch.Tensor)}
    fields = dict.fromkeys(StepArguments._fields) | {"index": 4, "philox_threads": 0, "predictions": predictions}
    return StepArguments(**(fields | placed | others))


def expected_of(arguments):
    """What the reference makes of them: the next sample, and the weights."""
    a = arguments._replace(out=arguments.out.clone(), made=arguments.made.clone(), cursor=None)
    reference.guided_step(*a)
    return a.out, a.made


def check(arguments, out, made):
    torch.testing.assert_close(arguments.made, made, rtol=1e-6, atol=1e-6)
    tolerance = 1e-4 if out.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(arguments.out, out, rtol=tolerance, atol=tolerance)
    batch, moments = len(made), arguments.made.shape[1] - 1
    counters = arguments.scratch[len(arguments.scratch) - batch * (moments + 2) :][:batch]
    assert not bool(counters.any())  # as they were


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", GUIDANCES)
def test_the_same_code_compiled_for_the_host(name, shape, dtypes):
    for index in (0, 4):
        arguments = arguments_of(GUIDANCES[name], shape, dtypes, index=index)
        for order in (1, 2):  # a second launch finds its counters as the first did
            device_code.guided_step(*arguments, order=order)
            check(arguments, *expected_of(arguments))


def test_samples_at_rows_of_their_own_and_views():
    """Predictions of other batch strides, not at 16 bytes; a cursor of each sample, one of which is finished."""
    guidance = ClassifierFree([1.0, 7.5, 3.0], guidance_rescale=0.7)
    arguments = arguments_of(guidance, (3, 4099), indices=torch.tensor([4, 0, 9]))
    device_code.guided_step(*arguments)
    check(arguments, *expected_of(arguments))
    wide = torch.zeros(3, 5000)
    wide[:, 1:4100] = arguments.predictions[1]
    shifted = arguments._replace(predictions=[arguments.predictions[0], wide[:, 1:4100]])
    device_code.guided_step(*shifted)
    check(shifted, *expected_of(arguments))
    cursor = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [9, 10, 0, 0]])
    sample = arguments.sample.clone()
    moved = arguments_of(guidance, (3, 4099), cursor=cursor, sample=sample)._replace(out=None)
    moved = moved._replace(out=moved.sample)
    expected, made = expected_of(arguments)
    device_code.guided_step(*moved)
    torch.testing.assert_close(moved.out[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    assert torch.equal(moved.out[1], sample[1])
    assert bool(moved.made[1].isnan().all())
    torch.testing.assert_close(moved.made[[0, 2]], made[[0, 2]], rtol=1e-6, atol=1e-6)


# ---- Interpreted ----


@pytest.mark.parametrize("waves", ["at once", "one by one"])
@pytest.mark.parametrize("name", ["rescaled", "projected x_0", "of the step", "three", "four"])
def test_the_kernel_interpreted(library, name, waves):
    placed = Placed()
    shape = SHAPES["several parts"] if waves == "at once" else SHAPES["ragged"]
    arguments = arguments_of(GUIDANCES[name], shape, DTYPES["bfloat16"], place=placed)
    out, made = expected_of(arguments)
    first, step = device_code.record_all(device_code.arguments_of(*arguments))
    blocks = None if waves == "at once" else [[block] for block in reversed(range(first.blocks))]
    for _ in range(2):
        assert placed.launch(library, first, blocks) == []
        torch.testing.assert_close(arguments.made, made, rtol=1e-6, atol=1e-6)
    assert placed.launch(library, step) == []
    check(arguments, out, made)


def test_words_that_lead_nowhere_stay_within_the_kernel(library):
    """Nobody checks a program that is on a device: the kernel reads and writes nothing but what is its own."""
    program, _ = GUIDANCES["rescaled"].weights_from.on(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for count in (3, 10**6, -5):
        words = torch.randint(-(2**31), 2**31 - 1, program.shape, generator=generator, dtype=torch.int64).int()
        words[0, 0] = count
        placed = Placed()
        arguments = arguments_of(GUIDANCES["rescaled"], SHAPES["ragged"], place=placed, program=words)
        first, _ = device_code.record_all(device_code.arguments_of(*arguments))
        found = placed.launch(library, first)
        assert [text for text in found if "uninitialised" not in text and "initialised" not in text] == []


FAULTS = {
    "no barrier between the warps' sums and their total": lambda text: re.sub(r"bar\.sync[^;]*;", "", text, count=1),
    "a count that releases nothing": lambda text: text.replace("atom.add.release.gpu", "atom.add.relaxed.gpu"),
    "no fence behind the last count": lambda text: re.sub(r"membar\.gl;", "", text),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_interpreter_finds_what_is_missing(library, name):
    """The tests above have teeth."""
    placed = Placed()
    arguments = arguments_of(GUIDANCES["rescaled"], SHAPES["several parts"], place=placed)
    first, _ = device_code.record_all(device_code.arguments_of(*arguments))
    fault = FAULTS[name]

    def changed(text):
        assert fault(text) != text
        return fault(text)

    assert any("race" in text for text in placed.launch(library.changed(first.kernel, changed), first))
