"""Steps that autograd follows: every gradient against differences in float64, and against torch's own in float32."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, FlowSchedule, History, Inpainting, NoiseSchedule
from fastguide.step.backends import native
from fastguide.step.backends.registry import BACKENDS

SCHEDULE, FLOW = NoiseSchedule.linear(), FlowSchedule(shift=3.0)
SHAPE = (2, 3, 3)
BOTH = [name for name in ("reference", "native") if BACKENDS[name].devices != ()]
TABLES = {
    "ddim": fastguide.ddim(SCHEDULE, 6),
    "ddim clipped, noisy": fastguide.ddim(SCHEDULE, 6, eta=1.0, use_clipped_model_output=True, clip_sample_range=1.0),
    "ddpm": fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0),
    "flow": fastguide.flow_match_euler(FLOW, 6),
    "flow stochastic": fastguide.flow_match_euler(FLOW, 6, stochastic=True),
    "flow heun": fastguide.flow_match_heun(FLOW, 6),
    "euler churn": fastguide.euler(SCHEDULE, 6, prediction_type="v_prediction", s_churn=3.0),
    "euler ancestral": fastguide.euler_ancestral(SCHEDULE, 6),
    "edm": fastguide.edm_euler(6),
    "lcm": fastguide.lcm(SCHEDULE, 6),
    "tcd": fastguide.tcd(SCHEDULE, 6),
    "consistency": fastguide.consistency(6),
    "cogvideox": fastguide.cogvideox_ddim(SCHEDULE, 6),
    "cogvideox dpm": fastguide.cogvideox_dpm(SCHEDULE, 6),
    "heun": fastguide.heun(SCHEDULE, 6),
    "dpm2": fastguide.dpm2(SCHEDULE, 6, ancestral=True),
    "dpm++ 2m": fastguide.dpm_solver(SCHEDULE, 6),
    "dpm++ 3m": fastguide.dpm_solver(FLOW, 6, solver_order=3),
    "dpm++ 2m sde": fastguide.dpm_solver(SCHEDULE, 6, algorithm_type="sde-dpmsolver++"),
    "dpm++ 2s": fastguide.dpm_solver_singlestep(SCHEDULE, 6),
    "unipc": fastguide.unipc(SCHEDULE, 6, solver_order=3),
    "deis": fastguide.deis(SCHEDULE, 6),
    "lms": fastguide.lms(SCHEDULE, 6),
    "pndm": fastguide.pndm(SCHEDULE, 6),
    "sa": fastguide.sa_solver(SCHEDULE, 6),
    "edm dpm++": fastguide.edm_dpm_solver(6),
}


def draws(number, *, seed=0, shape=SHAPE, dtype=torch.float64, scale=0.7):
    """Small enough that a clip keeps some elements."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(number, *shape, dtype=torch.float64, generator=generator)
    return [v.to(dtype).requires_grad_() for v in values]


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, BOTH[-1]) for name in TABLES] + [(name, "reference") for name in ("ddpm", "dpm++ 2m sde", "unipc", "pndm")],
)
def test_calls_in_a_row(name, backend):
    """Four calls, each of which leaves to later ones what it does; noise and predictions are inputs as well."""
    table, calls = TABLES[name], 4

    def run(x, scale, *others):
        history = History(table, x)
        for call in range(calls):
            uncond, cond, z = others[3 * call : 3 * call + 3]
            noise = {"noise": z} if table.adds_noise[call] else {}
            x = fastguide.guided_step(
                table, call, x, [uncond, cond], ClassifierFree(scale), history=history, backend=backend, **noise
            )
        return x

    scale = torch.tensor([1.5, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = draws(3 * calls + 1)
    assert gradcheck(run, (inputs[0], scale, *inputs[1:]), fast_mode=True)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("form", ["epsilon", "epsilon_after_clip", "mean"])
@pytest.mark.parametrize(
    ("variance_type", "clip"), [("fixed_small", 1.0), ("fixed_small", None), ("learned_range", 1.0), ("learned", None)]
)
def test_a_classifier_and_a_variance(variance_type, clip, form, backend):
    table = fastguide.ddpm(SCHEDULE, 6, variance_type=variance_type, clip_sample_range=clip)
    learned = table.learned_variance

    def run(x, uncond, cond, g, z, v, scale, s):
        guidance = ClassifierFree(scale) + Classifier(None, s, form)
        v = v if learned else None
        return fastguide.guided_step(
            table, 3, x, [uncond, cond], guidance, gradient=g, noise=z, variance=v, backend=backend
        )

    *others, v = draws(6)
    x, uncond, cond, g, z = others
    scales = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (2.0, [1.0, -2.0])]
    assert gradcheck(run, (x, uncond, cond, g, z, v if learned else v.detach(), *scales), fast_mode=True)
    fixed = [scale.detach() for scale in scales]
    assert gradcheck(run, (x, uncond, cond, g, z.detach(), v.detach(), *fixed), fast_mode=True)


@pytest.mark.parametrize("backend", BOTH)
def test_a_variance_whose_noise_is_drawn_from_seeds(backend):
    table, seeds = fastguide.ddpm(SCHEDULE, 6, variance_type="learned_range"), torch.tensor([3, 4])
    x, p, v = (t.requires_grad_() for t in torch.randn(3, 2, 3, 4, dtype=torch.float64))
    drawn = fastguide.guided_step(table, 2, x, p, variance=v, seeds=seeds, backend=backend)
    noise = fastguide.portable_noise(seeds, x.shape, step=2).double()
    given = fastguide.guided_step(table, 2, x, p, variance=v, noise=noise, backend=backend)
    weigh = torch.randn_like(x)
    for ours, expected in zip(*(torch.autograd.grad(y, [x, p, v], weigh) for y in (drawn, given)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_small"])
def test_noise_that_a_generator_draws_is_as_if_it_were_given(variance_type, backend, generator):
    """Also to a variance, whose gradient reads it later; and the next sample may be changed in place."""
    table = fastguide.ddpm(SCHEDULE, 6, variance_type=variance_type)
    x, p, v, weigh = torch.randn(4, 2, 3, 5, 4, generator=generator)
    leaves = [t.requires_grad_() for t in ((x, p, v) if variance_type == "learned_range" else (x, p))]
    variance = leaves[2] if len(leaves) > 2 else None
    drawing, giving = (torch.Generator().manual_seed(3) for _ in range(2))
    z = torch.randn(x.shape, generator=giving)
    drawn = fastguide.guided_step(table, 2, x, p, variance=variance, generator=drawing, backend=backend)
    given = fastguide.guided_step(table, 2, x, p, variance=variance, noise=z, backend=backend)
    found = [torch.autograd.grad(y.mul_(2.0), leaves, weigh) for y in (drawn, given)]
    assert all(map(torch.equal, *found))
    assert torch.equal(drawn, given)


@pytest.mark.parametrize("backend", BOTH)
def test_several_predictions_in_one_tensor_at_rows_of_their_own(backend):
    table = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
    index = torch.tensor([1, 4])

    def run(x, stacked, scale, other):
        return fastguide.guided_step(table, index, x, stacked, Composed([scale, other]), backend=backend)

    (x,), (stacked,) = draws(1), draws(1, seed=1, shape=(6, 3, 3))
    scale = torch.randn(6, 1, dtype=torch.float64, requires_grad=True)
    other = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(run, (x, stacked, scale, other), fast_mode=True)


@pytest.mark.parametrize("backend", BOTH)
def test_the_predicted_original_the_anchor_and_the_known_part(backend):
    table = fastguide.heun(SCHEDULE, 3)
    mask = torch.rand(SHAPE, dtype=torch.float64).round(decimals=1)

    def run(x, p, anchor, known, z):
        history = History(table, x)
        original = torch.empty_like(x)
        x = fastguide.guided_step(table, 0, x, p, history=history, backend=backend)
        x = fastguide.guided_step(
            table, 1, x, p, history=history, anchor=anchor, inpainting=Inpainting(mask, known, z), original=original,
            backend=backend,
        )  # fmt: skip
        return x, original

    assert gradcheck(run, draws(5), fast_mode=True)


@pytest.fixture(params=["reference", *native.CAPABILITIES])
def each_instruction_set(request):
    """The backend's name, at that instruction set."""
    if request.param == "reference":
        yield request.param
        return
    if "native" not in BOTH:
        pytest.skip(BACKENDS["native"].status)
    before = native.cpu_capability()
    try:
        if native.set_cpu_capability(request.param) != request.param:
            pytest.skip(f"this processor has no {request.param}")
        yield "native"
    finally:
        native.set_cpu_capability(before)


@pytest.mark.parametrize(("state", "predicted"), [("float32",) * 2, ("float32", "bfloat16"), ("float16", "float32")])
def test_float32_is_as_exact_as_torch_s_own(state, predicted, each_instruction_set):
    """The same formula in torch, followed by autograd; over several blocks, parts and a tail."""
    backend = each_instruction_set
    table, shape, scale = fastguide.ddpm(SCHEDULE, 6, clip_sample_range=1.0), (2, 3, 47, 61), torch.tensor([2.0, 5.0])
    state, predicted = getattr(torch, state), getattr(torch, predicted)
    x, z, weigh = (t.detach().to(state) for t in draws(3, shape=shape))
    uncond, cond = (t.detach().to(predicted) for t in draws(2, seed=1, shape=shape))

    def gradients(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, uncond, cond, z, scale)]
        row = {name: values[3].to(dtype) for name, values in table.coefficients().items()}
        s = inputs[4].view(-1, 1, 1, 1)
        m = inputs[1] + s * (inputs[2] - inputs[1])
        x0 = row["x0_scale"] * (row["x0_sample"] * inputs[0] + row["x0_pred"] * m)
        y = row["out_x0"] * x0.clamp(-row["clip"], row["clip"]) + row["out_sample"] * inputs[0]
        y = y + row["out_noise"] * inputs[3]
        return torch.autograd.grad(y, inputs, weigh.to(dtype))

    inputs = [t.clone().requires_grad_() for t in (x, uncond, cond, z, scale)]
    y = fastguide.guided_step(
        table, 3, inputs[0], inputs[1:3], ClassifierFree(inputs[4]), noise=inputs[3], backend=backend
    )
    got = torch.autograd.grad(y, inputs, weigh)
    for ours, given, plain, truth in zip(got, inputs, gradients(torch.float32), gradients(torch.float64), strict=True):
        assert ours.dtype == given.dtype
        rounding = (truth.to(given.dtype).double() - truth).abs().max()
        plain_error = (plain.double() - truth).abs().max()  # of a scale's two sums, one may be exact by chance
        by_chance = torch.finfo(torch.float32).eps * truth.abs().max() if given is inputs[-1] else 0.0
        assert (ours.double() - truth).abs().max() <= 2 * plain_error + 1.01 * rounding + by_chance


@pytest.mark.skipif("native" not in BOTH, reason="the native library is not here")
def test_a_sample_s_gradients_depend_on_no_other_and_no_thread():
    table = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0)
    x, uncond, cond, weigh = torch.randn(4, 3, 4, 65, 67)

    def gradients(samples, threads):
        scale = torch.full((3,), 4.0)[samples].requires_grad_()
        inputs = [t[samples].clone().requires_grad_() for t in (x, uncond, cond)]
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = fastguide.guided_step(table, 2, inputs[0], inputs[1:], ClassifierFree(scale))
            return torch.autograd.grad(y, [*inputs, scale], weigh[samples])
        finally:
            torch.set_num_threads(before)

    whole, again = gradients(slice(None), 1), gradients(slice(None), 4)
    alone = gradients(slice(1, 2), 2)
    for first, second, third in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[1:2], third)


def test_nothing_is_kept_that_is_not_read():
    """Without a scale to learn, a backward pass needs none of the step's tensors; of a clip, a bit an element."""

    def kept(table, scale):
        x, uncond, cond = draws(3, dtype=torch.float32)
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
            fastguide.guided_step(table, 2, x, [uncond, cond], ClassifierFree(scale))
        bits = sum(t.nbytes for t in seen if t.dtype == torch.uint8)
        return len([t for t in seen if t.shape == x.shape]), bits

    clipped, learned = fastguide.ddim(SCHEDULE, 6, clip_sample_range=1.0), torch.tensor(3.0, requires_grad=True)
    assert kept(fastguide.ddim(SCHEDULE, 6), 3.0) == (0, 0)
    assert kept(clipped, 3.0) == (0, 2 * 2)  # of nine elements each
    assert kept(fastguide.ddim(SCHEDULE, 6), learned) == kept(clipped, learned) == (3, 0)


def test_a_history_that_a_call_only_reads_is_not_copied():
    table, last = TABLES["dpm++ 2m"], 5
    x, p, entries = draws(3)
    assert table.coefficients()["hist_slot"][last] < 0

    def run(x, p, entries):
        history = History(table, x).continued(entries, last)
        y = fastguide.guided_step(table, last, x, p, history=history)
        assert history.entries is entries
        return y

    assert gradcheck(run, (x, p, entries), fast_mode=True)


def test_gradients_of_any_layout_and_only_some_inputs(generator):
    """A sum's gradient is one element; predictions without a graph get none; a sample may be channels_last."""
    table = fastguide.ddim(SCHEDULE, 6)
    x = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
    p = torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last)
    fastguide.guided_step(table, 2, x, p).sum().backward()
    row = {name: values[2].float() for name, values in table.coefficients().items()}
    factor = row["out_x0"] * row["x0_scale"] * row["x0_sample"] + row["out_sample"]
    torch.testing.assert_close(x.grad, torch.full_like(x, factor.item()))
    assert p.grad is None
    with torch.no_grad():
        assert not fastguide.guided_step(table, 2, x, p).requires_grad


def test_a_new_loop_of_a_history_leaves_the_old_graph():
    table = TABLES["dpm++ 2m"]
    x, p = draws(2)
    history = History(table, x)
    for _ in range(2):
        y = fastguide.guided_step(table, 0, x, p, history=history.restart())
        fastguide.guided_step(table, 1, y, p, history=history).sum().backward()
        assert history.entries.requires_grad


@pytest.mark.parametrize("kind", [fastguide.ClassifierFree, fastguide.AdaptiveProjected])
def test_a_scale_s_gradient_goes_through_the_copy_to_another_device(kind):
    """Also if a step without gradients has asked for it first."""
    scale = torch.tensor([2.0, 3.0], requires_grad=True)
    guidance, device = kind(scale), torch.device("meta")
    with torch.no_grad():
        copied = [guidance.weights(device, torch.float32)]
        if guidance.weights_from is not None:
            copied = [guidance.weights_from.on(device)[1]]
    assert all(copy.requires_grad for copy in copied)
