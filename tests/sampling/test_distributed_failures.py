"""Test what ranks refuse: what differs between them, by name, on all of them; and ranks that end or do not come."""

from __future__ import annotations

import pytest

from tests.support import rank_failures, ranks

pytestmark = pytest.mark.xdist_group("ranks")  # one server forks the processes of all


def test_what_ranks_cannot_share_is_refused_by_name_on_all_of_them():
    assert ranks.run(2, rank_failures.every_refusal) == [None, None]


def test_what_a_row_of_ranks_knows_is_told_to_the_others():
    """What one rank of a row alone knows is not: the others see that it has ended."""
    first, failing, *others = ranks.run(4, rank_failures.failures_on_two_rows)
    assert failing == "of the model"
    for message, name in zip([first, *others], ("guidance", "data", "data"), strict=True):
        assert message.startswith(f"mesh: expected all ranks of dimension '{name}', "), message


@pytest.mark.parametrize(
    ("shape", "how"), [((1, 2), "ends"), ((2, 1), "ends"), ((1, 2), "stays away"), ((1, 2), "raises")]
)
def test_a_rank_that_is_lost_is_an_error_of_the_others_and_no_hang(shape, how, tmp_path):
    """One that stays away does so until the other has given up; one that raises an exception does that at once."""
    first, second = ranks.run(2, rank_failures.with_a_rank_that_is_lost, shape, how, tmp_path)
    name = "guidance" if shape[1] == 2 else "data"
    assert first.startswith(f"mesh: expected all ranks of dimension '{name}', [0, 1], to take part, but one of them")
    waited = "the predictions of a step" if name == "guidance" else "whether each has its samples"
    assert f"; this rank, 0, waited for {waited}: " in first
    if how == "ends":
        assert second == 9
    elif how == "raises":
        assert second == "of the model, before the other gave up"
    else:
        assert second.startswith("mesh: expected all ranks")
