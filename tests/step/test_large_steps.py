"""Steps too large for the caches, which are written past these: the bits of steps of one sample after the other."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import ClassifierFree, StepTable, guided_step
from fastguide.step.backends.native import CAPABILITIES, cpu_capability, set_cpu_capability

TABLE = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10)
BATCH, SIZE = 9, 466_048  # somewhat more than 16 MB; of an odd size, so that few samples begin at a line of 64 bytes
PLAIN, RESCALED = ClassifierFree(7.5), ClassifierFree(7.5, guidance_rescale=0.7)
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "of a model in bfloat16": (torch.float32, torch.bfloat16),
    "of a model in float16": (torch.float32, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


def inputs(generator, state=torch.float32, predicted=torch.float32, count=2):
    values = torch.randn(count + 1, BATCH, SIZE * 4 // state.itemsize + 1, generator=generator)
    return values[0].to(state), [each.to(predicted) for each in values[1:]]


def one_by_one(x, predictions, guidance, table=TABLE):
    samples = range(len(x))
    steps = [guided_step(table, 3, x[k : k + 1], [p[k : k + 1] for p in predictions], guidance) for k in samples]
    return torch.cat(steps)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guidance", [PLAIN, RESCALED, None], ids=["plain", "rescaled", "unguided"])
@pytest.mark.parametrize("kind", DTYPES)
def test_bits_are_those_of_small_steps(kind, guidance, threads, generator):
    x, predictions = inputs(generator, *DTYPES[kind], count=1 if guidance is None else 2)
    expected = one_by_one(x, predictions, guidance)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(guided_step(TABLE, 3, x, predictions, guidance), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mean", [0, 30], ids=["zero mean", "large mean"])  # whose sums are made again in double
@pytest.mark.parametrize("size", [240_001, 300_000, SIZE])
def test_bits_do_not_depend_on_how_many_threads_share_a_sample(size, mean, generator):
    """Its predictions are 1.9, 2.4 and 3.7 MB: two to six of these threads share it, on any number of processors."""
    x, predictions = inputs(generator)
    x, predictions = x[:, :size].contiguous(), [mean + each[:, :size] for each in predictions]
    expected = one_by_one(x, predictions, RESCALED)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4, 5, 6):
            torch.set_num_threads(threads)
            out = torch.full_like(x, torch.nan)  # not memory that an earlier step has left
            guided_step(TABLE, 3, x, predictions, RESCALED, out=out)
            assert torch.equal(out, expected), threads
    finally:
        torch.set_num_threads(before)


def test_every_instruction_set_writes_the_whole_output_and_nothing_beside_it(generator):
    x, predictions = inputs(generator)
    best = cpu_capability()
    try:
        for capability in CAPABILITIES:
            set_cpu_capability(capability)
            expected = one_by_one(x, predictions, PLAIN)
            for offset in (0, 1, 15):
                memory = torch.full((x.numel() + 32,), torch.nan)
                out = memory[offset : offset + x.numel()].view(x.shape)
                guided_step(TABLE, 3, x, predictions, PLAIN, out=out)
                assert torch.equal(out, expected)
                assert memory.isnan().sum() == 32
    finally:
        set_cpu_capability(best)


@pytest.mark.parametrize("place", range(3))
def test_the_output_may_be_an_input(place, generator):
    x, predictions = inputs(generator)
    expected = one_by_one(x, predictions, RESCALED)
    given = [x, *predictions]
    assert torch.equal(guided_step(TABLE, 3, x, predictions, RESCALED, out=given[place]), expected)


def test_thresholds_are_those_of_small_steps(generator):
    x, predictions = inputs(generator)
    table: StepTable = TABLE.with_dynamic_thresholding(0.9, 2.0)
    expected = one_by_one(x, predictions, PLAIN, table)
    assert torch.equal(guided_step(table, 3, x, predictions, PLAIN), expected)


@pytest.mark.parametrize("predicted", [torch.float32, torch.bfloat16], ids=str)
def test_log_probabilities_are_those_of_small_steps(predicted, generator):
    """Whose means are made in memory that is read again at once, which nothing is written past the caches to."""
    table = fastguide.ddim(fastguide.NoiseSchedule.linear(), 10, eta=1.0)
    x, (p, z) = inputs(generator)
    p = p.to(predicted)
    samples = [slice(k, k + 1) for k in range(BATCH)]
    made = [guided_step(table, 3, x[k], [p[k]], noise=z[k], return_log_prob=True) for k in samples]
    y, value = guided_step(table, 3, x, [p], noise=z, return_log_prob=True)
    assert torch.equal(y, torch.cat([each for each, _ in made]))
    assert torch.equal(value, torch.cat([each for _, each in made]))
    assert torch.equal(fastguide.log_prob_of(table, 3, x, [p], None, y), value)
