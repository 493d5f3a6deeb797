"""The words of programs, as the host knows them for kernels that are compiled for a program."""

from __future__ import annotations

import pytest
import torch

from fastguide import Normalized
from fastguide.guidance.words import check_words, moments_read, words_of


def test_words_are_known_of_programs_that_are_copied_to_a_device():
    """Nobody reads them there; other tensors are read once, and again where they were written."""
    made_by = Normalized(3.0, dim=-1).weights_from
    program, _ = made_by.on(torch.device("meta"))
    assert words_of(program) == tuple(made_by.on(torch.device("cpu"))[0][0].tolist())
    other = torch.tensor([[0, 0, 1]])
    assert words_of(other) == (0, 0, 1)
    other[0, 1] = 2
    assert words_of(other) == (0, 2, 1)
    with pytest.raises(RuntimeError, match=r"expected the same for all samples, as weights are of groups.*got 2"):
        words_of(torch.tensor([[0, 0, 1], [0, 1, 1]]))


def test_words_of_inference_tensors_are_read_each_time():
    """torch counts no writes to them."""
    with torch.inference_mode():
        program = torch.tensor([[0, 0, 1]])
        assert words_of(program) == (0, 0, 1)
        program[0, 1] = 2
        assert words_of(program) == (0, 2, 1)


def test_moments_that_a_program_does_not_read_are_not_made():
    words = words_of(Normalized(3.0, dim=-1).weights_from.on(torch.device("cpu"))[0])
    assert moments_read(words, 2) == (True, True, True, False, False)
    assert moments_read((1, 10, 10, 4, 3, 0, 0), 2) == (False, False, False, True, False)


BAD_WORDS = {
    "instructions": ((9, 0, 1, 0, 0, 0, 0), "expected 0 to 1 instructions in its 7 words, got 9"),
    "an operation": ((1, 0, 1, 99, 0, 0, 0), r"as instruction 0, got \(99, 0, 0, 0\)"),
    "an operand": ((1, 0, 1, 0, 12, 0, 0), r"as instruction 0, got \(0, 12, 0, 0\)"),
    "a weight": ((1, 0, 13, 0, 0, 0, 0), r"expected weights among its 13 values, got \(0, 13\)"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_words_that_lead_nowhere_are_refused(name):
    words, message = BAD_WORDS[name]
    with pytest.raises(RuntimeError, match=message):
        check_words(words, 2, 2)
