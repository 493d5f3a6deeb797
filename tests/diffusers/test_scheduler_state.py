"""The drop-in schedulers' tables and state, on a GPU and under torch.compile too."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fastguide
from fastguide.diffusers.timesteps import HostTimesteps, row_of
from tests.support.scheduler_pair import (
    APART,
    COUNTED,
    NAMES,
    PLACED,
    SHAPE,
    STEPS,
    assert_close,
    diffusers,
    fused,
    model,
    pair,
    randn,
)

X = randn(*SHAPE)

# ---- Layouts, tables, state ----


def test_layouts_and_dtypes_that_differ():
    ours, theirs = pair("DDIMScheduler")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    t = ours.timesteps[3]
    samples = [
        randn(*SHAPE),
        randn(*SHAPE).to(memory_format=torch.channels_last),
        randn(2, 8, 8, 6).permute(0, 3, 1, 2)[:, ::2],
    ]
    for x in samples:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for output in (randn(*SHAPE, seed=1, dtype=dtype), randn(2, 6, 8, 8, seed=1, dtype=dtype)[:, :3]):
                got, expected = (s.step(output, t, x).prev_sample for s in (ours, theirs))
                assert_close(got, expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_steps_in_any_order():
    ours, theirs = pair("DDPMScheduler")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for k in (7, 3, 3, 11, 0):
        for t in (ours.timesteps[k], int(ours.timesteps[k]), ours.timesteps.numpy()[k]):
            got, expected = (s.step(output, t, x, torch.Generator().manual_seed(k)).prev_sample for s in (ours, theirs))
            assert_close(got, expected)


def test_tables_follow_the_scheduler_s_state():
    """The next step uses new timesteps, another configuration, another schedule."""
    ours, theirs = pair("DDIMScheduler")
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)

    def both(t=400, **options):
        got, expected = (s.step(output, t, x, **options).prev_sample for s in (ours, theirs))
        assert_close(got, expected)
        return got

    seen = []
    for change in (
        lambda s: s.set_timesteps(10),
        lambda s: s.set_timesteps(20),
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**1.3),
        lambda s: setattr(s, "num_inference_steps", 5),
    ):
        change(ours)
        change(theirs)
        seen.append(both())
    assert len({float(s.sum()) for s in seen}) == 5
    ddpm, plain = pair("DDPMScheduler")
    for scheduler in (ddpm, plain):
        scheduler.set_timesteps(10)
        scheduler.timesteps = torch.tensor([900, 400, 100])
    got, expected = (s.step(output, 400, x, torch.Generator().manual_seed(0)).prev_sample for s in (ddpm, plain))
    assert_close(got, expected)


def test_timesteps_on_a_device_are_found_by_their_place():
    """The host reads no tensor: these have no values."""
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS, device="meta")
    host = tuple(range(913, -1, -83))
    sample = torch.empty(2, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert [row_of(scheduler, t, sample) for t in scheduler.timesteps] == list(host)
    assert [row_of(scheduler, t, sample) for t in scheduler.timesteps[5:]] == list(host[5:])
    index = row_of(scheduler, torch.empty(2, dtype=torch.int32, device="meta"), sample)
    assert index.dtype == torch.int64


def test_copies_of_a_scheduler_step_alike():
    scheduler = fused.DDPMScheduler()
    scheduler.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    expected = scheduler.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample, expected)


def config_of(name):
    """Return a configuration that is not the default one."""
    if name.startswith(("Flow", "Helios", "Piflow")):
        return {"shift": 3.0}
    if name.startswith(("EDM", "Cosine")):
        return {"sigma_max": 60.0}
    if name.startswith("LTX"):
        return {"eta": 0.5}
    if name.startswith("RFD4"):
        return {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 2.0, "tsr_sigma": 0.5}
    own = {"IPNDM": "num_train_timesteps", "SCM": "num_train_timesteps", "UnCLIP": "num_train_timesteps"}
    own |= {
        "ScoreSdeVe": "num_train_timesteps",
        "CMStochasticIterative": "num_train_timesteps",
        "DDPMWuerstchen": "scaler",
    }
    changed = own.get(name.removesuffix("Scheduler"))
    if changed is not None:
        return {changed: 30}
    return {"beta_schedule": "linear" if name.startswith("CogVideoX") else "scaled_linear"}


@pytest.mark.parametrize("name", [*NAMES, *COUNTED, *PLACED, *APART])
def test_configurations_and_signatures_are_diffusers(name, tmp_path):
    config = config_of(name)
    ours, theirs = pair(name, **config, **({"clip_sample": False} if name in NAMES else {}))
    assert isinstance(ours, type(theirs))
    assert dict(getattr(fused, name).from_config(theirs.config).config) == dict(theirs.config)
    ours.save_pretrained(tmp_path)
    for cls in (getattr(fused, name), getattr(diffusers, name)):
        assert config.items() <= dict(cls.from_pretrained(tmp_path).config).items()
    assert ours._compatibles == theirs._compatibles
    for method in ("__init__", "step", "set_timesteps", "add_noise"):
        if hasattr(theirs, method):
            expected = list(inspect.signature(getattr(theirs, method)).parameters.values())
            got = list(inspect.signature(getattr(ours, method)).parameters.values())
            assert [(p.name, p.default) for p in got][: len(expected)] == [(p.name, p.default) for p in expected]
            assert all(p.kind is p.KEYWORD_ONLY for p in got[len(expected) :])


def test_add_noise_and_velocity_leave_the_schedule_in_its_place():
    ours, theirs = pair("DDPMScheduler")
    before = ours.alphas_cumprod
    x, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([3, 700])
    for name in ("add_noise", "get_velocity"):
        assert torch.equal(getattr(ours, name)(x, noise, t), getattr(theirs, name)(x, noise, t))
    assert ours.add_noise(x.to("meta"), noise.to("meta"), t.to("meta")).device.type == "meta"
    assert ours.alphas_cumprod is before


def test_changes_in_place_are_seen():
    ours, theirs = pair("DDPMScheduler")
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)

    def steps(scheduler):
        scheduler.set_timesteps(STEPS)
        results = []
        for change in (lambda: None, lambda: scheduler.alphas_cumprod.mul_(0.9), lambda: scheduler.timesteps.add_(1)):
            change()
            torch.manual_seed(0)
            results.append(scheduler.step(output, scheduler.timesteps[3], x).prev_sample)
        return torch.stack(results)

    assert_close(steps(ours), steps(theirs))


def test_timesteps_that_come_twice_lead_on_from_their_first_place():
    ours, theirs = pair("DDPMScheduler")
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        scheduler.timesteps = torch.tensor([900, 800, 900, 800, 700, 0])
        torch.manual_seed(0)
        results.append(torch.stack([scheduler.step(output, t, x).prev_sample for t in scheduler.timesteps]))
    assert_close(*results)


def test_a_view_of_the_timesteps_is_read_in_its_own_places():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS, device="meta")
    host = tuple(range(913, -1, -83))
    every = scheduler.timesteps
    sample = torch.empty(2, device="meta")
    for part in (slice(None, None, 2), slice(5, None)):
        scheduler.timesteps = every[part]
        scheduler._timesteps_cache = HostTimesteps(scheduler.timesteps, host[part], scheduler.timesteps._version)
        assert [row_of(scheduler, t, sample) for t in scheduler.timesteps] == list(host[part])
    assert isinstance(row_of(scheduler, every[2], sample), torch.Tensor)  # not one of them


def test_another_default_device_changes_nothing():
    expected = fused.DDPMScheduler()
    expected.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    scheduler = fused.DDPMScheduler()
    with torch.device("meta"):
        scheduler.set_timesteps(STEPS)
        got = scheduler.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample
        table = fastguide.ddim(fastguide.NoiseSchedule.cosine(), 5, timestep_spacing="trailing")
        guided = fastguide.guided_step(table, 1, x, torch.cat([output, x]), fastguide.ClassifierFree([2.0, 3.0]))
    assert torch.equal(got, expected.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample)
    assert guided.device == x.device


def test_another_default_device_changes_no_step():
    """Nor where sigmas are spaced by a beta distribution, in an interval of guidance, or with frequencies apart."""
    x, predictions = randn(1, 4, 8, 8), [randn(1, 4, 8, 8, seed=seed) for seed in (1, 2)]

    def steps():
        table = fastguide.euler(fastguide.NoiseSchedule.linear(), 5, sigma_spacing="beta")
        within, apart = fastguide.ClassifierFree(5.0).within(table, 0.2, 0.8), fastguide.FrequencyDecoupled([10.0, 5.0])
        return [
            fastguide.guided_step(table, 2, x, predictions, within),
            fastguide.guided_step(table, 2, x, apart.terms(predictions), apart),
        ]

    with torch.device("meta"):
        got = steps()
    torch.testing.assert_close(got, steps(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_another_default_device_changes_no_table(name):
    """The second loop asks for scaled inputs of what its steps return, which the steps write from then on."""
    ours, expected = getattr(fused, name)(), getattr(fused, name)()
    x = randn(*SHAPE)
    with torch.device("meta"):
        got = [loop_with_inputs(ours, x) for _ in range(2)]
    assert all(torch.equal(samples, loop_with_inputs(expected, x)) for samples in got)


def loop_with_inputs(scheduler, x):
    scheduler.set_timesteps(STEPS, device="cpu")
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(x), t, x, return_dict=False)[0]
    return x


def test_an_inverse_scheduler_has_what_diffusers_has():
    assert not hasattr(fused.DDIMInverseScheduler(), "add_noise")


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "options"), [("DDIMScheduler", {"eta": 1.0}), ("DDPMScheduler", {})])
def test_a_loop_on_a_gpu_waits_for_nothing_and_draws_what_diffusers_draws(name, options):
    results = []
    for scheduler in pair(name):
        scheduler.set_timesteps(STEPS, device="cuda")
        generator, x = torch.Generator("cuda").manual_seed(1), randn(*SHAPE).cuda()
        scheduler.step(0.1 * x, scheduler.timesteps[0], x, generator=torch.Generator("cuda"), **options)  # the table
        torch.cuda.set_sync_debug_mode("error" if isinstance(scheduler, getattr(fused, name)) else "default")
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, 0), t, x, generator=generator, **options).prev_sample
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append((x, generator.get_state()))
    (ours, state), (theirs, their_state) = results
    assert_close(ours, theirs)
    assert torch.equal(state, their_state)


# ---- torch.compile ----


@pytest.mark.parametrize(
    ("name", "options"), [("DDIMScheduler", {}), ("DDIMScheduler", {"eta": 1.0}), ("DDPMScheduler", {})]
)
def test_a_loop_over_step_is_one_graph(name, options):
    scheduler = getattr(fused, name)()
    scheduler.set_timesteps(STEPS)
    scheduler.step(X, 0, X, **options)  # makes the table of these options
    scheduler.set_timesteps(STEPS)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def sample(x):
        for t in scheduler.timesteps:
            output = torch.cat([model(x, 100), model(x, 200)])
            x = scheduler.step(output, t, x, guidance_scale=3.0, **options).prev_sample
        return x

    def step(t, output, x):
        return scheduler.step(output, t, x, return_dict=False, **options)[0]

    with torch.no_grad():
        torch.manual_seed(0)
        expected = sample(X)
        torch.manual_seed(0)
        assert_close(torch.compile(sample, fullgraph=True, backend=backend)(X), expected, 1e-6)
        assert len(graphs) == 1
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for t in scheduler.timesteps:
            torch.manual_seed(0)
            expected = step(t, 0.1 * X, X)
            torch.manual_seed(0)
            assert_close(compiled(t, 0.1 * X, X), expected, 1e-6)
        assert len(graphs) == 2
        for t in scheduler.timesteps.tolist():
            torch.manual_seed(0)
            expected = step(t, 0.1 * X, X)
            torch.manual_seed(0)
            assert_close(compiled(t, 0.1 * X, X), expected, 1e-6)
        assert len(graphs) <= 5  # 913, any, and 0
    torch._dynamo.reset()
