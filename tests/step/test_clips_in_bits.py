"""What a recorded step keeps of its clip: a bit an element, which gives the gradients that its inputs would give."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, History, NoiseSchedule
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.backward import empty_clipped
from fastguide.step.operator import StepArguments

SCHEDULE = NoiseSchedule.linear()
CLIPPED = fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0)
BOTH = [name for name in ("reference", "native") if BACKENDS[name].devices != ()]
SHAPES = [(3,), (2, 5), (3, 4, 9, 7), (2, 3, 47, 61)]  # some blocks and parts of a sample, and what is left


def numbers(number, shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(number)]


def step_of(count, shape, dtype, predicted, index):
    """Return a step's arguments, with a classifier's gradient."""
    x, g, z = numbers(3, shape, dtype)
    of_predictions = [1.0] if count < 2 else [0.5, *[0.7] * (count - 1)]
    precision = torch.promote_types(dtype, torch.float32)
    weights = torch.tensor([[[*of_predictions, 0.9]]], dtype=precision)
    host = torch.tensor(index) if isinstance(index, list) else None
    rows = CLIPPED.device_rows(None, precision)
    predictions = numbers(count, shape, predicted)
    row = 0 if host is not None else index
    return StepArguments(torch.empty_like(x), None, None, x, predictions, rows, weights, row, host, g, None, z)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("count", "dtype", "predicted"),
    [
        (1, torch.float32, torch.float32),
        (2, torch.float32, torch.bfloat16),
        (3, torch.float16, torch.float16),
        (5, torch.float64, torch.float64),
    ],
)
def test_backends_write_the_same_bits_and_the_same_step(count, dtype, predicted, shape):
    a = step_of(count, shape, dtype, predicted, list(range(1, 1 + shape[0])))
    plain = torch.empty_like(a.out)
    torch.ops.fastguide.guided_step(*a._replace(out=plain))
    found = []
    for name in BOTH:
        places = empty_clipped(a.sample).fill_(0xFF)
        BACKENDS[name].clipped(*a, clipped=places)
        found.append(places)
        if name == "native":
            assert torch.equal(a.out, plain)
    assert found[0].shape == (shape[0], -(-plain[0].numel() // 8))
    differing = (found[0] ^ found[-1]).count_nonzero()
    assert differing <= 1e-5 * plain.numel()  # at the edge of a clip, x_0 may be rounded otherwise
    if plain.numel() > 1000:
        assert 0.05 < unpacked(found[-1], plain.shape).float().mean() < 0.97


def unpacked(bits, shape):
    """The first element is the lowest bit."""
    ones = torch.stack([(bits.int() // 2**k) % 2 for k in range(8)], -1).flatten(1)
    size = torch.Size(shape).numel() // shape[0]
    assert not ones[:, size:].any()
    return ones[:, :size].reshape(shape).bool()


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_say_where_x_0_is_beyond_the_clip(shape, backend):
    """Written in float64, by the formula."""
    x, uncond, cond = numbers(3, shape, torch.float64)
    row = {name: values[3] for name, values in CLIPPED.coefficients().items()}
    m = uncond + 3.0 * (cond - uncond)
    x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
    rows = CLIPPED.device_rows(None, torch.float64)
    weights = ClassifierFree(3.0).weights(x.device, torch.float64)
    a = StepArguments(torch.empty_like(x), None, None, x, [uncond, cond], rows, weights, 3, None, None, None, None)
    bits = empty_clipped(x)
    BACKENDS[backend].clipped(*a, clipped=bits)
    assert torch.equal(unpacked(bits, shape), x0.abs() > 1.0)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_at_the_edge_or_not_a_number_is_not_clipped(dtype, backend):
    """As ``torch.clamp`` passes gradients on."""
    ones = torch.ones(2, dtype=torch.float64)
    columns = {"x0_scale": ones, "x0_sample": ones, "out_x0": ones, "clip": ones}
    table = fastguide.StepTable.from_columns(torch.tensor([1, 0]), columns)
    edge = torch.ones((), dtype=dtype)
    beyond = torch.nextafter(edge, 2 * edge)
    values = [0.0, 1.0, -1.0, beyond, -beyond, torch.nan, torch.inf, -torch.inf] * 3
    x = torch.tensor([values[:21]], dtype=dtype, requires_grad=True)  # a register or two, and some that are left
    fastguide.guided_step(table, 0, x, [], backend=backend).sum().backward()
    assert x.grad[0].tolist() == ([1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0] * 3)[:21]


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("shape", [(2, 5), (3, 4, 9, 7), (2, 3, 47, 61)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one of several"])
def test_gradients_are_those_that_the_inputs_would_give(shape, layout, backend):
    """To the bit, with all that reads the clip: x_0, the history, rows of their own, and the classifier's gradient."""
    table, steps = fastguide.dpm_solver(SCHEDULE, 6), torch.tensor([2, 1, 3])[: shape[0]]
    part = torch.full((len(table),), 0.8, dtype=torch.float64)
    gradients = {"epsilon": {"x0_grad": part, "out_grad": -part}}
    columns = table.coefficients() | {"clip": part}
    table = fastguide.StepTable.from_columns(table.timesteps, columns, gradients=gradients)
    tensors = numbers(7, shape)
    if layout == "channels_last" and len(shape) == 4:
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    elif layout == "one of several":
        tensors = [torch.stack([t] * 2, 1)[:, 0] for t in tensors]
    x, g, *predictions = (t.requires_grad_() for t in tensors[:4])
    guidance = ClassifierFree(3.0) + Classifier(None, 0.7)

    def gradients():
        history = History(table, x)
        history = history.continued(torch.full_like(history.entries, 0.3), steps)
        original = torch.empty_like(x)
        y = fastguide.guided_step(
            table, steps, x, predictions, guidance, gradient=g, history=history, original=original, backend=backend
        )
        outputs, came = (y, original, history.entries), (*tensors[5:], torch.full_like(history.entries, 0.4))
        return torch.autograd.grad(outputs, [x, g, *predictions], came)

    with_bits = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, backend, BACKENDS[backend]._replace(clipped=None))
        with_inputs = gradients()
    for ours, expected in zip(with_bits, with_inputs, strict=True):
        assert torch.equal(ours, expected)
        assert ours.count_nonzero() > 0 or x.numel() < 100


@pytest.mark.parametrize("backend", BOTH)
def test_inputs_may_be_written_to_and_freed_after_the_step(backend):
    table = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
    x, *predictions = (t.requires_grad_() for t in numbers(4, (2, 3, 8, 8)))
    weigh = torch.randn(2, 3, 8, 8)
    guidance = Composed([2.0, 0.5])

    def run(writes):
        copies = [t.clone() for t in (x, *predictions)]
        y = fastguide.guided_step(table, 2, copies[0], copies[1:], guidance, backend=backend)
        if writes:
            for t in copies:
                t.detach().fill_(torch.nan)
        return torch.autograd.grad(y, [x, *predictions], weigh)

    for ours, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BOTH)
def test_an_empty_batch_and_an_empty_sample(backend):
    table = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
    for shape in ((0, 3, 4), (2, 0, 4)):
        x = torch.zeros(shape, requires_grad=True)
        y = fastguide.guided_step(table, 2, x, [x, x], ClassifierFree(3.0), backend=backend)
        y.sum().backward()
        assert x.grad.shape == shape
