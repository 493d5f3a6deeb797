"""Steps that make weights for each group of a sample's elements: the kernels against the reference, and their bits."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Cursor, Normalized, as_guidance, guided_step
from fastguide.step.backends import reference
from fastguide.step.backends.native import CAPABILITIES, cpu_capability, set_cpu_capability
from fastguide.step.operator import StepArguments

TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
ADDS_NOISE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10, eta=1.0)


@as_guidance(predictions=3, dim=-1)
def of_three(v, scale):
    first, second, third = v.predictions
    return first + scale * (v.std(second) / v.std(first)) * (third - first) + v.sum(third) / v.numel * v.sample


GUIDANCES = {
    "normalized": Normalized([4.0, 3.0, 2.0], dim=-1),
    "projected": AdaptiveProjected(4.0, norm_threshold=2.0, norm_dim=-1),
    "three terms and deviations": of_three(2.0),
}
SHAPES = {
    "fewer groups than at once": (3, 5, 64),
    "not as many as fit": (3, 67, 24),
    "shorter than lanes": (3, 50, 3),
    "longer than a block": (3, 2, 777),
    "longer than a part": (3, 2, 4099),
    "of several parts": (3, 2, 20_011),
}


def grouped(guidance, shape, dtype=torch.float32, **changed):
    """The operator's arguments, as ``guided_step`` gives them on the CPU; groups are along the last dimension."""
    count, arithmetic = guidance.num_predictions, torch.float64 if dtype == torch.float64 else torch.float32
    x, first, *others = torch.randn(1 + count, *shape, dtype=arithmetic)
    program, parameters = guidance.weights_from.on(x.device)
    columns = len(guidance.weights_from.program.weights) + 1
    arguments = StepArguments(
        out=torch.zeros_like(x), original=None, staged=None, sample=x,
        predictions=[first.to(dtype), *((first + 0.3 * other).to(dtype) for other in others)],
        rows=TABLE.device_rows(None, arithmetic), weights=guidance.weights(x.device, arithmetic), index=3,
        indices=None, gradient=None, variance=None, noise=None, program=program, parameters=parameters,
        made=torch.zeros(shape[0] * shape[1], columns, dtype=arithmetic),
    )  # fmt: skip
    return arguments._replace(**changed)


def run(arguments, step=torch.ops.fastguide.guided_step):
    arguments = arguments._replace(out=arguments.out.clone(), made=arguments.made.clone())
    step(*arguments)
    return arguments.out, arguments.made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_weights_are_the_reference_s(guidance, shape, dtype):
    arguments = grouped(guidance, shape, dtype)
    (out, made), (expected, weights) = run(arguments), run(arguments, reference.guided_step)
    exact = dtype == torch.float64
    torch.testing.assert_close(made, weights, rtol=1e-9 if exact else 2e-6, atol=1e-12 if exact else 1e-6)
    scale = expected.abs().max()
    torch.testing.assert_close(out / scale, expected / scale, rtol=0, atol=1e-9 if exact else 1e-6)


def test_bits_depend_on_nothing_but_the_group():
    """Neither on the batch, nor on threads, nor on how the predictions come."""
    arguments = grouped(GUIDANCES["normalized"], (3, 2000, 64), seeds=torch.tensor([1, 2, 3]))
    arguments = arguments._replace(rows=ADDS_NOISE.device_rows(None, torch.float32))
    out, made = run(arguments)
    alone = arguments._replace(
        sample=arguments.sample[1:2], predictions=[each[1:2] for each in arguments.predictions], out=arguments.out[1:2],
        made=arguments.made[2000:4000], seeds=arguments.seeds[1:2], weights=arguments.weights[:, 1:2],
        parameters=arguments.parameters[:, 1:2].contiguous(),
    )  # fmt: skip
    stacked = arguments._replace(predictions=[torch.cat(arguments.predictions)])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            for each, samples in ((arguments, slice(None)), (alone, slice(1, 2)), (stacked, slice(None))):
                got_out, got_made = run(each)
                assert torch.equal(got_out, out[samples])
                assert torch.equal(got_made, made.view(3, 2000, 3)[samples].flatten(0, 1))
    finally:
        torch.set_num_threads(threads)
    some = slice(37, 101)
    parts = [tensor[:, some].contiguous() for tensor in (arguments.sample, *arguments.predictions)]
    x, *predictions = parts
    part = grouped(GUIDANCES["normalized"], (3, 64, 64))
    got_out, got_made = run(part._replace(sample=x, predictions=predictions))
    assert torch.equal(got_made.view(3, 64, 3), made.view(3, 2000, 3)[:, some])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("apart", [True, False], ids=["", "nearly cancelling"])
@pytest.mark.parametrize("name", GUIDANCES)
def test_threads_that_share_long_groups_make_the_same_bits(name, apart, dtype):
    """Six groups of five parts, whether a thread has a whole group, or some parts of several."""
    guidance, count = GUIDANCES[name], GUIDANCES[name].num_predictions
    arguments = grouped(guidance, (3, 2, 20_011), dtype)
    if not apart:  # of the second group: its moments are added up again
        first = arguments.predictions[0]
        predictions = [first] + [first + 1e-3 * (k + first.flip(-1)) * first for k in range(1, count)]
        predictions = [each.clone() for each in predictions]
        for each in predictions:
            each[:, 0] = torch.randn(each[:, 0].shape, dtype=torch.float64).to(dtype)
        arguments = arguments._replace(predictions=predictions)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(arguments)
        for number in (4, 7, 16):
            torch.set_num_threads(number)
            assert all(map(torch.equal, run(arguments), expected))
            alone = arguments._replace(out=arguments.out[:1], made=arguments.made[:2], sample=arguments.sample[:1],
                predictions=[each[:1] for each in arguments.predictions], weights=arguments.weights[:, :1],
                parameters=arguments.parameters[:, :1].contiguous())  # fmt: skip
            out, made = run(alone)
            assert torch.equal(out, expected[0][:1])
            assert torch.equal(made, expected[1][:2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(3, 41, 31), (3, 2, 9001)], ids=["short", "of several parts"])
@pytest.mark.parametrize("name", GUIDANCES)
def test_weights_are_the_same_with_every_instruction_set(name, shape):
    arguments = grouped(GUIDANCES[name], shape)
    best, (out, made) = cpu_capability(), run(arguments)
    try:
        for capability in CAPABILITIES:
            chosen = set_cpu_capability(capability)
            got_out, got = run(arguments)
            if chosen == "baseline":  # which rounds products before they are added
                torch.testing.assert_close(got, made, rtol=2e-6, atol=1e-6)
            elif best != "baseline":
                assert torch.equal(got, made), capability
                assert torch.equal(got_out, out), capability
    finally:
        set_cpu_capability(best)


def test_samples_may_have_programs_rows_and_ends_of_their_own():
    words, parameters = GUIDANCES["normalized"].weights_from.on(torch.device("cpu"))
    arguments = grouped(GUIDANCES["normalized"], (3, 9, 20), program=words.expand(3, -1).contiguous())
    assert all(map(torch.equal, run(arguments), run(arguments._replace(program=words))))
    indices = torch.tensor([4, 0, 7])
    got = run(arguments._replace(indices=indices))
    for sample, index in enumerate(indices.tolist()):
        assert torch.equal(got[0][sample], run(arguments._replace(index=index))[0][sample])
    assert parameters.shape[1] == 3


@pytest.mark.parametrize("step", [torch.ops.fastguide.guided_step, reference.guided_step])
def test_cursors_move_on_and_leave_finished_samples(step):
    guidance, x = GUIDANCES["normalized"], torch.randn(3, 9, 20)
    predictions = list(torch.randn(2, 3, 9, 20))
    cursor = Cursor(3)
    cursor.place(0, 2, 10, TABLE.host_timesteps[0])
    cursor.place(1, 5, 5, TABLE.host_timesteps[0])
    cursor.place(2, 7, 10, TABLE.host_timesteps[0])
    arguments = grouped(guidance, (3, 9, 20), predictions=predictions, cursor=cursor.state)
    sample = x.clone()
    step(*arguments._replace(sample=sample, out=sample, timestep=cursor.timestep))
    for k, index in ((0, 2), (2, 7)):
        expected = guided_step(TABLE, index, x, predictions, guidance)
        torch.testing.assert_close(sample[k], expected[k], rtol=1e-5, atol=1e-5)
    assert torch.equal(sample[1], x[1])
    assert cursor.state[:, 0].tolist() == [3, 5, 8]


def test_the_output_may_be_an_input():
    x, u, c = torch.randn(3, 2, 100, 64)
    guidance = Normalized(3.0, dim=-1)
    expected = guided_step(TABLE, 4, x, [u, c], guidance)
    for place in range(3):
        given = [x.clone(), u.clone(), c.clone()]
        guided_step(TABLE, 4, given[0], given[1:], guidance, out=given[place])
        assert torch.equal(given[place], expected)


def test_opcheck():
    for guidance in GUIDANCES.values():
        torch.library.opcheck(
            torch.ops.fastguide.guided_step.default, tuple(grouped(guidance, (3, 5, 12))),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize(("dim", "dynamic"), [(-1, True), (1, None), (1, True)])  # by the kernel, or torch before it
def test_a_compiled_step_is_the_step_of_any_shape(dim, dynamic):
    guidance = Normalized(3.0, dim=dim)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, p: guided_step(TABLE, 3, x, p, guidance), fullgraph=True, backend="eager", dynamic=dynamic
    )
    for tokens in (9, 5):  # from the second shape on, sizes may be symbols
        x, *predictions = torch.randn(3, 2, tokens, 16)
        with torch.no_grad():
            expected = guided_step(TABLE, 3, x, predictions, guidance)
            torch.testing.assert_close(compiled(x, predictions), expected, rtol=1e-5, atol=1e-5)


def test_a_repeated_step_makes_its_weights(monkeypatch):
    guidance, x = Normalized(3.0, dim=-1), torch.randn(2, 7, 16)
    for _ in range(2):
        guided_step(TABLE, 3, x, list(torch.randn(2, 2, 7, 16)), guidance)
    given = list(torch.randn(2, 2, 7, 16))
    expected = guided_step(TABLE, 3, x, given, Normalized(3.0, dim=-1))
    monkeypatch.setattr("fastguide.step.guided_step.checks.validate", None)
    assert torch.equal(guided_step(TABLE, 3, x, given, guidance), expected)
    m = given[0] + 3 * (given[1] - given[0])
    torch.testing.assert_close(guidance.last_weights[0, ..., 0], given[1].norm(dim=-1) / m.norm(dim=-1))


@pytest.mark.parametrize("rows", [4, 3 * 7, 3 * 20 + 1])
def test_groups_that_do_not_divide_the_sample_are_refused(rows):
    arguments = grouped(GUIDANCES["normalized"], (3, 20, 8), made=None)
    with pytest.raises(RuntimeError, match="what divides a sample's elements"):
        torch.ops.fastguide.guided_step(*arguments._replace(made=torch.zeros(rows, 3)))


@pytest.mark.parametrize("threads", [1, 8])
def test_thresholds_follow_long_groups(threads):
    table, guidance = TABLE.with_dynamic_thresholding(0.9, 2.0), Normalized(3.0, dim=-1)
    x, *predictions = torch.randn(3, 2, 3, 9001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = guided_step(table, 4, x, predictions, guidance)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(got, guided_step(table, 4, x, predictions, guidance, backend="reference"))
    assert not torch.equal(got, guided_step(TABLE, 4, x, predictions, guidance))
