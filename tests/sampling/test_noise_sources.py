"""Sources of a run's noise on buffers alone: torch's stream without a GPU, by stand-ins for its generator and grid."""

from __future__ import annotations

import pytest
import torch

import fastguide
from fastguide import DeviceGenerator
from fastguide.sampling import noise
from fastguide.step.backends.registry import BACKENDS
from fastguide.step.noise import TorchGrid, portable_noise

SAMPLE = torch.zeros(2, 3)
ALL = slice(None)


class CountedGenerator(torch.Generator):
    """Has an offset, as torch's on a GPU."""

    def __new__(cls, seed, offset=0):
        generator = super().__new__(cls)
        generator.seed_, generator.offset = seed, offset
        return generator

    def __init__(self, seed, offset=0):
        pass

    def initial_seed(self):
        return self.seed_

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset


@pytest.fixture
def buffers(monkeypatch):
    monkeypatch.setattr(noise, "torch_grid", lambda device, elements: TorchGrid(256, 4))
    return noise.NoiseBuffers("torch_stream", SAMPLE)


def position(buffers):
    return buffers.generator.get_state()


def kernel(buffers):
    """Move the state on, as the kernel does in a step that adds noise."""
    buffers.generator.state[1] += buffers.grid.increment


def test_torch_s_stream_moves_the_caller_s_generator_on(buffers):
    generator = CountedGenerator(2**64 - 1, 8)
    source = noise.TorchStreamNoise(generator)
    source.load(buffers, ALL)
    for offset in (12, 16):
        source.before_step(buffers)
        kernel(buffers)
        source.after_step(buffers)
        assert generator.offset == offset
        assert position(buffers) == (2**64 - 1, offset)
    source.end(buffers)
    assert generator.offset == 16


def test_torch_s_stream_continues_after_what_others_drew(buffers):
    generator = CountedGenerator(3)
    source = noise.TorchStreamNoise(generator)
    source.load(buffers, ALL)
    for between, expected in ((20, (3, 20)), (0, (3, 24))):
        generator.offset += between
        source.before_step(buffers)
        assert position(buffers) == expected
        kernel(buffers)
        source.after_step(buffers)
    generator.seed_ = 5
    source.before_step(buffers)
    assert position(buffers) == (5, 28)


def test_a_generator_on_the_device_has_its_new_state_at_the_end(buffers):
    generator = DeviceGenerator(7, 4, device="cpu")
    source = noise.TorchStreamNoise(generator)
    source.load(buffers, ALL)
    for _ in range(2):
        source.before_step(buffers)
        kernel(buffers)
        source.after_step(buffers)
        assert generator.get_state() == (7, 4)
    source.end(buffers)
    assert generator.get_state() == (7, 12)


def test_one_generator_or_one_for_each_sample_draws_before_the_step():
    given = noise.NoiseBuffers("given", SAMPLE)
    one, several = torch.Generator().manual_seed(1), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    for generators in ([one], several):
        source = noise.TorchNoise(generators)
        source.before_step(given)
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        if len(generators) == 1:
            expected = torch.randn(2, 3, generator=seeds[0])
        else:
            expected = torch.cat([torch.randn(1, 3, generator=generator) for generator in seeds])
        assert torch.equal(given.values, expected)


def test_each_source_serves_what_it_is_for():
    noisy, plain = (
        fastguide.ddpm(fastguide.NoiseSchedule.linear(), 3),
        fastguide.ddim(fastguide.NoiseSchedule.linear(), 3),
    )
    backend = BACKENDS["reference"]
    for table, generator, seeds, source in (
        (plain, None, [1, 2], "none"),
        (noisy, None, None, "given"),
        (noisy, [torch.Generator()] * 2, None, "given"),
        (noisy, None, [1, 2], "portable"),
    ):
        assert noise.noise_source(table, SAMPLE, generator, seeds, backend).source == source
    portable = noise.NoiseBuffers("portable", SAMPLE)
    noise.noise_source(noisy, SAMPLE[:1], None, [2**64 - 1], backend).load(portable, slice(1, 2))
    assert portable.seeds.tolist() == [0, -1]
    assert portable_noise(portable.seeds, (2, 3)).isfinite().all()
