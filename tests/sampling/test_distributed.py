"""Test sampling by 1 to 4 processes: the bits are those of one process, whatever is spread over the mesh."""

from __future__ import annotations

import pytest
import torch

from tests.support import rank_cases, ranks
from tests.support.rank_cases import CASES, arguments_of, sampled, sampler_of

pytestmark = pytest.mark.xdist_group("ranks")  # one server forks the processes of all

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
                of_two = sampler_of("classifier-free").trajectory(**arguments_of("classifier-free", 2))
                assert torch.equal(made["of two"], of_two.sample)
                assert torch.equal(made["samples of two"], of_two.samples)


def test_what_is_sent_and_called_at_each_step():
    """For two ranks: outputs in the model's dtype, once a step; one by one, while the next call goes on."""
    first, second = ranks.run(2, rank_cases.what_is_sent)
    one, float32, bfloat16 = 5 * 2 * 4 * 4, torch.float32, torch.bfloat16
    assert first["classifier-free"] == second["classifier-free"] == [5, (one, float32), "end"] * 4
    assert first["bfloat16"] == second["bfloat16"] == [5, (one, bfloat16), "end"] * 4
    assert first["learned variance"] == second["learned variance"] == [5, (2 * one, float32), "end"] * 4
    assert first["five"] == [15, (3 * one, float32), "end"] * 4
    assert second["five"] == [10, (3 * one, float32), "end"] * 4
    one_by_one = [5, (one, float32), 5, (one, float32), "end", "end"] * 4
    assert first["four, one by one"] == second["four, one by one"] == one_by_one


def test_steps_with_an_all_gather_can_be_a_graph(expected):
    """Of the stand-in, which makes what was recorded again: all memory stays where it was."""
    for found in ranks.run(2, rank_cases.captured):
        assert len(found) == 4
        for name, (first, replayed) in found.items():
            assert torch.equal(first, expected[name]), name
            assert torch.equal(replayed, expected[name]), name
