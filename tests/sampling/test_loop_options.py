"""What people do with loops: image-to-image, inpainting, every step's results, interruption, checks; in plain torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, Sampler
from tests.support.textbook import guided_prediction

SCHEDULE = fastguide.NoiseSchedule.linear()
SHAPE = (3, 2, 6, 5)
COND, UNCOND = torch.tensor([1.0, -0.5, 0.3]), torch.zeros(3)


def randn(*shape, seed=0):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def model(x, t, y=None):
    shift = torch.sin(t / 300).reshape(-1, *[1] * (x.dim() - 1))
    return 0.3 * torch.tanh(x + shift + (0.0 if y is None else y.reshape(-1, *[1] * (x.dim() - 1))))


def level(timestep):
    return SCHEDULE.alphas_cumprod[timestep].item()


def ddim_by_hand(x, timesteps, predict, after=None):
    """x from the first of the timesteps to x_0, in float64; ``after`` is applied at each step's new abar."""
    x = x.double()
    for i, t in enumerate(timesteps):
        a, a_next = level(t), level(timesteps[i + 1]) if i + 1 < len(timesteps) else 1.0
        epsilon = predict(x, torch.full((len(x),), t))
        x0 = (x - (1 - a) ** 0.5 * epsilon) / a**0.5
        x = a_next**0.5 * x0 + (1 - a_next) ** 0.5 * epsilon
        x = x if after is None else after(x, a_next)
    return x


TABLE = fastguide.ddim(SCHEDULE, 10)


def close(got, expected):
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.29, 0.5, 0.8, 1.0])
def test_image_to_image_runs_the_end_of_the_table(strength):
    image, noise = randn(seed=1), randn(seed=2)
    got = Sampler(model, TABLE)(noise, image=image, strength=strength)
    steps = int(10 * strength)
    if steps == 0:
        assert torch.equal(got, image)
        assert got.data_ptr() != image.data_ptr()
        return
    timesteps = TABLE.host_timesteps[10 - steps :]
    a = level(timesteps[0])
    close(got, ddim_by_hand(a**0.5 * image + (1 - a) ** 0.5 * noise, timesteps, model))


@pytest.mark.parametrize("strength", [None, 1.0, 0.6])
@pytest.mark.parametrize("mask_shape", [(3, 1, 6, 5), (6, 5), (1, 2, 1, 1)])
def test_inpainting_knows_the_image_at_every_level(mask_shape, strength):
    image, noise = randn(seed=1), randn(seed=2)
    mask = (randn(*mask_shape, seed=3) > 0).float()
    got = Sampler(model, TABLE).trajectory(noise, image=image, mask=mask, strength=strength, originals=False)

    def known(x, a):
        return mask * x + (1 - mask) * (a**0.5 * image.double() + (1 - a) ** 0.5 * noise)

    begin = 10 - int(10 * (strength or 1.0))
    timesteps = TABLE.host_timesteps[begin:]
    a = level(timesteps[0])
    x = noise if begin == 0 else a**0.5 * image + (1 - a) ** 0.5 * noise
    close(got.sample, ddim_by_hand(x, timesteps, model, known))
    where = (mask == 0).expand(SHAPE)
    assert torch.equal(got.sample[where], image[where])
    for x, t in zip(got.samples[1:-1], timesteps[1:], strict=True):
        close(x[where], (level(t) ** 0.5 * image.double() + (1 - level(t)) ** 0.5 * noise)[where])


def test_masks_of_bool_and_between():
    image, noise = randn(seed=1), randn(seed=2)
    mask = randn(3, 1, 6, 5, seed=3) > 0
    sampler = Sampler(model, TABLE)
    assert torch.equal(sampler(noise, image=image, mask=mask), sampler(noise, image=image, mask=mask.double()))
    half = sampler(noise, image=image, mask=torch.full((1,), 0.5))
    assert not torch.equal(half, sampler(noise, image=image, mask=torch.ones(1)))
    assert torch.equal(sampler(noise, image=image, mask=torch.ones(1)), sampler(noise))


def test_every_step_s_results():
    got = Sampler(model, TABLE).trajectory(randn())
    assert got.samples.shape == (11, *SHAPE)
    assert got.originals.shape == (10, *SHAPE)
    assert torch.equal(got.samples[0], randn())
    assert torch.equal(got.samples[-1], got.sample)
    for step, t in enumerate(TABLE.host_timesteps):
        x, a = got.samples[step].double(), level(t)
        close(got.originals[step], (x - (1 - a) ** 0.5 * model(x, torch.full((3,), t))) / a**0.5)
    alone = Sampler(model, TABLE).trajectory(randn(), samples=False)
    assert alone.samples is None
    assert torch.equal(alone.originals, got.originals)
    assert torch.equal(Sampler(model, TABLE)(randn()), got.sample)


def test_composition_and_both_guidances_in_plain_torch():
    """With a classifier whose gradient is known, and predictions of three conditions."""
    conditions = [UNCOND, COND, COND + 1]
    guidance = Composed([2.0, -1.0]) + Classifier(grad_fn=lambda x, t: -x, guidance_scale=0.5)
    got = Sampler(model, TABLE, guidance)(randn(), cond=conditions[1:], uncond=UNCOND)

    def predict(x, t):
        m = guided_prediction([model(x, t, y) for y in conditions], [2.0, -1.0])
        return m - (1 - level(int(t[0]))) ** 0.5 * 0.5 * -x

    close(got, ddim_by_hand(randn(), TABLE.host_timesteps, predict))


def test_a_gaussian_has_a_known_answer():
    """Data of N(m, s^2): the exact noise prediction leads DDIM's map to m + s * z as the steps grow."""
    mean, deviation = 1.5, 0.5

    def exact(x, t):
        a = SCHEDULE.alphas_cumprod[t].reshape(-1, 1)
        return ((1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)).to(x.dtype)

    z = randn(64, 50, seed=4)
    errors = []
    for steps in (50, 200, 1000):
        table = fastguide.ddim(SCHEDULE, steps)
        x_0 = Sampler(exact, table)(z)
        errors.append((x_0 - (mean + deviation * z)).abs().mean().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.01


def test_classifier_free_guidance_sharpens_a_mixture():
    """Two classes at -1 and 1: scale 1 samples the class as it is, more scale leads further to its side."""
    deviation = 0.6

    def exact(x, t, y):
        """y = 0: the mixture; otherwise the class on the side of y."""
        a = SCHEDULE.alphas_cumprod[t].reshape(-1, 1).to(x.dtype)
        variance = a * deviation**2 + 1 - a
        y = y.reshape(-1, 1)
        posterior = torch.tanh(a.sqrt() * x / variance)
        mean = torch.where(y == 0, posterior, y)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / variance

    z = randn(512, 8, seed=4)
    table, side = fastguide.ddim(SCHEDULE, 100), torch.ones(512)
    means = []
    for scale in (0.0, 1.0, 3.0):
        x_0 = Sampler(exact, table, ClassifierFree(scale))(z, cond=side, uncond=0 * side)
        means.append(x_0.mean().item())
    assert abs(means[0]) < 0.1
    assert means[1] == pytest.approx(1.0, abs=0.03)
    assert means[2] > 1.1


def test_a_generator_for_each_sample_is_each_sample_by_itself():
    table = fastguide.ddpm(SCHEDULE, 6)
    x = randn()
    got = Sampler(model, table)(x, generator=[torch.Generator().manual_seed(s) for s in (3, 4, 5)])
    for b, seed in enumerate((3, 4, 5)):
        alone = Sampler(model, table)(x[b : b + 1], generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(got[b : b + 1], alone, rtol=1e-6, atol=1e-6)


def test_seeds_do_not_depend_on_the_batch():
    table = fastguide.ddpm(SCHEDULE, 6)
    noise = fastguide.portable_noise([3, 4, 5], SHAPE)
    got = Sampler(model, table)(noise, seeds=[3, 4, 5])
    for order in ([2, 0], [1]):
        seeds = [(3, 4, 5)[b] for b in order]
        assert torch.equal(Sampler(model, table)(noise[order], seeds=seeds), got[order])


def test_generators_are_left_as_torch_leaves_them():
    table = fastguide.ddpm(SCHEDULE, 6)
    generator, by_hand = (torch.Generator().manual_seed(3) for _ in range(2))
    Sampler(model, table)(randn(), generator=generator)
    for _ in range(5):  # the last step adds no noise
        torch.randn(SHAPE, generator=by_hand)
    assert torch.equal(generator.get_state(), by_hand.get_state())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_sampler_goes_on(error):
    """In the model or in the callback."""
    sampler = Sampler(model, fastguide.ddpm(SCHEDULE, 6))
    expected = sampler(randn(), seeds=[1, 2, 3])

    def interrupt(step, timestep, sample):
        if step == 3:
            raise error

    with pytest.raises(error):
        sampler(randn(seed=9), seeds=[4, 5, 6], callback=interrupt)
    assert torch.equal(sampler(randn(), seeds=[1, 2, 3]), expected)


def test_a_sampler_in_use_is_refused():
    sampler = Sampler(model, TABLE)
    with pytest.raises(RuntimeError, match="sampler: is running already, in another thread or a callback"):
        sampler(randn(), callback=lambda *a: sampler(randn()))
    assert sampler(randn()).isfinite().all()


def test_inference_mode_and_plain_calls_in_turns():
    sampler = Sampler(model, fastguide.ddpm(SCHEDULE, 4), ClassifierFree(2.0))
    options = {"cond": COND, "uncond": UNCOND, "seeds": [1, 2, 3]}
    with torch.inference_mode():
        first = sampler(randn(), **options)
    assert torch.equal(sampler(randn(), **options), first)
    with torch.inference_mode():
        assert torch.equal(sampler(randn(), **options), first)


def test_values_that_are_not_finite_are_found_and_dated():
    def diverges(x, t):
        return torch.where((t <= 400).reshape(-1, 1, 1, 1) & (x > 1), torch.nan, 0.1 * x)

    sampler = Sampler(diverges, TABLE)
    assert sampler(randn()).isnan().any()
    step = TABLE.host_timesteps.index(400)
    with pytest.raises(FloatingPointError, match=f"got others after step {step}, timestep 400"):
        sampler(randn(), check_finite=True)
    assert Sampler(model, TABLE)(randn(), check_finite=True).isfinite().all()


def test_no_samples_give_none():
    assert Sampler(model, TABLE)(randn()[:0]).shape == (0, 2, 6, 5)


def test_timesteps_as_the_model_wants_them():
    seen = []

    def spy(x, t):
        seen.append((t.shape, t.dtype, t.clone()))
        return 0.1 * x

    for options, shape, dtype in (
        ({}, (3,), torch.int64),
        ({"timestep_dtype": torch.float32}, (3,), torch.float32),
        ({"scalar_timestep": True}, (), torch.int64),
    ):
        seen.clear()
        Sampler(spy, TABLE, **options)(randn())
        assert [kind[:2] for kind in seen] == [(torch.Size(shape), dtype)] * 10
        assert [int(t.flatten()[0]) for *_, t in seen] == list(TABLE.host_timesteps)


def test_an_interval_calls_the_model_for_the_condition_alone():
    scales = torch.ones(10)
    scales[3:6] = 4.0
    sizes = []

    def spy(x, t, y):
        sizes.append(len(x))
        return model(x, t, y)

    options = {"cond": COND, "uncond": UNCOND}
    for batched in (True, False):
        sizes.clear()
        guidance = ClassifierFree.per_step(scales)
        got = Sampler(spy, TABLE, guidance, skip_unconditional=True, batched=batched)(randn(), **options)
        assert sizes == ([3] * 3 + [6] * 3 + [3] * 4 if batched else [3] * (3 + 6 + 4))
        torch.testing.assert_close(got, Sampler(model, TABLE, guidance)(randn(), **options))
    composed = Composed([0.75, 0.25])  # no weight is left for the unconditional prediction
    sizes.clear()
    options = {"cond": [COND, COND + 1], "uncond": UNCOND}
    got = Sampler(spy, TABLE, composed, skip_unconditional=True)(randn(), **options)
    assert sizes == [6] * 10
    torch.testing.assert_close(got, Sampler(model, TABLE, composed)(randn(), **options))


IMAGE = randn(seed=1)
BAD = {
    "strength below": ({"image": IMAGE, "strength": -0.1}, ValueError, "strength: expected .* from 0 to 1, got -0.1"),
    "strength above": ({"image": IMAGE, "strength": 1.5}, ValueError, "strength: expected .* from 0 to 1, got 1.5"),
    "strength of text": ({"image": IMAGE, "strength": "1"}, ValueError, "strength: expected .* from 0 to 1, got '1'"),
    "strength alone": ({"strength": 0.5}, ValueError, "strength: expected image= with it, got None"),
    "mask alone": ({"mask": IMAGE}, ValueError, "mask: expected image= with it, got None"),
    "image alone": ({"image": IMAGE}, ValueError, "strength: expected .* with image=, or mask=, got None"),
    "image's shape": (
        {"image": IMAGE[:2], "strength": 1.0}, ValueError, r"image: expected shape .* on cpu, as x_T, got .*2,",
    ),
    "image's kind": ({"image": IMAGE > 0, "strength": 1.0}, TypeError, "image: expected .* floating-point .*bool"),
    "mask's shape": (
        {"image": IMAGE, "mask": torch.ones(3, 6, 5)}, ValueError, r"mask: .* broadcasts to .*, got \(3, 6, 5\)",
    ),
    "mask's kind": ({"image": IMAGE, "mask": torch.ones(1).long()}, TypeError, "mask: expected .* got torch.int64"),
    "mask's range": ({"image": IMAGE, "mask": torch.full((1,), 255.0)}, ValueError, "mask: .*, got 255 to 255"),
    "a seed of 65 bits": ({"seeds": [1, 2**64, 3]}, ValueError, "seeds: expected 64 bits, .*, got 184467"),
    "too few generators": ({"generator": [torch.Generator()] * 2}, ValueError, "generator: expected 1 or 3.* got 2"),
    "no generator": ({"generator": 3}, TypeError, "generator: expected a torch.Generator .*, got int"),
    "no generators": ({"generator": [1, 2, 3]}, TypeError, "generator: expected torch.Generators, .*, got int"),
    "both sources": ({"generator": torch.Generator(), "seeds": [1, 2, 3]}, ValueError, "seeds: expected either"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_a_call_refuses(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        Sampler(model, fastguide.ddpm(SCHEDULE, 4))(randn(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph": "always"}, "cuda_graph: expected 'auto', 'loop', 'try' or False, got 'always'"),
        ({"cuda_graph": True}, "cuda_graph: expected 'auto', 'loop', 'try' or False, got True"),
        ({"timestep_dtype": torch.int32}, "timestep_dtype: expected one of"),
        ({"batched": "no"}, "batched: expected True or False, got 'no'"),
        ({"backend": "cuda"}, "backend: expected one of .*, got 'cuda'"),
        ({"max_loops": 0}, "max_loops: expected a positive integer, got 0"),
    ],
)
def test_samplers_that_cannot_be(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Sampler(model, TABLE, **options)


def test_scales_on_a_device_decide_nothing_on_the_host():
    sampler = Sampler(model, TABLE, ClassifierFree(torch.ones(1, device="meta")), skip_unconditional=True)
    with pytest.raises(ValueError, match="skip_unconditional: expected scales that the host knows"):
        sampler(randn(), cond=COND, uncond=UNCOND)


def test_a_callback_s_step_and_a_check_s_are_the_table_s():
    seen = []
    image = randn(seed=1)
    Sampler(model, TABLE)(randn(), image=image, strength=0.3, callback=lambda step, t, x: seen.append((step, t)))
    assert seen == [(step, TABLE.host_timesteps[step]) for step in (7, 8, 9)]
    breaks = Sampler(
        lambda x, t: x * torch.where(t == TABLE.host_timesteps[8], torch.nan, 0.1)[:, None, None, None], TABLE
    )
    with pytest.raises(FloatingPointError, match=f"after step 8, timestep {TABLE.host_timesteps[8]}"):
        breaks(randn(), image=image, strength=0.3, check_finite=True)


def test_records_and_checks_see_what_a_callback_wrote():
    def write(step, timestep, sample):
        sample.fill_(float(step) if step != 4 else torch.nan)

    got = Sampler(model, TABLE).trajectory(randn(), callback=write, originals=False)
    assert torch.equal(got.samples[-1], got.sample)
    assert (got.samples[4] == 3.0).all()
    with pytest.raises(FloatingPointError, match="after step 4"):
        Sampler(model, TABLE)(randn(), callback=write, check_finite=True)


def test_predictions_need_memory_of_their_own():
    options = {"cond": COND, "uncond": UNCOND}
    buffer = torch.empty(SHAPE)
    with pytest.raises(ValueError, match="model: expected new memory at each call with batched=False"):
        Sampler(lambda x, t, y: buffer.copy_(model(x, t, y)), TABLE, ClassifierFree(2.0), batched=False)(
            randn(), **options
        )


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view_as(x), lambda x: x.flip(1).flip(1) + 0])
def test_a_model_may_return_its_input(view):
    options = {"cond": COND, "uncond": UNCOND}
    for guidance, call in ((ClassifierFree(2.0), options), (None, {"cond": COND})):
        for batched in (True, False):
            got, expected = (
                Sampler(lambda x, t, y, f=f: f(x), TABLE, guidance, batched=batched)(randn(), **call)
                for f in (view, torch.clone)
            )
            assert torch.equal(got, expected)


def test_a_prediction_of_the_known_region_does_not_matter():
    """Nor the learned variance where no noise is added."""
    image, mask = randn(seed=1), torch.zeros(6, 5)
    mask[:3] = 1.0
    broken = torch.where(mask == 0, torch.nan, 0.1)
    got = Sampler(lambda x, t: 0 * x + broken, TABLE)(randn(), image=image, mask=mask)
    assert got.isfinite().all()
    assert torch.equal(got[..., 3:, :], image[..., 3:, :])
    table = fastguide.ddpm(SCHEDULE, 5, variance_type="learned")

    def overflows(x, t):
        variance = torch.where(t == 0, torch.inf, -3.0).reshape(-1, 1, 1, 1)
        return torch.cat([0.1 * x, variance.expand_as(x)], 1)

    for backend in ("native", "reference"):
        assert Sampler(overflows, table, backend=backend)(randn(), seeds=[1, 2, 3]).isfinite().all()


def test_half_precision_images_are_noised_in_single():
    image = randn(seed=1).half()
    got = Sampler(lambda x, t: 0 * x, TABLE).trajectory(randn(seed=2), image=image, strength=0.5, originals=False)
    a = level(TABLE.host_timesteps[5])
    close(got.samples[0], a**0.5 * image.double() + (1 - a) ** 0.5 * randn(seed=2).double())


def test_samplers_are_copied_without_their_loops():
    sampler = Sampler(model, TABLE, ClassifierFree(2.0))
    options = {"cond": COND, "uncond": UNCOND}
    expected = sampler(randn(), **options)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(twin(randn(), **options), expected)


def test_a_classifier_has_whole_timesteps():
    embedding = torch.nn.Embedding(1000, 5)
    guidance = Classifier(lambda x, t: x.flatten(1)[:, :5] + embedding(t), 1.0)
    got = Sampler(model, TABLE, guidance, timestep_dtype=torch.float32)(randn(), labels=torch.tensor([0, 1, 2]))
    assert got.isfinite().all()


def test_undefined_rows_are_refused():
    undefined = fastguide.StepTable.from_columns(
        torch.tensor([9, 0]), {"x0_pred": torch.tensor([torch.inf, 1.0])}, undefined="it has no signal"
    )
    with pytest.raises(ValueError, match=r"table: expected steps at which .* is defined, got step 0: it has no signal"):
        Sampler(model, undefined)(randn())


def test_a_gradient_by_a_variance_that_overflowed(backend, generator):
    """Where the mean is not moved by the variance, it may be anything."""
    table = fastguide.ddpm(SCHEDULE, 5, variance_type="learned")
    x, prediction, gradient = (torch.randn(2, 40, generator=generator) for _ in range(3))
    variance = torch.full((2, 40), torch.inf)
    got = fastguide.guided_step(
        table, 4, x, prediction, Classifier(None, 1.0), gradient=gradient, variance=variance, backend=backend
    )
    assert got.isfinite().all()
