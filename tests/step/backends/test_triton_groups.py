"""The Triton step that makes weights of groups of elements: interpreted against the reference, and within loops."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Momentum, Normalized, Sampler, as_guidance, guided_step
from fastguide.step.backends import reference, triton_groups
from fastguide.step.backends import triton as triton_step
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.weigh import made_in_step, needs_scratch
from tests.step.test_groups import ADDS_NOISE, GUIDANCES, TABLE, grouped, run

triton = pytest.importorskip("triton")
interpreted = pytest.mark.skipif(not BACKENDS["triton"].serves("cpu"), reason="Triton does not interpret here")
STEP = torch.ops.fastguide.guided_step_triton.default
SCHEDULE = fastguide.NoiseSchedule.linear()
SHAPES = {  # samples, groups, elements of a group
    "single elements": (1, 1031, 1),
    "shorter than a vector": (2, 50, 3),
    "tokens": (2, 21, 64),
    "tails": (3, 11, 100),
    "a whole tile": (1, 3, 1024),
    "more warps": (1, 2, 3000),
    "several tiles": (1, 2, 8192),
    "the last tile is not full": (2, 2, 4099),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@as_guidance(predictions=2, dim=-1)
def of_every_operation(v, scale, limit):
    """Two of each: one of them the larger or smaller one."""
    uncond, cond = v.predictions
    shift, far = v.norm(cond - uncond), v.norm(uncond)
    bent = v.exp(-shift / far) + v.minimum(shift, far) + v.maximum(shift, limit) - v.sqrt(v.maximum(far, shift))
    return uncond + v.where(v.step > 2.5, scale * bent, v.where(shift > far, bent, far)) * (cond - uncond)


@as_guidance(predictions=4, dim=-1)
def of_four(v, scale):
    first, *others = v.predictions
    total = first
    for each in others:
        total = total + scale * v.norm(each) / v.norm(first) * (each - first)
    return total


@as_guidance(predictions=2, dim=-1)
def of_extremes(v, limit):
    """NaN where the first operand is; Normalized has one whose second operand is."""
    uncond, cond = v.predictions
    ratio = v.norm(cond) / v.norm(uncond)
    return v.minimum(ratio, limit) * uncond + v.maximum(ratio, limit) * (cond - uncond)


MORE = {
    "every operation": of_every_operation(0.1, 3.0),
    "four": of_four([0.5, 1.0, 2.0]),
    "of x_0": AdaptiveProjected(4.0, norm_threshold=2.0, norm_dim=-1, space="original"),
    "within an interval": Normalized(4.0, dim=-1).within(TABLE, 0.2, 0.35),
}


def check(arguments):
    """As close to the reference as the CPU's kernel comes, weights included."""
    (out, made), (expected, weights) = run(arguments, STEP), run(arguments, reference.guided_step)
    torch.testing.assert_close(made, weights, rtol=2e-6, atol=1e-6, equal_nan=True)
    scale = expected.nan_to_num(0, 0, 0).abs().max()
    rounded = 0.0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out / scale, expected / scale, rtol=rounded, atol=1e-6, equal_nan=True)


@interpreted
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_groups_of_any_size(shape):
    for guidance, dtype in zip(GUIDANCES.values(), DTYPES.values(), strict=True):
        if shape[0] == 3 or guidance is not GUIDANCES["normalized"]:  # which has three scales
            check(grouped(guidance, shape, dtype))


@interpreted
@pytest.mark.parametrize("name", MORE)
def test_any_program(name):
    """Also at another call of the loop, which takes the other side of a comparison."""
    for index, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        check(grouped(MORE[name], (3, 9, 24), dtype, index=index))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_errors_are_those_of_plain_torch(dtype):
    """Twice these at most, against float64; with predictions that cancel to a hundredth, of which torch knows less."""
    table, generator = fastguide.flow_match_euler(fastguide.FlowSchedule(), 10), torch.Generator().manual_seed(1)
    for cancelling in (1.0, 1e-2):
        x, u, other = torch.randn(3, 2, 60, 64, generator=generator)
        u, c = u.to(dtype), (2 / 3 * u + cancelling * other).to(dtype)  # u + 3 (c - u) is of what is other
        arguments = grouped(Normalized(3.0, dim=-1), x.shape, dtype, sample=x, predictions=[u, c])
        arguments = arguments._replace(rows=table.device_rows(None, torch.float32))

        def formula(x, u, c):
            m = u + 3 * (c - u)
            m = c.norm(dim=-1, keepdim=True) / m.norm(dim=-1, keepdim=True) * m
            coefficients = table.coefficients()
            x0 = coefficients["x0_sample"][3] * x + coefficients["x0_pred"][3] * m
            return coefficients["out_x0"][3] * x0 + coefficients["out_sample"][3] * x + coefficients["out_pred"][3] * m

        expected = formula(x.double(), u.double(), c.double())
        ours = (run(arguments, STEP)[0] - expected).abs().max()
        theirs = (formula(x, u.float(), c.float()) - expected).abs().max()
        assert ours <= 2 * theirs


@interpreted
def test_a_group_has_the_bits_that_it_has_alone():
    """Whatever else is in the batch, in views of other strides, and where one tensor holds all predictions."""
    arguments = grouped(GUIDANCES["normalized"], (3, 20, 40), torch.bfloat16, seeds=torch.tensor([1, 2, 3]))
    arguments = arguments._replace(rows=ADDS_NOISE.device_rows(None, torch.float32))
    out, made = run(arguments, STEP)
    wide = [torch.nn.functional.pad(p.flatten(1), (3, 5))[:, 3:-5].view(p.shape) for p in arguments.predictions]
    alone = arguments._replace(
        sample=arguments.sample[1:2], predictions=[each[1:2] for each in arguments.predictions], out=arguments.out[1:2],
        made=arguments.made[20:40], seeds=arguments.seeds[1:2], weights=arguments.weights[:, 1:2],
        parameters=arguments.parameters[:, 1:2].contiguous(),
    )  # fmt: skip
    stacked = arguments._replace(predictions=[torch.cat(arguments.predictions)])
    for each, samples in (
        (arguments._replace(predictions=wide), slice(0, 3)),
        (alone, slice(1, 2)),
        (stacked, slice(0, 3)),
    ):
        got_out, got_made = run(each, STEP)
        assert torch.equal(got_out, out[samples])
        assert torch.equal(got_made, made.view(3, 20, 3)[samples].flatten(0, 1))


@interpreted
def test_what_is_not_finite_or_zero_stays_in_its_group():
    x, u, c = torch.randn(3, 2, 13, 20)
    u[0, 3, 7], c[1, 5, 19], c[1, 6] = torch.inf, torch.nan, 0.0
    u[0, 4] = c[0, 4] = 0.0  # norms of 0
    touched = torch.zeros(2, 13, dtype=torch.bool)
    touched[0, 3] = touched[1, 5] = touched[0, 4] = touched[1, 6] = True
    limited, normalized = Normalized(4.0, dim=-1, at_most=1.5), Normalized(3.0, dim=-1)
    for guidance in (limited, GUIDANCES["projected"], normalized, of_extremes(1.0)):
        arguments = grouped(guidance, x.shape, sample=x, predictions=[u, c])
        check(arguments)
        assert bool(run(arguments, STEP)[0][~touched].isfinite().all())


def case_of(name, shape):
    """What a step may have, with the same of it in the layout of its samples."""
    multistep = fastguide.dpm_solver(SCHEDULE, 10)
    cases = {
        "portable noise": {"rows": ADDS_NOISE, "seeds": torch.tensor([1, 2, 3])},
        "torch's noise": {"rows": ADDS_NOISE, "philox": torch.tensor([5, 16]), "philox_threads": 512},
        "given noise": {"rows": ADDS_NOISE, "noise": torch.randn(shape)},
        "rows of their own": {"indices": torch.tensor([4, 0, 9])},
        "history": {"rows": multistep, "history": torch.randn(multistep.history_slots * 3, *shape[1:])},
        "more outputs": {"original": torch.zeros(shape), "staged": torch.zeros(6, *shape[1:])},
        "a gradient": {"gradient": torch.randn(shape), "weights": torch.tensor([1.0, 4.0, 0.7]).expand(1, 3, 3)},
        "a mask": {"mask": torch.rand(shape).round(decimals=1), "known": torch.randn(shape),
                   "known_noise": torch.randn(shape)},
    }  # fmt: skip
    changed = cases[name]
    if "rows" in changed:
        changed["rows"] = changed["rows"].device_rows(None, torch.float32)
    return changed


@interpreted
@pytest.mark.parametrize("shape", [(3, 9, 64), (3, 7, 20), (3, 2, 1032)], ids=["full", "tails", "several tiles"])
@pytest.mark.parametrize(
    "name",
    ["portable noise", "torch's noise", "given noise", "rows of their own", "history", "more outputs", "a gradient",
     "a mask"],
)  # fmt: skip
def test_a_step_may_have_all_that_it_has_without_groups(monkeypatch, name, shape):
    monkeypatch.setattr(triton_groups, "BLOCK", 256)  # fewer elements of a tile
    arguments = grouped(GUIDANCES["normalized"], shape, torch.bfloat16, **case_of(name, shape))
    if name in ("portable noise", "torch's noise"):  # the same values without groups: a step of nothing else
        drawn = torch.zeros(shape)
        nothing = {"made": None, "program": None, "parameters": None, "predictions": [torch.zeros(shape)] * 2}
        rows = torch.zeros_like(arguments.rows)
        rows[:, fastguide.solvers.table.ROW_COLUMNS.index("out_noise")] = 1
        STEP(*arguments._replace(out=drawn, rows=rows, **nothing))
        assert 0.9 < float(drawn.std()) < 1.1
        expected, _ = run(arguments._replace(noise=drawn, seeds=None, philox=None), STEP)
        assert torch.equal(run(arguments, STEP)[0], expected)
        return
    written = [key for key in ("original", "staged", "history") if getattr(arguments, key) is not None]
    mine, theirs = (
        arguments._replace(**{key: getattr(arguments, key).clone() for key in (*written, "out", "made")})
        for _ in range(2)
    )
    STEP(*mine)
    reference.guided_step(*theirs)
    torch.testing.assert_close(mine.made, theirs.made, rtol=2e-6, atol=1e-6)
    for key in (*written, "out"):
        scale = getattr(theirs, key).abs().max()
        torch.testing.assert_close(getattr(mine, key) / scale, getattr(theirs, key) / scale, rtol=0, atol=1e-6)


@interpreted
def test_finished_samples_are_left_and_rows_beyond_the_table_are_nan():
    arguments = grouped(GUIDANCES["normalized"], (3, 9, 20), index=4)
    out, made = run(arguments, STEP)
    cursor, sample = torch.tensor([[4, 10, 0, 0], [7, 7, 0, 0], [10, 11, 0, 0]]), arguments.sample.clone()
    timestep = torch.zeros(3, dtype=torch.int64)
    moved = arguments._replace(cursor=cursor, sample=sample, out=sample, timestep=timestep)
    moved.made.fill_(torch.nan)
    STEP(*moved)
    assert torch.equal(moved.out[0], out[0])
    assert torch.equal(moved.made[:9], made[:9])
    assert torch.equal(moved.out[1], arguments.sample[1])
    assert bool(moved.made[9:18].isnan().all())
    assert bool(moved.out[2].isnan().all())
    assert cursor[:, 0].tolist() == [5, 7, 10]
    assert cursor[:, 3].tolist() == [0, 0, 0]
    assert int(timestep[0]) == TABLE.host_timesteps[5]


@interpreted
def test_programs_and_noise_count_the_calls_of_a_loop_that_begins_within_the_table():
    arguments = grouped(MORE["every operation"], (2, 5, 8), seeds=torch.tensor([1, 2]))
    arguments = arguments._replace(rows=ADDS_NOISE.device_rows(None, torch.float32))
    cursor = torch.tensor([[5, 10, 3, 0], [5, 10, 0, 0]])  # two calls before, which the program has a branch for, or 5
    mine, theirs = (arguments._replace(cursor=cursor.clone(), made=arguments.made.clone()) for _ in range(2))
    samples = []
    for each, step in ((mine, STEP), (theirs, torch.ops.fastguide.guided_step)):
        samples.append(arguments.sample.clone())
        step(*each._replace(sample=samples[-1], out=samples[-1]))
    torch.testing.assert_close(mine.made, theirs.made, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(*samples, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mine.made[:5, 1], mine.made[5:, 1], rtol=0.1)


@interpreted
def test_the_output_may_be_an_input():
    for shape in ((1, 20, 64), (1, 2, 8192)):
        arguments = grouped(GUIDANCES["projected"], shape)
        expected, _ = run(arguments, STEP)
        for place in range(3):
            given = [tensor.clone() for tensor in (arguments.sample, *arguments.predictions)]
            STEP(*arguments._replace(out=given[place], sample=given[0], predictions=given[1:]))
            assert torch.equal(given[place], expected)


# ---- Launches ----


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched, of steps that make weights themselves, as on a GPU."""
    kernels = pytest.importorskip("fastguide.step.backends.triton_kernel")
    of_groups = pytest.importorskip("fastguide.step.backends.triton_groups_kernel")
    of_moments = pytest.importorskip("fastguide.step.backends.triton_moments_kernel")
    seen = []

    def note(kernel, name):
        plain = kernel.run

        def noted(*arguments, **options):
            seen.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(kernel, "run", noted)

    note(kernels.step_kernel, "step_kernel")
    note(of_groups.grouped_step_kernel, "grouped_step_kernel")
    note(of_moments.moments_kernel, "moments_kernel")
    monkeypatch.setattr(triton_groups, "_compiled", {})
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(makes_weights=("cpu",)))
    return seen


@interpreted
def test_a_step_is_one_launch(launches):
    for guidance in (Normalized(4.0, dim=-1), of_four(1.0), MORE["of x_0"]):
        x, *predictions = torch.randn(1 + guidance.num_predictions, 2, 7, 16)
        expected = guided_step(TABLE, 3, x, predictions, guidance, backend="reference")
        weights = guidance.last_weights
        for _ in range(2):
            got = guided_step(TABLE, 3, x, predictions, guidance, backend="triton")
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(guidance.last_weights, weights, rtol=2e-6, atol=1e-6)
        assert guidance.last_weights.shape == (1, 2, 7, guidance.weights_from.program.weights.__len__() + 1)
    assert launches == 6 * ["grouped_step_kernel"]


@interpreted
def test_groups_apart_in_memory_are_guided_before_the_step(launches):
    x, *predictions = torch.randn(3, 2, 7, 16)
    guidance = Normalized(4.0, dim=1)
    expected = guided_step(TABLE, 3, x, predictions, guidance, backend="reference")
    got = guided_step(TABLE, 3, x, predictions, guidance, backend="triton")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert launches == ["step_kernel"]


@interpreted
def test_pixels_of_channels_last_are_groups(launches):
    """Norms over channels, with noise, which is counted as if the picture were contiguous."""
    x, *predictions = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(3, 2, 4, 5, 6))
    guidance, seeds = Normalized(4.0, dim=1), torch.tensor([1, 2])
    got = guided_step(ADDS_NOISE, 3, x, predictions, guidance, seeds=seeds, backend="triton")
    assert launches == ["grouped_step_kernel"]
    expected = guided_step(ADDS_NOISE, 3, x, predictions, Normalized(4.0, dim=1), seeds=seeds, backend="native")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("momentum", [None, -0.5])
def test_loops_make_one_launch_a_step(launches, momentum):
    """A sampler's, and one of steps that are repeated; momentum is one more, of the sum."""
    table = fastguide.ddim(SCHEDULE, 4)

    def model(x, t, y):
        return torch.tanh(x + y[:, None, None])

    def guidance():
        return AdaptiveProjected(4.0, norm_threshold=3.0, norm_dim=-1, momentum=momentum)

    x = torch.randn(2, 5, 16)
    given = {"cond": torch.tensor([1.0, 2.0]), "uncond": torch.zeros(2)}
    got, expected = (Sampler(model, table, guidance(), backend=name)(x, **given) for name in ("triton", "native"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert launches.count("grouped_step_kernel") == 4
    assert len(launches) == 4 if momentum is None else 8

    found = {}
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        each, sample = guidance(), torch.randn(2, 5, 16)
        adding = {} if momentum is None else {"momentum": Momentum(table, each, sample)}
        for index in range(4):
            predictions = list(torch.randn(2, 2, 5, 16).bfloat16())
            sample = guided_step(table, index, sample, predictions, each, backend=backend, **adding)
        found[backend] = sample
    torch.testing.assert_close(found["triton"], found["reference"], rtol=1e-5, atol=1e-5)
    assert launches.count("grouped_step_kernel") == 8


@interpreted
def test_slots_have_scales_and_calls_of_their_own(launches):
    table, x = fastguide.ddim(SCHEDULE, 3, eta=1.0), torch.randn(2, 5, 16)

    def model(x, t, y):
        return torch.tanh(x + y[:, None, None])

    def finished(backend):
        sampler = Sampler(model, table, Normalized(3.0, dim=-1), backend=backend)
        slots, found = sampler.slots(2, capacity=16), {}
        given = {"cond": torch.ones(1), "uncond": torch.zeros(1)}
        slots.admit(x[:1], seed=1, **given)
        slots.step()
        slots.admit(x[1:], seed=2, guidance=Normalized(5.0, dim=-1), **given)
        while slots.active:
            found |= slots.step()
        return torch.cat([found[slot] for slot in range(2)])

    got = finished("triton")
    assert launches == 4 * ["grouped_step_kernel"]
    torch.testing.assert_close(got, finished("native"), rtol=1e-4, atol=1e-4)


@interpreted
def test_a_kernel_is_of_a_program_and_of_groups_of_one_size(launches):
    """By which a capture knows that it may be made; scales and the batch are none of it."""
    for batch, scale in ((2, 3.0), (4, 5.0)):
        guidance = Normalized(scale, dim=-1)
        guided_step(TABLE, 3, torch.randn(batch, 4, 16), list(torch.randn(2, batch, 4, 16)), guidance, backend="triton")
    assert len(triton_groups._compiled) == 1
    for guidance, size in ((Normalized(3.0, dim=-1, at_most=1.0), 16), (Normalized(3.0, dim=-1), 48)):
        guided_step(TABLE, 3, torch.randn(2, 4, size), list(torch.randn(2, 2, 4, size)), guidance, backend="triton")
    assert len(triton_groups._compiled) == 3


@interpreted
def test_a_compilation_in_a_capture_is_refused(launches, monkeypatch):
    arguments = grouped(GUIDANCES["projected"], (3, 5, 8))
    making = triton_groups.StepsGroups(triton_step._each_apart(arguments))
    making._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="steps groups of elements is not compiled for these arguments yet"):
        making(3, triton_step._tensors(arguments))
    assert not launches


# ---- What it takes ----


def test_it_takes_all_groups_that_lie_in_blocks(monkeypatch):
    backend = BACKENDS["reference"]._replace(makes_weights=("meta",), group_elements=64, compiles_programs=True)
    x = torch.empty(2, 5, 64, device="meta")
    taken = {
        "norms": (Normalized(3.0, dim=-1), x, True),
        "three, deviations and the sample": (GUIDANCES["three terms and deviations"], x, True),
        "apart in memory": (Normalized(3.0, dim=1), x, False),
        "longer": (Normalized(3.0, dim=-1), torch.empty(2, 5, 65, device="meta"), False),
        "empty": (Normalized(3.0, dim=-1), torch.empty(0, 5, 64, device="meta"), False),
    }
    for name, (guidance, sample, expected) in taken.items():
        assert made_in_step(backend, guidance.weights_from, sample) == expected, name
    made_by = Normalized(3.0, dim=-1).weights_from
    assert not needs_scratch(backend, made_by, x)
    assert needs_scratch(backend, made_by, x[:, :1])  # one group is a sample
    assert needs_scratch(backend._replace(compiles_programs=False), made_by, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not made_in_step(backend, made_by, x)


@interpreted
@pytest.mark.parametrize("rows", [4, 3 * 7, 3 * 20 + 1])
def test_groups_that_do_not_divide_the_sample_are_refused(rows):
    arguments = grouped(GUIDANCES["normalized"], (3, 20, 8))
    with pytest.raises(RuntimeError, match=r"made: expected float32 of shape .* as divide its 160 elements"):
        STEP(*arguments._replace(made=torch.zeros(rows, 3)))
