"""Bad input is refused before anything is computed, naming the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch

import fastguide
from fastguide import Classifier, ClassifierFree, Composed, DeviceGenerator, Sampler, ddim, ddpm, portable_noise
from fastguide.step import checks
from fastguide.step.backends.registry import BACKENDS
from tests.support.cases import SCHEDULE, TABLES

X = torch.zeros(2, 3, 4)
SEEDS = torch.tensor([1, 2])
TRANSPOSED = torch.zeros(2, 4, 3, 5).transpose(1, 2)
UNDEFINED = fastguide.StepTable.from_columns(
    torch.tensor([5, 3]), {"out_pred": torch.tensor([1.0, math.inf])}, undefined="because", name="half a table"
)
DDIM, DDPM, LEARNED = TABLES["ddim"], TABLES["ddpm"], TABLES["ddpm learned"]


def step(table=DDIM, index=0, sample=X, predictions=None, guidance=None, **arguments):
    return fastguide.guided_step(
        table, index, sample, [X] if predictions is None else predictions, guidance, **arguments
    )


STEP_ERRORS = [
    # kinds
    (lambda: step(table="ddim"), TypeError, "table: expected a StepTable, got str"),
    (lambda: step(sample=[0.0]), TypeError, "sample: expected a tensor, got list"),
    (lambda: step(guidance=7.5), TypeError, r"guidance: expected a Guidance such as ClassifierFree\(7.5\), got float"),
    (lambda: step(predictions=[None]), TypeError, r"predictions\[0\]: expected a tensor, got NoneType"),
    (lambda: step(sample=torch.zeros(())), ValueError, r"sample: expected shape \(batch, ...\)"),
    (lambda: step(generator=1, table=DDPM), TypeError, "generator: expected a torch.Generator or a DeviceGenerator, got int"),
    # shapes
    (lambda: step(predictions=[torch.zeros(2, 3, 5)]), ValueError, r"predictions\[0\]: expected shape \(2, 3, 4\), got \(2, 3, 5\)"),
    (lambda: step(guidance=ClassifierFree(2), predictions=[X, X[:1]]), ValueError, r"predictions\[1\]: expected shape"),
    (lambda: step(out=torch.zeros(2, 3)), ValueError, r"out: expected shape \(2, 3, 4\), got \(2, 3\)"),
    (lambda: step(table=DDPM, noise=torch.zeros(3, 4)), ValueError, "noise: expected shape"),
    (lambda: step(guidance=Classifier(), gradient=X[:, :1]), ValueError, "gradient: expected shape"),
    (lambda: step(table=LEARNED, variance=X[:1], noise=X), ValueError, "variance: expected shape"),
    # dtypes
    (lambda: step(sample=X.int(), predictions=[X.int()]), TypeError, "sample: expected float32, bfloat16, float16 or float64, got torch.int32"),
    (lambda: step(predictions=[X.to(torch.complex64)]), TypeError, r"predictions\[0\]: expected float32.*got torch.complex64"),
    (lambda: step(out=X.bool()), TypeError, "out: expected float32.*got torch.bool"),
    # devices
    (lambda: step(predictions=[X.to("meta")]), ValueError, r"predictions\[0\]: expected it on cpu, the sample's device, got meta"),
    (lambda: step(sample=X.to("meta")), ValueError, "table: expected it on meta, the sample's device, got cpu; use .to()"),
    (lambda: step(index=torch.zeros((), dtype=torch.int64, device="meta")), ValueError, "index: expected it on cpu"),
    # layouts
    (lambda: step(predictions=[torch.zeros(2, 4, 3).transpose(1, 2)]), ValueError, r"predictions\[0\]: expected the sample's layout within a sample, strides \(4, 1\), got \(1, 3\)"),
    (lambda: step(sample=torch.zeros(2, 3, 8)[..., ::2]), ValueError, "sample: expected it dense within a sample"),
    (lambda: step(out=torch.zeros(2, 4, 3).mT), ValueError, "out: expected the sample's layout"),
    (lambda: step(out=torch.zeros(1, 3, 4).expand(2, 3, 4)), ValueError, r"out: expected samples that do not overlap, got strides \(0, 4, 1\)"),
    # index
    (lambda: step(index=10), IndexError, "index: expected 0 to 9 for a table of 10 steps, got 10"),
    (lambda: step(index=-1), IndexError, "index: expected 0 to 9"),
    (lambda: step(index=1.0), TypeError, "index: expected an int, an int64 tensor or a Cursor, got float"),
    (lambda: step(index=True), TypeError, "index: expected an int"),
    (lambda: step(index=torch.tensor(1.0)), TypeError, "index: expected an int or an int64 tensor, got torch.float32"),
    (lambda: step(index=torch.tensor([1, 2, 3])), ValueError, r"index: expected shape \(\) or \(2,\), got \(3,\)"),
    (lambda: step(index=torch.tensor([1, 10])), IndexError, "index: expected 0 to 9 for a table of 10 steps, got 10"),
    (lambda: step(index=torch.tensor([1, 10]), backend="reference"), IndexError, "index: expected 0 to 9 for a table of 10 steps, got 10$"),
    (lambda: step(table=UNDEFINED, index=1), ValueError, "index: expected a step at which half a table is defined, got 1: because"),
    (lambda: step(table=UNDEFINED, index=torch.tensor([0, 1])), ValueError, "index: expected a step at which half a table is defined, got 1: because"),
    (lambda: DDIM.index(5), ValueError, "timestep: expected one of the 10 timesteps .* got 5"),
    # guidance
    (lambda: step(guidance=ClassifierFree(2.0)), ValueError, r"predictions: expected 2, one for each weight of the guidance.*got 1 of shape \(2, 3, 4\)"),
    (lambda: step(predictions=[X, X]), ValueError, r"predictions: expected 1, one for each weight.* several need guidance=, such as ClassifierFree\(7.5\)"),
    (lambda: step(predictions=[X.to_sparse()]), TypeError, r"predictions\[0\]: expected a dense tensor, got one of layout torch.sparse_coo"),
    (lambda: step(predictions=3), TypeError, "predictions: expected a tensor or a sequence of them, got int"),
    (lambda: step(predictions=[X[:1]]), ValueError, r"predictions\[0\]: expected shape \(2, 3, 4\), got \(1, 3, 4\)"),
    (lambda: step(predictions=torch.cat([X, X])), ValueError, r"predictions\[0\]: expected shape \(2, 3, 4\), got \(4, 3, 4\)"),
    (lambda: step(predictions=torch.cat([X, X]), guidance=Classifier(), gradient=X, backend="reference"), ValueError, r"predictions\[0\]: expected shape"),
    (lambda: step(predictions=torch.cat([X, X, X]), guidance=ClassifierFree(2)), ValueError, r"predictions: expected 2, .* got 1 of shape \(6, 3, 4\)"),
    (lambda: step(noise=X[:1]), ValueError, "noise: expected shape"),
    (lambda: step(generator="seed"), TypeError, "generator: expected a torch.Generator or a DeviceGenerator, got str"),
    (lambda: step(predictions=[]), ValueError, "predictions: expected 1.* got 0"),
    (lambda: step(guidance=Composed([1, 2]), predictions=[X, X]), ValueError, "predictions: expected 3"),
    (lambda: step(guidance=ClassifierFree([1, 2, 3]), predictions=[X, X]), ValueError, "guidance: expected scales for 1 or 2 samples, got 3"),
    (lambda: step(guidance=ClassifierFree.per_step([1, 2]), predictions=[X, X]), ValueError, "guidance: expected scales for 1 or 10 steps, those of the table, got 2"),
    # roles
    (lambda: step(table=DDPM), ValueError, r"noise: this step adds noise; expected noise=, generator= \(torch.default_generator is global\) or seeds=, got none"),
    (lambda: step(table=DDPM, index=torch.tensor(9)), ValueError, "noise: this step adds noise"),
    (lambda: step(table=DDPM, noise=X, generator=torch.Generator()), ValueError, "noise: expected one of noise, generator and seeds, got noise and generator"),
    (lambda: step(table=DDPM, noise=X, seeds=SEEDS), ValueError, "noise: expected one of noise, generator and seeds, got noise and seeds"),
    (lambda: step(table=DDPM, generator=torch.Generator(), seeds=SEEDS), ValueError, "noise: expected one of .* got generator and seeds"),
    (lambda: step(noise=X, generator=torch.Generator(), seeds=SEEDS), ValueError, "noise: expected one of .* got noise and generator and seeds"),
    # seeds
    (lambda: step(table=DDPM, seeds=7), TypeError, "seeds: expected an int64 tensor, got int"),
    (lambda: step(table=DDPM, seeds=[7, 8]), TypeError, "seeds: expected an int64 tensor, got list"),
    (lambda: step(table=DDPM, seeds=SEEDS.int()), TypeError, "seeds: expected an int64 tensor, got torch.int32"),
    (lambda: step(table=DDPM, seeds=SEEDS.double()), TypeError, "seeds: expected an int64 tensor, got torch.float64"),
    (lambda: step(table=DDPM, seeds=SEEDS[:1]), ValueError, r"seeds: expected shape \(\) or \(2,\), got \(1,\)"),
    (lambda: step(table=DDPM, seeds=SEEDS[:, None]), ValueError, r"seeds: expected shape \(\) or \(2,\), got \(2, 1\)"),
    (lambda: step(table=DDPM, seeds=SEEDS.to("meta")), ValueError, "seeds: expected it on cpu, the sample's device, got meta"),
    (lambda: step(seeds=SEEDS.int()), TypeError, "seeds: expected an int64 tensor, got torch.int32"),
    (lambda: step(table=DDPM, sample=TRANSPOSED, predictions=[TRANSPOSED], seeds=SEEDS), ValueError, r"sample: seeds expect it contiguous or channels_last, got strides \(60, 5, 15, 1\)"),
    (lambda: step(table=DDPM, sample=TRANSPOSED, predictions=[TRANSPOSED], seeds=SEEDS, backend="reference"), ValueError, "sample: seeds expect it contiguous"),
    # DeviceGenerator
    (lambda: step(table=DDPM, generator=DeviceGenerator), TypeError, "generator: expected a torch.Generator or a DeviceGenerator, got type"),
    (lambda: step(table=DDPM, generator=DeviceGenerator(1, device="cpu")), ValueError, "generator: the backend 'native' takes no DeviceGenerator for a sample on cpu"),
    (lambda: step(table=DDPM, generator=DeviceGenerator(1, device="cpu"), backend="reference"), ValueError, "generator: the backend 'reference' takes no DeviceGenerator for a sample on cpu"),
    (lambda: step(table=DDPM, generator=DeviceGenerator(1, device="meta")), ValueError, "generator: expected one of cpu, the sample's device, got one of meta"),
    (lambda: step(gradient=X), ValueError, "gradient: expected None, as no Classifier in the guidance says its scale and form, got a tensor"),
    (lambda: step(guidance=Classifier()), ValueError, "gradient: expected a tensor, as the guidance has a Classifier, got None"),
    (lambda: step(guidance=Classifier(form="mean"), gradient=X), ValueError, "gradient: the form 'mean' has no use in ddim: its steps have no variance"),
    (lambda: step(variance=X), ValueError, "variance: expected None, as this ddim has a fixed variance"),
    (lambda: step(table=LEARNED, noise=X), ValueError, "variance: expected the model's variance output.*got None"),
    # autograd
    (lambda: step(sample=X.clone().requires_grad_(), out=torch.empty_like(X)), ValueError, "out: expected None where gradients are recorded"),
    (lambda: step(predictions=[X.clone().requires_grad_()], staged=torch.empty_like(X)), ValueError, "staged: expected None where gradients are recorded"),
    (lambda: step(out=torch.zeros(2, 3, 4, requires_grad=True)), ValueError, "out: expected a tensor that requires no grad"),
    # backend
    (lambda: step(backend="cuda"), ValueError, r"backend: expected one of \('native', 'triton', 'reference'\), got 'cuda'"),
    (lambda: fastguide.guided_step(DDIM.to("meta"), 0, X.to("meta"), [X.to("meta")], backend="native"), ValueError, "backend: 'native' does not serve a sample on 'meta' here"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), STEP_ERRORS, ids=[m for _, _, m in STEP_ERRORS])
def test_guided_step_refuses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_nothing_is_written_or_drawn_when_input_is_refused():
    out = torch.full_like(X, 7.0)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    for arguments in (
        {"predictions": [X.int()]},
        {"index": 10},
        {"index": torch.tensor(10)},
        {"index": torch.tensor([0, 10])},
        {"backend": "none"},
        {"variance": X},
        {"predictions": [torch.zeros(6, 3, 4)]},
        {"sample": out.view(-1)[:12].view(1, 3, 4).expand(2, 3, 4)},  # partly out
    ):
        with pytest.raises((ValueError, TypeError, IndexError)):
            step(table=DDPM, generator=generator, out=out, **arguments)
    assert (out == 7.0).all()
    assert torch.equal(generator.get_state(), before)


NOISE_ERRORS = [
    (lambda: portable_noise(1, ()), ValueError, r"shape: expected \(batch, ...\), got \(\)"),
    (lambda: portable_noise(1, (2, 3), dtype=torch.int32), TypeError, "dtype: expected a floating-point torch.dtype, got torch.int32"),
    (lambda: portable_noise([1, 2, 3], (2, 4)), ValueError, r"seeds: expected shape \(\) or \(2,\), got \(3,\)"),
    (lambda: portable_noise(torch.tensor([[1], [2]]), (2, 4)), ValueError, r"seeds: expected shape \(\) or \(2,\), got \(2, 1\)"),
    (lambda: portable_noise(torch.tensor([1.0, 2.0]), (2, 4)), TypeError, "seeds: expected int64, got torch.float32"),
    (lambda: portable_noise(torch.tensor([1, 2], dtype=torch.int32), (2, 4)), TypeError, "seeds: expected int64, got torch.int32"),
    (lambda: portable_noise(1, (2, 4), step=torch.tensor([1, 2, 3])), ValueError, r"step: expected shape \(\) or \(2,\), got \(3,\)"),
    (lambda: portable_noise(1, (2, 4), step=1.5), TypeError, "step: expected an int, a sequence of them or an int64 tensor, got 1.5"),
    (lambda: portable_noise(1, (2, 4), step=torch.tensor(1.7)), TypeError, "step: expected int64, got torch.float32"),
    (lambda: portable_noise([1.5, 2.5], (2, 4)), TypeError, r"seeds: expected an int, .* got \[1.5, 2.5\]"),
    (lambda: portable_noise("12", (2, 4)), TypeError, "seeds: expected an int, .* got '12'"),
    (lambda: portable_noise(1, (2, 4), dtype="float32"), TypeError, "dtype: expected a floating-point torch.dtype, got 'float32'"),
    (lambda: DeviceGenerator(1, 3, device="cpu"), ValueError, "offset: expected a multiple of 4 from 0 on, as torch's are, got 3"),
    (lambda: DeviceGenerator(1, -4, device="cpu"), ValueError, "offset: expected a multiple of 4 from 0 on, as torch's are, got -4"),
    (lambda: DeviceGenerator(1, device="cpu").set(1, 2), ValueError, "offset: expected a multiple of 4"),
    (lambda: DeviceGenerator.from_generator(torch.Generator()), ValueError, "generator: expected a torch.Generator of a CUDA device, got cpu"),
    (lambda: DeviceGenerator.from_generator(5), ValueError, "generator: expected a torch.Generator of a CUDA device, got int"),
    (lambda: DeviceGenerator.from_generator(DeviceGenerator(1, device="cpu")), ValueError, "generator: expected a torch.Generator of a CUDA device, got cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), NOISE_ERRORS, ids=[m for _, _, m in NOISE_ERRORS])
def test_streams_of_noise_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


GUIDANCE_ERRORS = [
    (lambda: ClassifierFree(math.nan), ValueError, "guidance_scale: expected a finite number .in float32., got nan"),
    (lambda: ClassifierFree([1.0, math.inf]), ValueError, "guidance_scale: expected finite values .in float32., got inf"),
    (lambda: ClassifierFree(1e39), ValueError, "guidance_scale: expected a finite number .in float32., got 1e"),
    (lambda: Classifier(None, torch.tensor([1e39], dtype=torch.float64)), ValueError, "guidance_scale: expected finite values"),
    (lambda: ClassifierFree(torch.tensor([True])), TypeError, "guidance_scale: expected a tensor of real numbers, got one of torch.bool"),
    (lambda: ClassifierFree([[1, 2], [3]]), TypeError, "guidance_scale: expected a sequence of numbers, got"),
    (lambda: ClassifierFree(["a"]), TypeError, "guidance_scale: expected a sequence of numbers, got"),
    (lambda: Composed(None), ValueError, "guidance_scales: expected a sequence of scales, .* got None"),
    (lambda: ClassifierFree("7.5"), TypeError, "guidance_scale: expected a number, .* got str"),
    (lambda: ClassifierFree(None), TypeError, "guidance_scale: expected a number, .* got NoneType"),
    (lambda: ClassifierFree(True), TypeError, "guidance_scale: expected a number, .* got bool"),
    (lambda: ClassifierFree(torch.zeros(2, 2, 2)), ValueError, r"guidance_scale: expected a number, shape .* got shape \(2, 2, 2\)"),
    (lambda: ClassifierFree([]), ValueError, r"guidance_scale: .* got shape \(0,\)"),
    (lambda: ClassifierFree.from_w(math.inf), ValueError, "w: expected a finite number .in float32., got inf"),
    (lambda: ClassifierFree.per_step(3.0), ValueError, "guidance_scale: expected one number a step"),
    (lambda: Composed(3.0), ValueError, "guidance_scales: expected a sequence of scales"),
    (lambda: Composed([[1.0, 2.0], [1.0, 2.0, 3.0]]), ValueError, r"guidance_scales: expected scales for as many samples everywhere, got \[2, 3\]"),
    (lambda: Composed([]), ValueError, "guidance_scales: expected a sequence of scales"),
    (lambda: Composed([1.0, math.nan]), ValueError, r"guidance_scales\[1\]: expected a finite number .in float32., got nan"),
    (lambda: Classifier(form="score"), ValueError, "form: expected one of .* got 'score'"),
    (lambda: Classifier(3.0), TypeError, "classifier: expected a callable, got float"),
    (lambda: Classifier(abs, grad_fn=abs), ValueError, "grad_fn: expected either a classifier or a grad_fn, got both"),
    (lambda: ClassifierFree(1) + ClassifierFree(2), ValueError, "guidance: expected one set of prediction weights, got two"),
    (lambda: Classifier() + Classifier(), ValueError, "guidance: expected at most one Classifier, got two"),
    (lambda: ClassifierFree([1, 2]) + Classifier(None, [1, 2, 3]), ValueError, "guidance: expected as many scales per sample in both parts, got 2 and 3"),
    (lambda: ClassifierFree(1) + 3, TypeError, "unsupported operand"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), GUIDANCE_ERRORS, ids=[m for _, _, m in GUIDANCE_ERRORS])
def test_guidance_refuses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


ZERO_SNR = SCHEDULE.rescale_zero_terminal_snr()
SOLVER_ERRORS = [
    (lambda: ddpm("linear", 5), TypeError, "schedule: expected a NoiseSchedule, got str"),
    (lambda: ddim("linear", 5), TypeError, "schedule: expected a NoiseSchedule, got str"),
    (lambda: ddim(SCHEDULE, 5, eta="1"), ValueError, "eta: expected a number from 0 to 1, got '1'"),
    (lambda: ddim(SCHEDULE, 5, clip_sample_range="1"), ValueError, "clip_sample_range: expected a positive number or None, got '1'"),
    (lambda: ddim(SCHEDULE, timesteps="abc"), TypeError, "timesteps: expected a tensor or a sequence of numbers, got 'abc'"),
    (lambda: ddim(SCHEDULE, 5, steps_offset=0.5), TypeError, "steps_offset: expected an integer, got 0.5"),
    (lambda: fastguide.StepTable.from_columns(torch.zeros(1, dtype=torch.bool), {}), ValueError, "timesteps: expected int64 or floating-point"),
    (lambda: fastguide.StepTable.from_columns(torch.zeros(0, dtype=torch.int64), {}), ValueError, "timesteps: expected int64 or floating-point"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {"out": torch.ones(1)}), ValueError, "columns: expected some of .* got 'out'"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {"clip": torch.zeros(1)}), ValueError, "columns: expected positive values in 'clip'"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {"out_x0": torch.tensor([math.nan])}), ValueError, "columns: expected finite rows, got others at timestep 3"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {"in_scale": torch.tensor([math.inf])}), ValueError, "columns: expected finite rows, got others at timestep 3"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {}, gradients={"mean": {"in_scale": torch.ones(1)}}), ValueError, "columns: expected some of .* got 'in_scale'"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {}, gradients={"mean": {"out_grad": torch.tensor([math.inf])}}), ValueError, "columns: expected finite rows"),
    (lambda: fastguide.StepTable.from_columns(torch.tensor([3]), {}, gradients={"middle": {}}), ValueError, "gradients: expected the forms .* got 'middle'"),
    (lambda: fastguide.convert_prediction(None, X, 3, X, "epsilon", "sample"), TypeError, "schedule: expected a NoiseSchedule, a FlowSchedule or Levels, got NoneType"),
    (lambda: fastguide.convert_prediction(SCHEDULE, X, 3, X, "", "epsilon"), ValueError, "source: expected one of"),
    (lambda: fastguide.drop_condition([1, 2], torch.tensor(0)), TypeError, "condition: expected a tensor, got list"),
    (lambda: fastguide.drop_condition(torch.tensor([1, 2]), torch.tensor(0.5)), TypeError, "null_condition: expected torch.int64, the condition's dtype, got torch.float32"),
    (lambda: ddpm(SCHEDULE, 0), ValueError, "num_inference_steps: expected a positive integer, got 0"),
    (lambda: ddim(SCHEDULE), ValueError, "num_inference_steps: expected a number, or timesteps=, got None"),
    (lambda: ddim(SCHEDULE, 3, timesteps=[5, 1]), ValueError, "num_inference_steps: expected 2, the length of timesteps, got 3"),
    (lambda: ddim(SCHEDULE, timesteps=[1, 5]), ValueError, "timesteps: expected strictly falling values"),
    (lambda: ddpm(SCHEDULE, 5, prediction_type="flow"), ValueError, "prediction_type: expected one of .* got 'flow'"),
    (lambda: ddpm(SCHEDULE, 5, variance_type="fixed"), ValueError, "variance_type: expected one of .* got 'fixed'"),
    (lambda: ddpm(SCHEDULE, 5, clip_sample_range=0), ValueError, "clip_sample_range: expected a positive number or None, got 0"),
    (lambda: ddim(SCHEDULE, 5, eta=1.5), ValueError, "eta: expected a number from 0 to 1, got 1.5"),
    (lambda: ddim(SCHEDULE, 5, timestep_spacing="even"), ValueError, "timestep_spacing: expected one of"),
    (lambda: ddim(ZERO_SNR, 5, timestep_spacing="trailing"), ValueError, "prediction_type: 'epsilon' says nothing of x_0 at timestep 999"),
    (lambda: DDIM[::2], ValueError, "table: a row leads to the next timestep, so slices have step 1"),
    (lambda: DDIM[10:], ValueError, "table: the slice 10:10 of 10 steps is empty"),
    (lambda: DDIM[0], TypeError, r"table: expected a slice such as table\[k:\], got 0"),
    (lambda: ddim(ZERO_SNR, 5, timestep_spacing="trailing", prediction_type="v_prediction").device_rows("epsilon", torch.float32), ValueError, "gradient: the form 'epsilon' has no use in ddim: the schedule has zero signal at timestep 999"),
    (lambda: fastguide.convert_prediction(ZERO_SNR, X, 999, X, "epsilon", "sample"), ValueError, "timestep: expected one at which convert_prediction is defined, got 999: the schedule has zero signal there"),
    (lambda: fastguide.add_noise(SCHEDULE, X, torch.tensor([3, -1]), X), ValueError, "timestep: expected 0 to 999, got -1"),
    (lambda: fastguide.add_noise(SCHEDULE, X, torch.tensor([3.0, 1.0]), X), TypeError, "timestep: expected an int or an int64 tensor, got torch.float32"),
    (lambda: fastguide.convert_prediction(SCHEDULE, X, 3, X, "epsilon", "flow"), ValueError, "target: expected one of"),
    (lambda: fastguide.add_noise(SCHEDULE, X, 1000, X), ValueError, "timestep: expected 0 to 999, got 1000"),
    (lambda: fastguide.add_noise(SCHEDULE, X, 5), ValueError, "noise: this step adds noise"),
    (lambda: fastguide.add_noise(SCHEDULE, 1.0, 5), TypeError, "original: expected a tensor of floating-point numbers, got float"),
    (lambda: fastguide.add_noise(SCHEDULE, X.to(torch.uint8), 5, X), TypeError, "original: expected a tensor of floating-point numbers, got torch.uint8"),
    (lambda: fastguide.add_noise(SCHEDULE, X, 5.0, X), TypeError, "timestep: expected an int or an int64 tensor, got float"),
    (lambda: ddim(SCHEDULE, 5, clip_sample_range=True), ValueError, "clip_sample_range: expected a positive number or None, got True"),
    (lambda: fastguide.ConditionDropout(16), TypeError, "condition_shape: expected a tuple, got int"),
    (lambda: fastguide.drop_condition(X, X[0], 1.5), ValueError, "p_uncond: expected a probability, got 1.5"),
    (lambda: fastguide.drop_condition(torch.tensor(1), torch.tensor(0)), ValueError, r"condition: expected shape \(batch, ...\)"),
    (lambda: fastguide.ConditionDropout((3,), -0.1), ValueError, "p_uncond: expected a probability, got -0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), SOLVER_ERRORS, ids=[m for _, _, m in SOLVER_ERRORS])
def test_solvers_and_helpers_refuse(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def model(x, t, *condition):
    return 0.1 * x


def never(*arguments):
    pytest.fail("the model was called before the arguments were checked")


COND = torch.zeros(2, 5)
LOGITS = Classifier(lambda x, t: x.flatten(1))
SAMPLER_ERRORS = [
    (lambda: Sampler("model", DDIM), TypeError, "model: expected a callable, got str"),
    (lambda: Sampler(model, 10), TypeError, "table: expected a StepTable, got int"),
    (lambda: Sampler(model, DDIM, 7.5), TypeError, "guidance: expected a Guidance or None, got float"),
    (lambda: Sampler(model, DDIM)(None), TypeError, r"x_T: expected a tensor of shape \(batch, ...\)"),
    (lambda: Sampler(model, DDIM)(X, uncond=COND), ValueError, "uncond: expected None, as the guidance weighs no unconditional"),
    (lambda: Sampler(model, DDIM)(X, cond=[COND, COND]), ValueError, "cond: expected one condition, got 2"),
    (lambda: Sampler(model, DDIM, ClassifierFree(2))(X, cond=COND), ValueError, "uncond: expected the null"),
    (lambda: Sampler(model, DDIM, ClassifierFree(2))(X, uncond=COND), ValueError, r"cond: expected 1 condition\(s\)"),
    (lambda: Sampler(model, DDIM, Composed([1, 2]))(X, cond=COND, uncond=COND), ValueError, r"cond: expected 2 condition\(s\)"),
    (lambda: Sampler(model, DDIM)(X, cond=COND[:1]), ValueError, r"cond: expected the batch of 2 in front, got shape \(1, 5\)"),
    (lambda: Sampler(model, DDIM)(X, cond="a cat"), TypeError, "cond: expected a tensor or a mapping of tensors, got str"),
    (lambda: Sampler(model, DDIM, ClassifierFree(2))(X, cond={"y": COND}, uncond={"z": COND}), ValueError, "uncond: expected a mapping with the keys"),
    (lambda: Sampler(lambda x, t: x[:1], DDIM)(X), ValueError, r"model: expected it to return shape \(2, 3, 4\), got \(1, 3, 4\)"),
    (lambda: Sampler(lambda x, t: x, LEARNED)(X), ValueError, r"model: expected it to return shape \(2, 6, 4\), got \(2, 3, 4\)"),
    (lambda: Sampler(lambda x, t: None, DDIM)(X), TypeError, "model: expected it to return a tensor, got NoneType"),
    (lambda: Sampler(model, DDIM)(X, labels=torch.tensor([0, 1])), ValueError, "labels: expected None, as the guidance has no classifier"),
    (lambda: Sampler(never, DDIM)(X, callback=3), TypeError, "callback: expected a callable, got int"),
    (lambda: Sampler(model, DDIM, LOGITS)(X), ValueError, r"labels: expected int64 of shape \(2,\), got None"),
    (lambda: Sampler(model, DDIM, LOGITS)(X, labels=torch.zeros(2)), ValueError, "labels: expected int64 of shape .* got torch.float32"),
    (lambda: Sampler(model, DDIM, Classifier(lambda x, t: x))(X, labels=torch.tensor([0, 1])), ValueError, r"classifier: expected logits of shape \(2, classes\), got \(2, 3, 4\)"),
    (lambda: Sampler(model, DDIM, Classifier(lambda x, t: torch.zeros(2, 5)))(X, labels=torch.tensor([0, 1])), ValueError, "classifier: expected logits that depend on x by autograd"),
    (lambda: Sampler(model, DDIM, Classifier(grad_fn=lambda x, t: x[:1]))(X), ValueError, r"gradient: expected \(2, 3, 4\), the sample's shape"),
    (lambda: Sampler(model, DDIM, LOGITS)(X, labels=torch.tensor([0, 12])), ValueError, r"labels: expected 0 to 11, the classifier's classes, got \[0, 12\]"),
    (lambda: Sampler(model, DDIM, Classifier(lambda x, t: torch.nn.Linear(3, 5)(torch.zeros(2, 3))))(X, labels=torch.tensor([0, 1])), ValueError, "classifier: expected logits that depend on x by autograd"),
    (lambda: Sampler(model, DDIM, Classifier(grad_fn=lambda x, t: None))(X), TypeError, "gradient: expected a tensor, got NoneType"),
    (lambda: Sampler(never, DDIM, ClassifierFree.per_step([1, 2]))(X, cond=COND, uncond=COND), ValueError, "guidance: expected scales for 1 or 10 steps"),
    (lambda: Sampler(never, DDIM, ClassifierFree([1, 2, 3]))(X, cond=COND, uncond=COND), ValueError, "guidance: expected scales for 1 or 2 samples"),
    (lambda: Sampler(never, DDIM, backend="magic")(X), ValueError, "backend: expected one of"),
    (lambda: Sampler(never, DDIM)(X.int()), TypeError, "x_T: expected float32, bfloat16, float16 or float64, got torch.int32"),
    (lambda: Sampler(never, DDIM)(torch.zeros(2, 3, 8)[..., ::2]), ValueError, "x_T: expected it dense within a sample"),
    (lambda: Sampler(never, DDIM.to("meta"))(X), ValueError, "table: expected it on cpu, the device of x_T, got meta"),
    (lambda: Sampler(never, DDIM, Classifier(form="mean"))(X), ValueError, "gradient: the form 'mean' has no use in ddim"),
    (lambda: Sampler(model, DDIM, dtype="bfloat16"), TypeError, "dtype: expected a floating-point torch.dtype or None, got 'bfloat16'"),
    (lambda: Sampler(model, DDIM, ClassifierFree(2))(X, cond=COND, uncond=COND[:1]), ValueError, "uncond: expected the batch of 2 in front"),
    (lambda: Sampler(model, DDIM, Classifier())(X), ValueError, "classifier: this Classifier has neither classifier nor grad_fn"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), SAMPLER_ERRORS, ids=[m for _, _, m in SAMPLER_ERRORS])
def test_sampler_refuses(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_gpu_takes_so_many_predictions():
    """Said by the check, before the model of a loop is called; a CPU takes any number."""
    backend = BACKENDS["native"]
    if not backend.devices:
        pytest.skip(backend.status)
    many = Composed([0.1] * 32)
    with pytest.raises(ValueError, match=r"guidance: expected at most 32 predictions on a GPU \(native\), got 33"):
        checks.check_number(backend, torch.device("cuda"), many)
    checks.check_number(backend, torch.device("cpu"), many)
    checks.check_number(backend, torch.device("cuda"), Composed([0.1] * 31))
