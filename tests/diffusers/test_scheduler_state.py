"""The drop-in schedulers' tables, state and errors, what is left to diffusers, and torch.compile."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch

import fastguide
from tests.support.scheduler_pair import NAMES, SHAPE, STEPS, assert_close, diffusers, fused, model, pair, randn

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
    """New timesteps, another configuration, another schedule: the next step has them."""
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


def test_timesteps_on_a_device_are_known_by_their_place():
    """Of a tensor without values there is nothing to read."""
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS, device="meta")
    host = tuple(range(913, -1, -83))
    sample = torch.empty(2, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    assert [scheduler._row(t, sample) for t in scheduler.timesteps] == list(host)
    assert [scheduler._row(t, sample) for t in scheduler.timesteps[5:]] == list(host[5:])
    index = scheduler._row(torch.empty(2, dtype=torch.int32, device="meta"), sample)
    assert index.dtype == torch.int64


def test_copies_of_a_scheduler_step_alike():
    scheduler = fused.DDPMScheduler()
    scheduler.set_timesteps(STEPS)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    expected = scheduler.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(other.step(output, 83, x, torch.Generator().manual_seed(0)).prev_sample, expected)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_and_signatures_are_diffusers(name, tmp_path):
    ours, theirs = pair(name, beta_schedule="scaled_linear", clip_sample=False)
    assert isinstance(ours, type(theirs))
    assert dict(getattr(fused, name).from_config(theirs.config).config) == dict(theirs.config)
    ours.save_pretrained(tmp_path)
    for cls in (getattr(fused, name), getattr(diffusers, name)):
        assert cls.from_pretrained(tmp_path).config.beta_schedule == "scaled_linear"
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
        scheduler._known_timesteps = (scheduler.timesteps, host[part], [scheduler.timesteps._version])
        assert [scheduler._row(t, sample) for t in scheduler.timesteps] == list(host[part])
    assert isinstance(scheduler._row(every[2], sample), torch.Tensor)  # not one of them


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


def test_transforms_and_forward_mode_are_left_to_diffusers():
    ours, theirs = pair("DDIMScheduler", clip_sample=False)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (output,)),
        lambda f: (torch.func.grad(lambda v: f(v).square().sum())(x),),
        lambda f: (torch.vmap(f)(torch.stack([x, output])),),
    ):
        results = []
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(STEPS)
            results.append(transform(lambda v, s=scheduler: s.step(output, 83, v).prev_sample))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)


def test_a_variance_type_that_is_not_the_configuration_s_is_left_to_diffusers():
    ours, theirs = pair("DDPMScheduler")
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        scheduler.register_to_config(variance_type="fixed_large")
        torch.manual_seed(0)
        results.append(scheduler.step(randn(*SHAPE), 830, randn(*SHAPE, seed=1)).prev_sample)
    assert torch.equal(*results)


def test_an_inverse_scheduler_has_what_diffusers_has():
    assert not hasattr(fused.DDIMInverseScheduler(), "add_noise")


# ---- What is left to diffusers ----


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_dynamic_thresholding(name):
    ours, theirs = pair(name, thresholding=True, sample_max_value=3.0)
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    x, output = 3 * randn(*SHAPE), randn(4, *SHAPE[1:], seed=1)
    uncond, cond = output.chunk(2)
    t = ours.timesteps[3]
    torch.manual_seed(0)
    got = ours.step(output, t, x, guidance_scale=torch.tensor([2.0, 4.0]))
    torch.manual_seed(0)
    expected = theirs.step(uncond + torch.tensor([2.0, 4.0])[:, None, None, None] * (cond - uncond), t, x)
    for ours_, theirs_ in zip(got.to_tuple(), expected.to_tuple(), strict=True):
        assert_close(ours_, theirs_)
    with pytest.raises(ValueError, match="gradient: expected None for a step that is left to diffusers"):
        ours.step(uncond, t, x, gradient=x)


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_of_twice_the_channels_for_diffusers_own_step(learned):
    """Where a gradient is recorded; the conditional half's variance, and an even number of channels is not a sign."""
    for channels in (3, 4):
        variance = {"variance_type": "learned_range"} if learned else {}
        ours, theirs = pair("DDPMScheduler", **variance)
        results = []
        x = randn(2, channels, 8, 8)
        wide = 2 * channels if learned else channels
        output = randn(4, wide, 8, 8, seed=1).requires_grad_()
        uncond, cond = output.chunk(2)
        guided = uncond + 3.0 * (cond - uncond)
        if learned:
            guided = torch.cat([guided[:, :channels], cond[:, channels:]], 1)
        for scheduler, given in ((ours, (output, 3.0)), (theirs, (guided, None))):
            scheduler.set_timesteps(STEPS)
            torch.manual_seed(0)
            more = {} if given[1] is None else {"guidance_scale": given[1]}
            results.append(scheduler.step(given[0], 83, x, **more).prev_sample)
        assert results[0].requires_grad
        assert_close(*(r.detach() for r in results))


def test_gradients_flow_as_in_diffusers():
    ours, theirs = pair("DDIMScheduler")
    gradients = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(STEPS)
        x = randn(*SHAPE).requires_grad_()
        scheduler.step(model(x, 3), scheduler.timesteps[3], x).prev_sample.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_shapes_that_broadcast():
    ours, theirs = pair("DDIMScheduler")
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    got, expected = (
        s.step(randn(1, 3, 8, 8, seed=1), s.timesteps[3], randn(3, 3, 8, 8)).prev_sample for s in (ours, theirs)
    )
    assert torch.equal(got, expected)


def both_refuse(name, *arguments, steps=STEPS, config=None, **keywords):
    kinds = []
    for scheduler in pair(name, **(config or {})):
        if steps:
            scheduler.set_timesteps(steps)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            scheduler.step(*arguments, **keywords)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]


X = randn(*SHAPE)


@pytest.mark.parametrize(
    ("name", "arguments", "keywords"),
    [
        ("DDIMScheduler", (X, 10, X), {"steps": None}),
        ("DDIMScheduler", (X, 1000, X), {}),
        ("DDIMScheduler", (X, 10, X), {"eta": 1.0, "generator": torch.Generator(), "variance_noise": X}),
        ("DDIMScheduler", (X, 10, X), {"config": {"prediction_type": "score"}}),
        ("DDIMScheduler", (randn(2, 5, 8, 8), 10, X), {}),
        ("DDPMScheduler", (X, 10, X), {}),
        ("DDPMScheduler", (X, 996, X), {"config": {"variance_type": "learned_range"}}),
        ("DDPMScheduler", (X, 913, X), {"config": {"variance_type": "learned_range"}}),
        ("DDPMScheduler", (X, 913, X), {"config": {"prediction_type": "score"}}),
        ("DDPMScheduler", (randn(2, 6, 8, 8), 913, X), {}),
    ],
)
def test_what_diffusers_refuses_is_refused_alike(name, arguments, keywords):
    both_refuse(name, *arguments, **keywords)


def test_guidance_and_the_output_s_batch_have_to_agree():
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    doubled = randn(4, *SHAPE[1:])
    with pytest.raises(
        ValueError,
        match=r"model_output: expected the sample's batch, or guidance_scale=.*\(4, 3, 8, 8\) and \(2, 3, 8, 8\)",
    ):
        scheduler.step(doubled, 83, X)
    with pytest.raises(
        ValueError, match=r"model_output: expected twice the sample's batch .*\(2, 3, 8, 8\) and \(2, 3, 8, 8\)"
    ):
        scheduler.step(X, 83, X, guidance_scale=2.0)
    ddpm = fused.DDPMScheduler()
    ddpm.set_timesteps(STEPS)
    with pytest.raises(IndexError, match=r"timestep: expected one of the 12 that are set, 913, 830 .. 0, got 10"):
        ddpm.step(X, 10, X)
    with pytest.raises(TypeError, match="timestep: expected int64"):
        scheduler.step(X, torch.tensor(83.0), X)


WIDE = randn(4, *SHAPE[1:])
BAD = {
    "a model's whole output": (
        lambda s: s.step(diffusers.models.unets.unet_2d.UNet2DOutput(sample=X), 83, X),
        "model_output: expected a tensor, got UNet2DOutput; its .sample is one",
    ),
    "a tuple": (lambda s: s.step((X, X), 83, X), r"model_output: expected a tensor, got tuple; its \[0\] is one"),
    "no output": (lambda s: s.step(None, 83, X), "model_output: expected a tensor, got NoneType"),
    "no sample": (lambda s: s.step(X, 83, None), "sample: expected a tensor, got NoneType"),
    "a real timestep": (lambda s: s.step(X, 83.0, X), "timestep: expected an int or an int64 tensor, got 83.0"),
    "no timestep": (lambda s: s.step(X, None, X), "timestep: expected an int or an int64 tensor, got None"),
    "timesteps of others": (
        lambda s: s.step(X, torch.tensor([83, 0, 83]), X), r"timestep: expected shape \(\) or \(2,\), got \(3,\)",
    ),
    "a timestep of none": (lambda s: s.step(X, torch.tensor([83, 5000]), X), "timestep: expected 0 to 999, got 5000"),
    "a gradient by name": (lambda s: s.step(X, 83, X, gradient="g"), "gradient: expected a tensor .*, got str"),
    "one sample's gradient": (
        lambda s: s.step(X, 83, X, gradient=X[:1]), r"gradient: expected .*, the sample's shape, got \(1, 3",
    ),
    "a gradient's scale": (
        lambda s: s.step(X, 83, X, gradient=X, gradient_scale="2"), "gradient_scale: expected a number",
    ),
    "a scale of no gradient": (lambda s: s.step(X, 83, X, gradient_scale=2.0), "gradient_scale, .*: expected gr"),
    "a form": (lambda s: s.step(X, 83, X, gradient=X, gradient_form="foo"), "gradient_form: expected one of .*'foo'"),
    "a scale of no kind": (lambda s: s.step(WIDE, 83, X, guidance_scale={}), "guidance_scale: expected a number"),
    "scales of steps": (
        lambda s: s.step(WIDE, 83, X, guidance_scale=torch.ones(50, 1)),
        r"guidance_scale: expected a number, shape \(2,\) or \(2, 1, ...\), got \(50, 1\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_messages_name_the_argument(case):
    call, message = BAD[case]
    scheduler = fused.DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call(scheduler)


def test_what_diffusers_accepts_is_accepted():
    ours, theirs = pair("DDIMScheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(-1)
        scheduler.set_timesteps(2.5)
        scheduler.set_timesteps(STEPS)
    t = ours.timesteps[3]
    for arguments in ((X, t.reshape(1), X), (X, t.numpy(), X), (X[0, 0, 0, 0], t, X[0, 0, 0, 0])):
        assert_close(*(s.step(*arguments).prev_sample for s in (ours, theirs)))
    one_a_sample = torch.tensor([2.0, 4.0])
    got, expected = (ours.step(WIDE, t, X, guidance_scale=s) for s in (one_a_sample[:, None, None, None], one_a_sample))
    assert torch.equal(got.prev_sample, expected.prev_sample)


# ---- On a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
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
