"""Projected guidance with momentum: loops against diffusers' guider and the paper's algorithm, and what is refused."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import AdaptiveProjected, Classifier, Cursor, Momentum, Sampler, guided_step, log_prob_of
from fastguide.guidance import space_of
from tests.support.recorded_graph import recorded  # noqa: F401

diffusers = pytest.importorskip("diffusers")
projecting = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
MomentumBuffer, normalized_guidance = projecting.MomentumBuffer, projecting.normalized_guidance

SHAPE, CALLS, SCALE, MOMENTUM = (3, 4, 6, 5), 6, 5.0, -0.6
SCHEDULE = fastguide.NoiseSchedule.linear()
TABLE = fastguide.ddim(SCHEDULE, CALLS)
FLOW = fastguide.flow_match_euler(fastguide.FlowSchedule(shift=3.0), CALLS)
PREDICTION = fastguide.StepTable.from_columns(
    torch.zeros(CALLS, dtype=torch.int64), {"out_pred": torch.ones(CALLS, dtype=torch.float64)}, name="the prediction"
)
COND, UNCOND = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)


def projected(momentum=MOMENTUM, base="uncond", scale=SCALE, **options):
    return AdaptiveProjected(scale, eta=0.3, norm_threshold=2.0, momentum=momentum, base=base, **options)


def drawn(seed=0, dtype=torch.float64, distance=0.1):
    """A sample, and pairs of predictions that nearly agree, for each call."""
    generator = torch.Generator().manual_seed(seed)
    x, *firsts = torch.randn(1 + CALLS, *SHAPE, generator=generator, dtype=torch.float64)
    shifts = torch.randn(CALLS, *SHAPE, generator=generator, dtype=torch.float64)
    pairs = [(u, u + distance * shift) for u, shift in zip(firsts, shifts, strict=True)]
    return x, [tuple(each.to(dtype) for each in pair) for pair in pairs]


def guider(momentum=MOMENTUM, base="uncond", scale=SCALE, **options):
    """diffusers' own, at the same settings, with the buffer that it makes when it prepares its first step."""
    made = diffusers.AdaptiveProjectedGuidance(
        guidance_scale=scale, adaptive_projected_guidance_momentum=momentum, adaptive_projected_guidance_rescale=2.0,
        eta=0.3, use_original_formulation=base == "cond", **options,
    )  # fmt: skip
    made.momentum_buffer = MomentumBuffer(momentum)
    return made


def theirs(guide, call, pair):
    """Return what diffusers' guider makes of two predictions, in their dtype."""
    guide.set_state(call, CALLS, torch.tensor(call))
    uncond, cond = pair
    return guide.forward(cond, uncond if guide._is_apg_enabled() else None).pred


def model(x, t, y):
    return torch.sin(1.3 * x + y.view(-1, 1, 1, 1)) + 0.0001 * t.view(-1, 1, 1, 1)


def their_loop(x, guide, calls=range(CALLS), table=TABLE):
    """Sample with the model, in float64, guided by diffusers."""
    for number, call in enumerate(calls):
        t = torch.full((len(x),), table.host_timesteps[call])
        pair = [model(x, t, y[: len(x)]) for y in (UNCOND, COND)]
        x = guided_step(table, call, x, theirs(guide, number if len(calls) < CALLS else call, pair))
    return x


def sampled(guidance, x, table=TABLE, **options):
    return Sampler(model, table, guidance, **options)(x, cond=COND, uncond=UNCOND)


# ---- A loop of steps ----


@pytest.mark.parametrize("base", ["uncond", "cond"])
@pytest.mark.parametrize("momentum", [-0.75, 0.4])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_loop_is_diffusers(momentum, base, backend):
    """Also the sums themselves, where predictions are given in one tensor."""
    x, pairs = drawn()
    guidance, guide = projected(momentum, base), guider(momentum, base)
    sums = Momentum(TABLE, guidance, x)
    expected = x
    for call, pair in enumerate(pairs):
        given = torch.cat(pair) if call % 2 else pair
        x = guided_step(TABLE, call, x, given, guidance, momentum=sums, backend=backend)
        expected = guided_step(TABLE, call, expected, theirs(guide, call, pair))
        assert (x - expected).norm() <= 1e-12 * expected.norm()
    assert torch.equal(sums.unit * sums.values, guide.momentum_buffer.running_average)


@pytest.mark.parametrize("dim", [(1,), (-1,)])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_norms_of_a_sample_s_parts_are_of_the_sums(backend, dim):
    """As ACE-Step has them: of each channel over the time, of what is added up."""
    x, pairs = drawn(15)
    guidance, expected = projected(-0.75, "cond", norm_dim=dim), MomentumBuffer(-0.75)
    sums = Momentum(PREDICTION, guidance, x[:, 0])
    for call, pair in enumerate(pairs):
        uncond, cond = (each[:, 0] for each in pair)
        got = guided_step(PREDICTION, call, x[:, 0], [uncond, cond], guidance, momentum=sums, backend=backend)
        own = normalized_guidance(cond, uncond, SCALE, expected, 0.3, 2.0, True, dim)
        assert (got - own).norm() <= 1e-12 * own.norm()


def algorithm_1(x, pairs, row_of, scale, momentum=MOMENTUM, base="cond"):
    """Return each call's guided x_0, by the paper's algorithm: momentum, a limited norm, and a projection, of x_0."""
    sums, found = torch.zeros_like(x), []
    for call, pair in enumerate(pairs):
        x0_of_x, x0_of_p = row_of(call)
        uncond, cond = (x0_of_x * x + x0_of_p * each for each in pair)
        sums = cond - uncond + momentum * sums
        norm = sums.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        limited = sums * (2.0 / norm).clamp(max=1.0)
        unit = cond / cond.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        parallel = (limited * unit).flatten(1).sum(1).view(-1, 1, 1, 1) * unit
        guided = (cond if base == "cond" else uncond) + (scale - 1.0) * (limited - parallel + 0.3 * parallel)
        found.append((guided - x0_of_x * x) / x0_of_p)
    return found


@pytest.mark.parametrize("table", [TABLE, FLOW], ids=["epsilon", "velocity"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_in_x_0_it_is_the_paper_s(backend, table):
    x, pairs = drawn(1)
    row = table.coefficients()

    def row_of(call):
        return (float(row["x0_scale"][call] * row[name][call]) for name in ("x0_sample", "x0_pred"))

    guidance = projected(base="cond", scale=SCALE - 1.0, space="original")
    sums = Momentum(table, guidance, x)
    for call, expected in enumerate(algorithm_1(x, pairs, row_of, SCALE)):
        got = guided_step(table, call, x, pairs[call], guidance, momentum=sums, backend=backend)
        torch.testing.assert_close(got, guided_step(table, call, x, expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("table", [fastguide.euler(SCHEDULE, CALLS), TABLE, FLOW], ids=["euler", "ddim", "flow"])
@pytest.mark.parametrize("momentum", [-0.5, 0.5])
@pytest.mark.parametrize("base", ["uncond", "cond"])
def test_in_x_0_float32_is_near(base, momentum, table, backend):
    """The guided predictions, where x_0 is much longer than what the model predicts, and where it is shorter."""
    row, (x, pairs) = table.coefficients(), drawn(16, distance=0.5)
    names = ("x0_scale", "x0_sample", "x0_pred")
    columns = {name: row[name] for name in names} | {"out_pred": torch.ones(CALLS, dtype=torch.float64)}
    predicting = fastguide.StepTable.from_columns(table.timesteps, columns, name="the prediction")
    x, pairs = (table.init_noise_sigma * x).float(), [[each.float() for each in pair] for pair in pairs]

    def row_of(call):
        return (float(row["x0_scale"][call] * row[name][call]) for name in names[1:])

    exact = algorithm_1(x.double(), [[each.double() for each in pair] for pair in pairs], row_of, SCALE, momentum, base)
    plain = algorithm_1(x, pairs, row_of, SCALE, momentum, base)
    guidance = projected(momentum, base, SCALE - 1.0, space="original")
    sums = Momentum(predicting, guidance, x)
    for call, (expected, torch_s) in enumerate(zip(exact, plain, strict=True)):
        got = guided_step(predicting, call, x, pairs[call], guidance, momentum=sums, backend=backend)
        assert (got.double() - expected).norm() <= 2 * (torch_s.double() - expected).norm()


def test_a_call_that_says_nothing_of_x_0_is_no_hindrance_to_the_others():
    x, pairs = drawn(17)
    columns = {
        name: torch.ones(CALLS, dtype=torch.float64) for name in ("x0_scale", "x0_sample", "x0_pred", "out_pred")
    }
    columns["x0_scale"][0] = torch.inf
    undefined = "x is all noise there"
    table = fastguide.StepTable.from_columns(TABLE.timesteps, columns, undefined=undefined, name="from all noise")
    guidance = projected(base="cond", scale=SCALE - 1.0, space="original")
    sums = Momentum(table, guidance, x)
    with pytest.raises(ValueError, match="index: expected a step at which from all noise is defined, got 0"):
        guided_step(table, 0, x, pairs[0], guidance, momentum=sums)
    for call, expected in enumerate(algorithm_1(x, pairs[1:], lambda _: (1.0, 1.0), SCALE), start=1):
        got = guided_step(table, call, x, pairs[call], guidance, momentum=sums)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_of_another_space_sums_are_of_that():
    x, pairs = drawn(2)
    space = space_of(TABLE, "velocity")
    guidance = projected(space=space)
    sums, expected = Momentum(TABLE, guidance, x), 0.0
    for call, (uncond, cond) in enumerate(pairs):
        guided_step(TABLE, call, x, [uncond, cond], guidance, momentum=sums)
        expected = float(space.prediction[call]) * (cond - uncond) + MOMENTUM * expected
    torch.testing.assert_close(sums.unit * sums.values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("base", "dtype"), [("uncond", torch.float32), ("cond", torch.bfloat16)])
def test_float32_is_near(base, dtype, backend):
    """The guided prediction of the last call of a loop, whose sums are of all: in float32, whatever the model's."""
    _, pairs = drawn(3, dtype, 0.02)
    guidance, exact = projected(base=base), guider(base=base)
    x, sums = torch.zeros(SHAPE), Momentum(PREDICTION, guidance, torch.zeros(SHAPE))
    for call, pair in enumerate(pairs):
        got = guided_step(PREDICTION, call, x, pair, guidance, momentum=sums, backend=backend)
        expected = theirs(exact, call, [each.double() for each in pair])
    assert (got.double() - expected).norm() <= 2e-7 * expected.norm()


def test_bits_do_not_depend_on_the_batch():
    x, pairs = drawn(4, torch.float32)
    guidance = projected()

    def loop(samples):
        y, sums = x.float()[samples], Momentum(TABLE, guidance, x.float()[samples])
        for call, pair in enumerate(pairs):
            y = guided_step(TABLE, call, y, [each[samples] for each in pair], guidance, momentum=sums)
        return y

    assert torch.equal(loop(slice(0, 3))[1:2], loop(slice(1, 2)))


def test_a_cursor_s_samples_are_at_calls_of_their_own():
    x, pairs = drawn(5)
    guidance = projected()
    cursor = Cursor(3)
    for sample, (begin, end) in enumerate([(0, 3), (2, CALLS), (0, 0)]):
        cursor.place(sample, begin, end, 0)
    y, sums = x.clone(), Momentum(TABLE, guidance, x)
    for pair in pairs[:4]:
        guided_step(TABLE, cursor, y, pair, guidance, momentum=sums, out=y)
    for sample, calls in enumerate([range(3), range(2, CALLS)]):
        own, one = x[sample : sample + 1], Momentum(TABLE, guidance, x[:1])
        for number, call in enumerate(calls):
            pair = [each[sample : sample + 1] for each in pairs[number]]
            own = guided_step(TABLE, call, own, pair, guidance, momentum=one)
        assert torch.equal(y[sample : sample + 1], own)
    assert torch.equal(y[2], x[2])


def test_a_compiled_step_is_one_graph():
    torch._dynamo.reset()
    x, pairs = drawn(6, torch.float32)
    x, guidance = x.float(), projected()
    here, there = (Momentum(TABLE, guidance, x) for _ in range(2))

    def step(index, x, uncond, cond):
        return guided_step(TABLE, index, x, [uncond, cond], guidance, momentum=here)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for call, pair in enumerate(pairs):
        got = compiled(torch.tensor(call), x, *pair)
        assert torch.equal(got, guided_step(TABLE, call, x, pair, guidance, momentum=there))
    assert torch.equal(here.values, there.values)


# ---- Sampler ----


@pytest.mark.parametrize("cuda_graph", ["loop", "auto", False])
@pytest.mark.parametrize("base", ["uncond", "cond"])
def test_a_sampler_keeps_the_sums(base, cuda_graph, recorded):  # noqa: F811
    """From nothing at the beginning of each loop, wherever in the table that is."""
    x, _ = drawn(7)
    sampler = Sampler(model, TABLE, projected(base=base), cuda_graph=cuda_graph)
    for begin in (0, 0, 2):
        sampler.table = TABLE[begin:]
        got = sampler(x, cond=COND, uncond=UNCOND)
        expected = their_loop(x, guider(base=base), range(begin, CALLS))
        assert (got - expected).norm() <= 1e-12 * expected.norm()
    captured = recorded.captured
    sampler.guidance = projected(0.3, base)
    expected = their_loop(x, guider(0.3, base), range(2, CALLS))
    assert (sampler(x, cond=COND, uncond=UNCOND) - expected).norm() <= 1e-12 * expected.norm()
    assert recorded.captured == captured  # a momentum is a number in a buffer


@pytest.mark.parametrize("skip", [False, True])
def test_calls_outside_of_an_interval_add_nothing(skip):
    x, _ = drawn(8)
    guidance = projected().within(TABLE, 0.2, 0.8)
    got = sampled(guidance, x, skip_unconditional=skip)
    expected = their_loop(x, guider(start=0.2, stop=0.8))
    assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("base", ["uncond", "cond"])
def test_outside_of_an_interval_it_is_the_conditional_prediction(base, backend):
    """However much has been added up."""
    x, pairs = drawn(18, torch.float32)
    guidance = projected(0.9, base).within(PREDICTION, 0.0, 0.5)
    sums = Momentum(PREDICTION, guidance, x.float())
    for call, (uncond, cond) in enumerate(pairs):
        pair = [1e4 * uncond if call < CALLS // 2 else uncond, cond]
        got = guided_step(PREDICTION, call, x.float(), pair, guidance, momentum=sums, backend=backend)
    assert sums.unit * sums.values.abs().max() > 1e4
    torch.testing.assert_close(got, cond, rtol=2e-7, atol=2e-7)


def test_slots_have_sums_of_their_own():
    """Requests of any momenta and intervals share a batch; a place that is taken again begins from nothing."""
    x, _ = drawn(9)
    slots = Sampler(model, TABLE, projected()).slots(2)
    settings = [(MOMENTUM, 0.0), (0.3, 0.0), (MOMENTUM, 0.5), (0.3, 0.0)]
    kinds = [projected(momentum).within(TABLE, start) for momentum, start in settings]
    waiting, finished, owners = list(range(len(kinds))), {}, {}
    while len(finished) < len(kinds):
        if waiting and slots.free:
            number = waiting.pop(0)
            one = {"cond": COND[:1], "uncond": UNCOND[:1]}
            owners[slots.admit(x[:1], guidance=kinds[number], **one)] = number
        finished |= {owners[slot]: sample for slot, sample in slots.step().items()}
    for number, (momentum, start) in enumerate(settings):
        expected = their_loop(x[:1], guider(momentum, start=start))
        assert (finished[number] - expected).norm() <= 1e-12 * expected.norm(), number


def test_what_is_recorded_one_by_one():
    """Its log-probabilities are those of the same steps looked at later, whose momentum is moved on likewise."""
    x, table = drawn(10, torch.float32)[0].float(), fastguide.ddim(SCHEDULE, CALLS, eta=1.0)
    guidance = projected()
    sampler = Sampler(model, table, guidance)
    arguments = {"cond": COND, "uncond": UNCOND, "seeds": [1, 2, 3]}
    way = sampler.trajectory(x, log_prob=True, **arguments)
    torch.testing.assert_close(way.sample, sampler(x, **arguments), rtol=1e-5, atol=1e-5)
    sums = Momentum(table, guidance, x)
    for call in range(CALLS):
        t = torch.full((3,), table.host_timesteps[call])
        pair = [model(way.samples[call], t, y) for y in (UNCOND, COND)]
        if table.adds_noise[call]:
            given = table, call, way.samples[call], pair, guidance, way.samples[call + 1]
            assert torch.equal(log_prob_of(*given, momentum=sums), way.log_probs[call])
    with pytest.raises(ValueError, match="index: expected a call after the last one"):
        log_prob_of(*given, momentum=sums)


def test_a_classifier_beside_it_and_scales_of_samples():
    x, pairs = drawn(11)
    scales = [2.0, 4.0, 8.0]
    guidance, gradient = projected(scale=scales) + Classifier(None, 0.5), torch.ones_like(x)
    plain = [Momentum(TABLE, projected(scale=scale), x[:1]) for scale in scales]
    sums = Momentum(TABLE, guidance, x)
    for call, pair in enumerate(pairs):
        got = guided_step(TABLE, call, x, pair, guidance, momentum=sums, gradient=gradient)
        for sample, scale in enumerate(scales):
            one = slice(sample, sample + 1)
            own = projected(scale=scale) + Classifier(None, 0.5)
            given = [each[one] for each in pair]
            expected = guided_step(TABLE, call, x[one], given, own, momentum=plain[sample], gradient=gradient[one])
            assert torch.equal(got[one], expected)
    assert guidance.of_samples(slice(1, 2)).num_conditions == 2


# ---- What is refused ----


def test_a_step_needs_what_its_loop_has_added_up():
    x, pairs = drawn(12)
    guidance = projected()
    for base in ("uncond", "cond"):
        with pytest.raises(ValueError, match=r"momentum: expected a Momentum\(table, guidance, sample\) of the loop's"):
            guided_step(TABLE, 0, x, pairs[0], projected(base=base))
    with pytest.raises(ValueError, match="momentum: expected a Momentum"):
        log_prob_of(fastguide.ddim(SCHEDULE, 3, eta=1.0), 0, x, pairs[0], guidance, x)
    with pytest.raises(TypeError, match="guidance: expected guidance without momentum"):
        guidance.terms(pairs[0])
    sums = Momentum(TABLE, guidance, x)
    with pytest.raises(ValueError, match="momentum: expected None, as no momentum is in the guidance Adapt"):
        guided_step(TABLE, 0, x, pairs[0], AdaptiveProjected(4.0), momentum=sums)
    with pytest.raises(TypeError, match="momentum: expected a Momentum, got float"):
        guided_step(TABLE, 0, x, pairs[0], guidance, momentum=-0.5)


def test_a_momentum_is_of_one_loop():
    x, pairs = drawn(13)
    guidance = projected()
    sums = Momentum(TABLE, guidance, x)

    def step(index=0, table=TABLE, x=x, guidance=guidance, pair=pairs[0], **options):
        return guided_step(table, index, x, pair, guidance, momentum=sums, **options)

    with pytest.raises(ValueError, match="momentum: expected one made for this StepTable"):
        step(table=FLOW)
    for other in (projected(0.3), projected(space="original"), guidance.within(TABLE, 0.5)):
        with pytest.raises(ValueError, match="momentum: expected one made for guidance such as"):
            step(guidance=other)
    with pytest.raises(ValueError, match=r"momentum: expected one for samples of shape \(2, 4, 6, 5\)"):
        step(x=x[:2], pair=[each[:2] for each in pairs[0]])
    with pytest.raises(TypeError, match=r"momentum: expected torch.float32 for a sample of torch.float32"):
        step(x=x.float())
    with pytest.raises(ValueError, match=r"predictions\[1\]: expected shape \(3, 4, 6, 5\), got \(3, 4, 6, 4\)"):
        step(pair=[x, x[..., :4]])
    with pytest.raises(ValueError, match="predictions: expected two, unconditional and conditional, got 3"):
        step(pair=[x, x, x])
    with pytest.raises(ValueError, match="out: expected"):
        step(out=x[:, :2])
    with pytest.raises(ValueError, match="out: expected None where gradients are recorded"):
        step(pair=[x, x.clone().requires_grad_()], out=x.clone())
    with pytest.raises(IndexError, match="index: expected 0 to 5"):
        step(index=CALLS, pair=[x, x.clone().requires_grad_()])
    wide = torch.cat([x, x])
    with pytest.raises(ValueError, match="out: expected memory apart from sample"):
        step(x=wide[:3], out=wide[1:4])
    with pytest.raises(IndexError, match="index: expected 0 to 5"):
        step(index=torch.tensor(CALLS))
    noisy = fastguide.ddim(SCHEDULE, CALLS, eta=1.0)
    other = Momentum(noisy, guidance, x)
    with pytest.raises(ValueError, match="out: expected memory apart from the inputs with return_log_prob"):
        guided_step(noisy, 0, x, pairs[0], guidance, momentum=other, noise=x + 1, out=x, return_log_prob=True)
    assert not sums.values.any()  # nothing that was refused has been added up
    assert not other.values.any()
    first = step()
    with pytest.raises(ValueError, match="index: expected a call after the last one that this momentum has added up"):
        step()
    with pytest.raises(TypeError, match="index: expected an int, an int64 tensor or a Cursor, got bool"):
        step(index=False)
    with pytest.raises(TypeError, match="sample: expected a tensor, got list"):
        step(index=1, x=[1])
    sums.restart()
    assert torch.equal(step(guidance=projected()), first)  # the same guidance, made again


def test_bad_arguments():
    x = drawn(14)[0]
    assert repr(projected()) == repr(projected(base="cond")) == "AdaptiveProjected(2 predictions)"  # of the model
    for value in (1.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"momentum: expected a number above -1 and below 1, .*, got {value}"):
            projected(value)
    for value in ("0.5", True, [0.5, 0.5]):
        with pytest.raises(TypeError, match="momentum: expected a number or None, got"):
            projected(value)
    with pytest.raises(ValueError, match="guidance: expected one with momentum, such as"):
        Momentum(TABLE, AdaptiveProjected(4.0), x)
    with pytest.raises(TypeError, match="table: expected a StepTable, got NoneType"):
        Momentum(None, projected(), x)
    with pytest.raises(TypeError, match="sample: expected a tensor of shape"):
        Momentum(TABLE, projected(), 3.0)
