"""Test sampling by 1 to 4 processes: the bits are those of one process, whatever is spread over the mesh."""

from __future__ import annotations

import pytest
import torch

from tests.support import rank_cases, ranks
from tests.support.rank_cases import CASES, arguments_of, sampled, sampler_of

MESHES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2), (1, 4), (4, 1)]}


@pytest.fixture(scope="module")
def expected():
    return {name: sampled(sampler_of(name), **arguments_of(name)) for name in CASES}


@pytest.mark.parametrize("world", MESHES)
def test_any_number_of_ranks_gives_the_bits_of_one_process(world, expected):
    for rank, found in enumerate(ranks.run(world, rank_cases.every_case, MESHES[world])):
        for shape, made in found.items():
            served = [name for name in CASES if CASES[name].predictions >= shape[1]]
            assert len(served) > 2
            for name in served:
                assert torch.equal(made[name], expected[name]), (shape, rank, name)
                assert made[name].stride() == expected[name].stride(), (shape, rank, name)
            begin, end = made["own"].tolist()
            if "share" in made:
                assert torch.equal(made["share"], expected["classifier-free"][begin:end])
                plain = sampler_of("classifier-free").trajectory(**arguments_of("classifier-free"))
                assert torch.equal(made["samples"], plain.samples)
                assert torch.equal(made["originals"], plain.originals)
                of_two = sampled(sampler_of("classifier-free"), **arguments_of("classifier-free", 2))
                assert torch.equal(made["of two"], of_two)
