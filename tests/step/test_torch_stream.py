"""torch's CUDA stream as far as the host knows it: torch's grid over a tensor, and a generator's state on a device."""

from __future__ import annotations

import pytest
import torch

from fastguide import DeviceGenerator
from fastguide.step.noise import TorchGrid

DEVICES = [  # multiprocessors, threads of one
    (132, 2048),  # H100, H200
    (108, 2048),  # A100
    (264, 2048),
    (128, 1536),  # RTX 4090
    (40, 1024),  # T4
    (1, 256),
    (3, 700),  # two blocks of 256 threads and a rest
]
ELEMENTS = [1, 4, 255, 256, 257, 1024, 1025, 16384, 270_336, 1_081_344, 1_081_345, 2**24, 2**31 - 1, 2**31, 2**33 + 5]


def torch_execution_policy(total_elements, multi_processor_count, max_threads_per_multi_processor):
    """ATen/native/cuda/DistributionTemplates.h, calc_execution_policy, line by line; threads instead of the grid."""
    block_size_bound, max_generator_offsets_per_curand_call, unroll_factor = 256, 4, 4
    numel = total_elements
    block_size = block_size_bound
    grid_x = (numel + block_size - 1) // block_size
    blocks_per_sm = max_threads_per_multi_processor // block_size
    grid_x = min(multi_processor_count * blocks_per_sm, grid_x)
    counter_offset = ((numel - 1) // (block_size * grid_x * unroll_factor) + 1) * max_generator_offsets_per_curand_call
    return block_size * grid_x, counter_offset


@pytest.mark.parametrize("device", DEVICES)
def test_the_grid_is_torch_s(device):
    one_round = device[0] * (device[1] // 256) * 256
    for elements in (*ELEMENTS, one_round - 1, one_round, one_round + 1, 4 * one_round, 4 * one_round + 1):
        assert TorchGrid.of(elements, *device) == torch_execution_policy(elements, *device)


def test_no_elements_move_nothing():
    assert TorchGrid.of(0, 132, 2048).increment == 0


@pytest.mark.parametrize(
    ("elements", "threads", "increment"),
    [(1, 256, 4), (16384, 16384, 4), (270_337, 270_336, 4), (1_081_344, 270_336, 4), (1_081_345, 270_336, 8)],
)
def test_grids_of_an_h100(elements, threads, increment):
    assert TorchGrid.of(elements, 132, 2048) == (threads, increment)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_device_generator_holds_any_64_bits(seed):
    generator = DeviceGenerator(seed, 8, device="cpu")
    assert generator.get_state() == (seed % 2**64, 8)
    assert generator.state.dtype == torch.int64
    assert generator.state.tolist()[1:] == [8, 0]


def test_set_rewrites_the_state_in_its_place():
    """A captured graph holds the state's address."""
    generator = DeviceGenerator(3, device="cpu")
    state, address = generator.state, generator.state.data_ptr()
    assert generator.set(9, 12) is generator
    assert generator.state is state
    assert state.data_ptr() == address
    assert generator.get_state() == (9, 12)
    state[2] = 5  # as a kernel that was killed leaves it
    assert generator.set(2**63).get_state() == (2**63, 0)
    assert state[2] == 0
    assert generator.device == torch.device("cpu")
    assert repr(generator) == "DeviceGenerator(device=cpu)"


def test_a_refused_offset_leaves_the_state():
    generator = DeviceGenerator(3, 4, device="cpu")
    with pytest.raises(ValueError, match="offset: expected a multiple of 4"):
        generator.set(9, 6)
    assert generator.get_state() == (3, 4)
