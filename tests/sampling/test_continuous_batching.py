"""Requests that join and leave a batch: each has the bits that it has when it runs alone."""

from __future__ import annotations

import random

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Sampler, portable_noise
from tests.sampling.test_history_loops import adams_bashforth
from tests.support.recorded_graph import recorded  # noqa: F401

SCHEDULE = fastguide.NoiseSchedule.linear()
SHAPE = (1, 3, 4, 5)
LONG, SHORT = fastguide.ddpm(SCHEDULE, 12), fastguide.ddim(SCHEDULE, 5)
TABLES = (LONG, SHORT, LONG[4:], fastguide.ddim(SCHEDULE, 7, eta=0.5))


def model(x, t, y):
    """Of each sample by itself, so that bits do not depend on the batch."""
    return 0.3 * torch.tanh(x + torch.sin(t / 300).reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1))


def request_of(number):
    draw = random.Random(number)
    return {
        "x_T": portable_noise([number], SHAPE),
        "cond": torch.tensor([draw.uniform(-1, 1)]),
        "uncond": torch.tensor([draw.uniform(-1, 1)]),
        "seed": number,
        "table": draw.choice(TABLES),
        "guidance": ClassifierFree(draw.choice([1.0, 1.5, 4.0])),
    }


def alone(sampler, request, **more):
    request = {**request, **more}
    sampler.table, sampler.guidance = request.pop("table"), request.pop("guidance")
    seed = request.pop("seed")
    return sampler(**request, seeds=[seed])


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_requests_come_and_go(skip, batched, captured, request):  # a continuous batcher in ten lines
    graphs = request.getfixturevalue("recorded") if captured else None
    options = {"batched": batched, "skip_unconditional": skip, "cuda_graph": "auto" if captured else False}
    waiting, under_way, results = list(range(20)), {}, {}
    slots = Sampler(model, LONG, ClassifierFree(1.0), **options).slots(4)
    while waiting or under_way:
        while waiting and slots.free:
            number = waiting.pop(0)
            under_way[slots.admit(**request_of(number))] = number
        assert slots.active == tuple(sorted(under_way))
        for slot, x_0 in slots.step().items():
            results[under_way.pop(slot)] = x_0
    assert slots.free == 4
    assert slots.step() == {}
    single = Sampler(model, LONG, ClassifierFree(1.0), batched=batched, cuda_graph=False)
    for number, x_0 in results.items():
        assert torch.equal(x_0, alone(single, request_of(number))), number
    if graphs is not None:
        assert graphs.captured == (2 if skip else 1)


def test_each_request_goes_on_from_its_own_history():
    table = adams_bashforth(5)
    sampler = Sampler(model, table, ClassifierFree(2.0), cuda_graph=False)
    requests = [{**request_of(number), "table": table} for number in range(4)]
    slots, under_way, results = sampler.slots(2), {}, {}
    for number, asked in enumerate(requests):  # the later ones come in the places of others, whose entries are there
        while not slots.free:
            results |= {under_way.pop(slot): x_0 for slot, x_0 in slots.step().items()}
        under_way[slots.admit(**asked)] = number
        results |= {under_way.pop(slot): x_0 for slot, x_0 in slots.step().items()}
    while under_way:
        results |= {under_way.pop(slot): x_0 for slot, x_0 in slots.step().items()}
    for number, asked in enumerate(requests):
        assert torch.equal(results[number], alone(sampler, asked)), number


def test_solvers_whose_input_is_scaled_beside_others():
    """One prediction in the sample's own dtype: nothing but the scale makes the model's input another tensor."""
    euler, ddim = fastguide.euler(SCHEDULE, 5), fastguide.ddim(SCHEDULE, 5)
    sampler = Sampler(lambda x, t: 0.1 * x, euler, timestep_dtype=torch.float32)
    x_T = torch.randn(1, *SHAPE[1:])
    slots, finished = sampler.slots(2), {}
    where = [slots.admit(x_T, table=table) for table in (euler, ddim)]
    while slots.active:
        finished |= slots.step()
    for slot, table in zip(where, (euler, ddim), strict=True):
        sampler.table = table
        assert torch.equal(finished[slot], sampler(x_T))
    slots = sampler.slots(2)  # of ddim
    slots.admit(x_T)
    with pytest.raises(ValueError, match="admit: expected a request like the first, of staged False, got True"):
        slots.admit(x_T, table=euler)


def test_learned_variance_and_a_classifier_s_labels():
    table = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range")
    weight = torch.linspace(-1, 1, 60 * 5).reshape(60, 5)

    def learned(x, t, y):
        return torch.cat([model(x, t, y), torch.tanh(model(x, t, -y))], 1)

    def classifier(x, t):
        return (x.flatten(1)[:, :, None] * weight).sum(1)

    guidance = ClassifierFree(2.0) + Classifier(classifier, 1.5)
    sampler = Sampler(learned, table, guidance)
    slots = sampler.slots(3)
    ones = torch.ones(1)
    for number in range(3):
        slots.admit(
            portable_noise([number], SHAPE), cond=ones * number, uncond=0 * ones, seed=number,
            labels=torch.tensor([number]),
        )  # fmt: skip
        slots.step()
    finished = {}
    while slots.active:
        finished |= slots.step()
    for number in range(3):
        expected = sampler(
            portable_noise([number], SHAPE), cond=ones * number, uncond=0 * ones, seeds=[number],
            labels=torch.tensor([number]),
        )  # fmt: skip
        torch.testing.assert_close(finished[number], expected)


def test_tables_share_their_rows_and_make_room_for_others():
    slots = Sampler(model, LONG, ClassifierFree(1.0)).slots(2, capacity=64)
    first = slots.admit(**{**request_of(1), "table": fastguide.ddim(SCHEDULE, 50)})
    with pytest.raises(ValueError, match=r"table: expected at most 64 rows .*, got 20 besides 50; slots\(capacity=\)"):
        slots.admit(**{**request_of(2), "table": fastguide.ddim(SCHEDULE, 20)})
    assert slots.active == (first,)
    slots.cancel(first)
    for steps in (20, 30, 40, 50, 60):
        table = fastguide.ddim(SCHEDULE, steps)
        slot = slots.admit(**{**request_of(2), "table": table})
        finished = {}
        while slots.active:
            finished |= slots.step()
        single = Sampler(model, LONG, ClassifierFree(1.0))
        assert torch.equal(finished[slot], alone(single, request_of(2), table=table))


def test_a_request_that_is_taken_out_leaves_the_others_alone():
    slots = Sampler(model, LONG, ClassifierFree(1.0)).slots(2)
    kept, other = (slots.admit(**{**request_of(n), "table": LONG}) for n in (1, 2))
    for _ in range(3):
        slots.step()
    assert slots.cancel(other).shape == SHAPE
    slots.admit(**{**request_of(3), "table": SHORT})
    finished = {}
    while slots.active:
        finished |= slots.step()
    single = Sampler(model, LONG, ClassifierFree(1.0))
    assert torch.equal(finished[kept], alone(single, request_of(1), table=LONG))
    assert torch.equal(finished[other], alone(single, request_of(3), table=SHORT))
    with pytest.raises(ValueError, match=r"slot: expected one under way, \(\), got 1"):
        slots.cancel(other)


BAD = {
    "no seed": ({"seed": None, "table": LONG}, TypeError, "seed: expected an integer, .*, got None"),
    "numbers": ({"x_T": [1.0]}, TypeError, "x_T: expected a tensor, got list"),
    "a number of steps": ({"table": 20}, TypeError, "table: expected a StepTable, got int"),
    "a scale": ({"guidance": 7.5}, TypeError, "guidance: expected a Guidance or None, got float"),
    "a seed of text": ({"seed": "a"}, TypeError, "seed: expected an integer, as the table adds noise, got 'a'"),
    "a number": ({"x_T": torch.tensor(1.0)}, ValueError, r"x_T: expected shape \(1, ...\), one request, got \(\)"),
    "two samples": ({"x_T": torch.zeros(2, 3, 4, 5)}, ValueError, r"x_T: expected shape .*, one request, got \(2"),
    "another shape": ({"x_T": torch.zeros(1, 3, 4, 6)}, ValueError, "admit: .* like the first, of shape"),
    "another condition": (
        {"cond": torch.zeros(1, 2), "uncond": torch.zeros(1, 2)}, ValueError, "admit: .* like the first, of conditions",
    ),
    "another guidance": ({"guidance": fastguide.Composed([1.0, 2.0])}, ValueError, r"cond: expected 2 condition\(s\)"),
    "scales of samples": ({"guidance": ClassifierFree([1.0, 2.0])}, ValueError, "guidance: expected scales for 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_request_cannot_be(case):
    change, error, message = BAD[case]
    slots = Sampler(model, LONG, ClassifierFree(1.0)).slots(2)
    slots.admit(**request_of(1))
    with pytest.raises(error, match=message):
        slots.admit(**{**request_of(2), **change})
    assert slots.free == 1


def test_another_formula_is_refused_by_its_name():
    slots = Sampler(model, LONG, fastguide.Normalized(2.0, dim=-1)).slots(3)
    slots.admit(**request_of(1) | {"guidance": None})
    slots.admit(**request_of(2) | {"guidance": fastguide.Normalized(3.0, dim=-1)})
    for guidance, name in (
        (fastguide.Normalized(2.0, dim=1), r"Normalized\(2 predictions, dim=1\)"),
        (fastguide.Normalized(2.0, dim=-1, at_most=1.0), r"Normalized\(2 predictions, dim=-1\)"),
        (fastguide.AdaptiveProjected(2.0), r"AdaptiveProjected\(2 predictions\)"),
    ):
        first = r"Normalized\(2 predictions, dim=-1\) of \d+ operations"
        with pytest.raises(ValueError, match=f"of weights_from {first}, got {name} of .. operations$"):
            slots.admit(**request_of(3) | {"guidance": guidance})


def test_slots_that_cannot_be():
    sampler = Sampler(model, LONG, ClassifierFree(1.0))
    for arguments, message in (
        ((0,), "batch: expected a positive integer, got 0"),
        ((2, 0), "capacity: expected a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.slots(arguments[0], **({"capacity": arguments[1]} if len(arguments) > 1 else {}))
    slots = sampler.slots(1)
    slots.admit(**request_of(1))
    with pytest.raises(RuntimeError, match="admit: expected a free slot, got all 1 under way"):
        slots.admit(**request_of(2))


def test_a_whole_loop_as_one_graph_has_no_slots(recorded):  # noqa: F811
    with pytest.raises(ValueError, match="cuda_graph: expected 'auto', 'try' or False, as requests come and go"):
        Sampler(model, LONG, cuda_graph="loop").slots(1)
    with pytest.raises(ValueError, match="scalar_timestep: expected False, as requests are at different timesteps"):
        Sampler(model, LONG, scalar_timestep=True).slots(1)


def test_steps_without_the_unconditional_prediction():
    """Where all requests leave it out."""
    sizes = []

    def spy(x, t, y):
        sizes.append(len(x))
        return model(x, t, y)

    plain, strong = ClassifierFree(1.0), ClassifierFree.per_step([1.0, 1.0, 4.0, 4.0, 1.0])
    slots = Sampler(spy, SHORT, plain, skip_unconditional=True).slots(3)
    slots.admit(**{**request_of(1), "table": SHORT, "guidance": plain})
    slots.step()
    slots.admit(**{**request_of(2), "table": SHORT, "guidance": strong})
    finished = {}
    while slots.active:
        finished |= slots.step()
    assert sizes == [3, 3, 3, 6, 6, 3]
    single = Sampler(model, SHORT, plain)
    for slot, guidance in ((0, plain), (1, strong)):
        expected = alone(single, request_of(slot + 1), table=SHORT, guidance=guidance)
        torch.testing.assert_close(finished[slot], expected)


def test_an_interrupted_step_gives_up_its_requests():
    interrupted = []

    def interrupts(x, t, y):
        if len(interrupted) == 3:
            interrupted.append(None)
            raise KeyboardInterrupt
        interrupted.append(None)
        return model(x, t, y)

    slots = Sampler(interrupts, LONG, ClassifierFree(1.0)).slots(2)
    slots.admit(**request_of(1))
    for _ in range(3):
        slots.step()
    with pytest.raises(KeyboardInterrupt):
        slots.step()
    assert slots.active == ()
    slot = slots.admit(**{**request_of(2), "table": SHORT})
    finished = {}
    while slots.active:
        finished |= slots.step()
    assert torch.equal(finished[slot], alone(Sampler(model, LONG, ClassifierFree(1.0)), request_of(2), table=SHORT))


def test_slots_are_of_one_user_at_a_time():
    def reenters(x, t, y):
        for use in (slots.step, lambda: slots.admit(**request_of(2)), lambda: slots.cancel(0), slots.clear):
            with pytest.raises(RuntimeError, match="slots: are in use already"):
                use()
        return model(x, t, y)

    slots = Sampler(reenters, LONG, ClassifierFree(1.0)).slots(2)
    slots.admit(**request_of(1))
    slots.step()


def test_cleared_slots_take_requests_of_another_kind():
    slots = Sampler(model, SHORT).slots(2)
    slots.admit(torch.zeros(1, 3), cond=torch.zeros(1))
    slots.clear()
    slots.admit(torch.zeros(1, 5, dtype=torch.float64), cond=torch.zeros(1))
    assert slots.active == (0,)


def test_a_request_that_is_refused_decides_nothing():
    slots = Sampler(model, SHORT).slots(2, capacity=3)
    with pytest.raises(ValueError, match="table: expected at most 3 rows"):
        slots.admit(torch.zeros(1, 3), cond=torch.zeros(1))
    assert slots.admit(torch.zeros(1, 7), cond=torch.zeros(1), table=SHORT[3:]) == 0


def test_a_cancelled_request_s_place_is_left_as_it_is():
    slots = Sampler(model, SHORT).slots(2)
    for _ in range(2):
        slots.admit(torch.ones(SHAPE), cond=torch.zeros(1))
    slots.step()
    cancelled = slots.cancel(0)
    slots.step()
    assert torch.equal(slots._state.sample[:1], cancelled)
