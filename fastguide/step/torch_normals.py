"""Draw torch's own normal values on the CPU, faster: the bits of ``Tensor.normal_``, and the generator left as by it.

torch makes one word of its generator after the other, which takes nine tenths of a draw's time; the library makes a
vector of them at a time, and then does torch's arithmetic. Which bits that gives depends on torch's build and on the
processor. So both are compared at the first draw, from a generator of their own, and if a bit differs anywhere, torch
draws, then and always. torch also draws what the library has no code for: dtypes but float32, less than 16 values, and
tensors that are not contiguous; and wherever another thread of Python does anything but wait, since a generator of
torch's is safe among threads, and to get a state and to set it later is not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .attached import functions, is_watched
from .threads import know_waits

LEAST = 16
"""Values from which on torch makes them 16 at a time."""
_COMPARED = (16, 17, 31, 624, 1000, 4099, 20000)
"""Sizes: of one group of 16 values; with a rest; of torch's 624 words at a time, and across them."""


def normal_(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a tensor with standard normal values, as ``tensor.normal_(generator=generator)``; return it."""
    if functions is None or not (_may_draw() and functions.fill_normals(tensor, generator, False)):
        tensor.normal_(generator=generator)
    return tensor


def pass_over(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> None:
    """Leave a generator of the CPU as ``torch.randn(shape, dtype=dtype, generator=generator)`` does."""
    may = dtype == torch.float32 and _may_draw()
    if functions is None or not (may and functions.pass_normals(generator, math.prod(shape), False)):
        torch.randn(shape, dtype=dtype, device="cpu", generator=generator)


def _may_draw() -> bool:
    if is_compiling() or is_watched():
        return False
    know_waits()
    return is_torch_s()


@functools.cache
def is_torch_s() -> bool:
    """Tell whether the library's values are torch's, to the bit; from now on, steps draw by it if they are."""
    same = functions is not None and all(map(_draws_alike, range(2)))
    if functions is not None:
        functions.trust_draws(same)
    return same


def _draws_alike(seed: int) -> bool:
    """Draw by both, in sequence, and compare values and states, also where values are passed over."""
    assert functions is not None
    ours, theirs, passing = (torch.Generator("cpu").manual_seed(seed) for _ in range(3))
    for size in _COMPARED:
        got, expected = (torch.empty(size, dtype=torch.float32, device="cpu") for _ in range(2))
        expected.normal_(generator=theirs)
        if not (functions.fill_normals(got, ours, True) and functions.pass_normals(passing, size, True)):
            return False
        if not torch.equal(got.view(torch.int32), expected.view(torch.int32)):
            return False
        state = theirs.get_state()
        if not (torch.equal(ours.get_state(), state) and torch.equal(passing.get_state(), state)):
            return False
    return True
