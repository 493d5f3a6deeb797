"""A cursor on the device: the step reads where each sample stands, moves it on, and leaves finished samples alone."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import Cursor
from tests.support.cases import TABLES
from tests.support.step_inputs import make_guidance, make_inputs

SHAPE = (3, 3, 17, 19)
END = 10


def step(table, index, inputs, sample, **arguments):
    if not {"seeds", "generator"} & arguments.keys():
        arguments["noise"] = inputs.noise
    guidance = make_guidance(len(inputs.predictions), None)
    return fastguide.guided_step(
        table, index, sample, inputs.predictions, guidance, variance=inputs.variance, **arguments
    )


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_with_a_cursor_is_a_loop_over_indices(backend, name, generator):
    table = TABLES[name]
    inputs = make_inputs(table, SHAPE, generator)
    cursor, sample = Cursor(timesteps=2).start(table), inputs.sample.clone()
    expected = inputs.sample
    for index in range(len(table)):
        assert cursor.timestep.tolist() == [table.host_timesteps[index]] * 2
        expected = step(table, index, inputs, expected, backend=backend)
        assert step(table, cursor, inputs, sample, out=sample, backend=backend) is sample
        assert torch.equal(sample, expected)
        assert cursor.state.tolist() == [[index + 1, END, 0, 0]]


@pytest.mark.parametrize("timestep_dtype", [torch.int64, torch.float32])
def test_each_sample_where_it_stands(backend, timestep_dtype, generator):
    """At other rows, with other ends: each as by itself, and finished samples and their timesteps are not touched."""
    table = TABLES["ddpm"]
    inputs = make_inputs(table, SHAPE, generator)
    cursor = Cursor(3, timesteps=6, timestep_dtype=timestep_dtype)
    begins, ends = [2, 0, 7], [4, 1, 10]
    for b, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        cursor.place(b, begin, end, table.host_timesteps[begin])
    sample, staged = inputs.sample.clone(), torch.zeros(6, *SHAPE[1:], dtype=torch.bfloat16)
    for now in range(4):
        before = sample.clone(), staged.clone(), cursor.timestep.clone()
        rows = torch.tensor([min(begin + now, END - 1) for begin in begins])
        expected = torch.zeros_like(staged)
        moved = step(table, rows, inputs, before[0], backend=backend, staged=expected)
        step(table, cursor, inputs, sample, out=sample, backend=backend, staged=staged)
        for b in range(3):
            live = begins[b] + now < ends[b]
            assert torch.equal(sample[b], moved[b] if live else before[0][b])
            assert torch.equal(staged[b::3], expected[b::3] if live else before[1][b::3])
            following = table.host_timesteps[begins[b] + now + 1] if begins[b] + now + 1 < END else 0
            assert cursor.timestep[b::3].tolist() == ([following] * 2 if live else before[2][b::3].tolist())
    assert cursor.state[:, 0].tolist() == ends


def test_a_finished_loop_stays_as_it_is(backend, generator):
    table = TABLES["ddim noisy"]
    inputs = make_inputs(table, SHAPE, generator)
    cursor, sample = Cursor().start(table, 4, 4), inputs.sample.clone()
    step(table, cursor, inputs, sample, out=sample, backend=backend)
    assert torch.equal(sample, inputs.sample)
    assert cursor.state.tolist() == [[4, 4, 4, 0]]
    assert cursor.timestep == table.host_timesteps[4]


def test_portable_noise_counts_from_the_first_step(backend, generator):
    """So that a request that begins at another row of a shared table draws what it draws by itself."""
    table = TABLES["ddpm"]
    inputs = make_inputs(table, SHAPE, generator)
    seeds = torch.tensor([5, 6, 7])
    alone, cursor = inputs.sample.clone(), Cursor(3)
    for b in range(3):
        cursor.place(b, 3 * b, END, table.host_timesteps[3 * b])
    shared = inputs.sample.clone()
    for now in range(3):
        step(table, cursor, inputs, shared, out=shared, seeds=seeds, backend=backend)
        for b in range(3):
            part = inputs.map(lambda t, b=b: t[b : b + 1])
            sliced = table[3 * b :]
            alone[b : b + 1] = step(sliced, now, part, alone[b : b + 1], seeds=seeds[b : b + 1], backend=backend)
    assert torch.equal(shared, alone)


def test_many_samples_and_timesteps(backend, generator):
    """More than one share of what moves the cursors on."""
    table = TABLES["ddim"]
    inputs = make_inputs(table, (131, 5), generator)
    cursor = Cursor(131, timesteps=3 * 131).start(table)
    sample = inputs.sample.clone()
    step(table, cursor, inputs, sample, out=sample, backend=backend)
    assert cursor.state[:, 0].tolist() == [1] * 131
    assert cursor.timestep.tolist() == [table.host_timesteps[1]] * 393


def test_double_precision(generator):
    table = TABLES["ddim"]
    for name in ("native", "reference"):
        inputs = make_inputs(table, SHAPE, generator, dtype=torch.float64)
        cursor, sample = Cursor().start(table), inputs.sample.clone()
        step(table, cursor, inputs, sample, out=sample, backend=name)
        assert torch.equal(sample, step(table, 0, inputs, inputs.sample, backend=name))
        assert cursor.timestep == table.host_timesteps[1]


def test_torch_s_stream_moves_on_with_the_loop():
    """The GPU's code on the host: a step without noise, and a finished loop, draw nothing."""
    device_code = pytest.importorskip("device_code")
    if device_code.why_not() is not None:
        pytest.skip(device_code.why_not())
    table = fastguide.ddpm(fastguide.NoiseSchedule.linear(), 3)
    rows, weights = table.device_rows(None, torch.float32), torch.tensor([[[1.0, 0.0]]])
    for shape in ((1, 100), (2, 1024)):  # single elements, and vectors
        state, cursor = torch.tensor([5, 16, 0]), Cursor().start(table)
        sample, expected = torch.ones(shape), torch.ones(shape)
        increment = fastguide.step.noise.torch_increment(sample.numel(), 256)
        for index in range(4):
            offset = 16 + min(index, 2) * increment
            assert state.tolist() == [5, offset, 0]
            if index < 3:
                philox = torch.tensor([5, offset]) if index < 2 else None
                arguments = [rows, weights, index, None, None, None, None, None, philox, 256 if index < 2 else 0]
                device_code.guided_step(expected, None, None, expected, [expected.clone()], *arguments)
            arguments = [rows, weights, 0, None, None, None, None, None, state, 256, cursor.state, cursor.timestep]
            device_code.guided_step(sample, None, None, sample, [sample.clone()], *arguments)
            assert torch.equal(sample, expected)
        assert cursor.state.tolist() == [[3, 3, 0, 0]]


BAD = {
    "another output": ({"out": None}, "out: expected the sample itself with a Cursor.*got None"),
    "a copy": ({"out": torch.zeros(2, 4)}, "out: expected the sample itself with a Cursor.*got another tensor"),
    "another batch": ({"cursor": Cursor(3)}, "index: expected a Cursor for 2 samples or one for all, got 3"),
    "beyond the table": ({"begin": 12}, "index: expected 0 to 9 for a table of 10 steps, got 12"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    arguments, message = BAD[case]
    table, sample = TABLES["ddim"], torch.zeros(2, 4)
    cursor = arguments.get("cursor", Cursor(2))
    cursor.state[:, 0], cursor.state[:, 1] = arguments.get("begin", 0), 20
    with pytest.raises((ValueError, IndexError), match=message):
        fastguide.guided_step(table, cursor, sample, sample, out=arguments.get("out", sample))
    assert torch.equal(sample, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cursor(0), "batch: expected an integer from 1 on or None, got 0"),
        (lambda: Cursor(2, timesteps=3), "timesteps: expected a multiple of the batch of 2, got 3"),
        (lambda: Cursor(timestep_dtype=torch.int32), "timestep_dtype: expected one of"),
        (lambda: Cursor().start(TABLES["ddim"], 3, 11), "begin, end: expected 0 <= begin <= end <= 10, got 3 and 11"),
        (lambda: Cursor().place(0, 0, 1, 9), "sample: expected a Cursor for several samples"),
        (lambda: Cursor(2).place(2, 0, 1, 9), "sample: expected 0 to 1, got 2"),
        (lambda: Cursor(2).place(0, -1, 1, 9), "begin, end: expected 0 <= begin <= end, got -1 and 1"),
        (lambda: Cursor().start(20), "table: expected a StepTable, got int"),
        (lambda: Cursor().start(TABLES["ddim"], 1.5), "begin: expected an integer, got 1.5"),
    ],
)
def test_cursors_that_cannot_be(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
