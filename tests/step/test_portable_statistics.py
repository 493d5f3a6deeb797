"""The portable stream is standard normal and independent; a stream broken on purpose fails each of these criteria.

A criterion returns the largest deviation in standard errors; the stream's is below LIMIT, the broken ones' above.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastguide.step import noise
from tests.support.pure_noise import drawn

pytestmark = pytest.mark.xdist_group("portable statistics")  # one process draws for all

LIMIT = 5.0
SEEDS, STEPS, ELEMENTS = 16, 8, 32768  # 2^22 values
SEED_OF, STEP_OF = torch.arange(SEEDS).repeat_interleave(STEPS), torch.arange(STEPS).repeat(SEEDS)


def stream(seeds=SEED_OF, steps=STEP_OF, elements=ELEMENTS):
    """Values of consecutive seeds and steps: (seeds, steps, elements)."""
    return drawn(seeds, (SEEDS * STEPS, elements), steps).view(SEEDS, STEPS, elements)


@pytest.fixture(scope="module")
def values():
    return stream()


def same(word):
    return word


def of_words(a, b, seed=0):
    """A million pairs as the stream makes them of a call's two words, but of random words, changed before."""
    generator = torch.Generator().manual_seed(seed)
    words = [torch.randint(2**32, (2**20,), generator=generator) for _ in range(2)]
    return torch.stack(noise._normals(a(words[0]), b(words[1])), -1)


def of_bits(bits):
    """With a uniform number of few bits, in the middle of its interval."""
    low = 2 ** (32 - bits)
    return of_words(lambda a: a // low * low + low // 2, same)


# ---- The distribution ----

HERMITE = {  # under the normal distribution each has the mean 0 and this variance
    "mean": (1, lambda z: z),
    "variance": (2, lambda z: z**2 - 1),
    "skewness": (6, lambda z: z**3 - 3 * z),
    "kurtosis": (24, lambda z: z**4 - 6 * z**2 + 3),
}


def moment(values, name):
    variance, polynomial = HERMITE[name]
    return abs(polynomial(values.double()).mean().item()) * math.sqrt(values.numel() / variance)


def tail(count, of, sigmas):
    """How unlikely so few or so many values beyond the sigmas are, by Poisson's distribution."""
    expected = torch.tensor(of * math.erfc(sigmas / math.sqrt(2)), dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    as_few = torch.special.gammaincc(n + 1, expected)
    as_many = torch.special.gammainc(n, expected) if count else torch.ones_like(n)
    return -torch.special.ndtri(torch.minimum(as_few, as_many)).item()


def kolmogorov_smirnov(values):
    cdf = torch.special.ndtr(values.flatten().double().sort().values)
    n = len(cdf)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps).max(), (steps + 1 / n - cdf).max()).item()
    probability = min(2 * math.exp(-2 * n * distance**2), 1.0)
    return -torch.special.ndtri(torch.tensor(probability / 2, dtype=torch.float64)).item()


@pytest.mark.parametrize("name", HERMITE)
def test_moments(values, name):
    assert moment(values, name) < LIMIT


BROKEN_MOMENTS = [
    ("mean", "the angle's highest bit dropped", lambda: of_words(same, lambda b: b & 0x7FFFFFFF)),
    ("variance", "the uniform's highest bit dropped", lambda: of_words(lambda a: a & 0x7FFFFFFF, same)),
    ("variance", "the uniform's highest bit set", lambda: of_words(lambda a: a | 0x80000000, same)),
    ("skewness", "the angle's highest bit dropped", lambda: of_words(same, lambda b: b & 0x7FFFFFFF)),
    ("kurtosis", "a uniform of eight bits", lambda: of_bits(8)),
    ("kurtosis", "the uniform's upper half dropped", lambda: of_words(lambda a: a & 0xFFFF, same)),
]


@pytest.mark.parametrize(("name", "broken", "make"), BROKEN_MOMENTS, ids=[f"{n}: {b}" for n, b, _ in BROKEN_MOMENTS])
def test_teeth_of_moments(name, broken, make):
    assert moment(make(), name) > LIMIT


TAIL_CALLS = 8  # for 2^25 values: beyond 5 sigma lie 19


def test_tails():
    counts = dict.fromkeys((3, 4, 5), 0)
    for k in range(TAIL_CALLS):
        absolute = stream(SEED_OF + 1000 * k).abs()
        for sigmas in counts:
            counts[sigmas] += int((absolute > sigmas).sum())
    for sigmas, count in counts.items():
        assert tail(count, TAIL_CALLS * SEEDS * STEPS * ELEMENTS, sigmas) < LIMIT


@pytest.mark.parametrize(("sigmas", "bits"), [(3, 5), (4, 10), (5, 17)])
def test_teeth_of_tails(sigmas, bits):
    """A uniform number of so few bits does not reach so far; nor may two and a half times as many values."""
    values = TAIL_CALLS * SEEDS * STEPS * ELEMENTS
    assert of_bits(bits).abs().max() < sigmas
    assert tail(0, values, sigmas) > LIMIT
    assert tail(round(2.5 * values * math.erfc(sigmas / math.sqrt(2))), values, sigmas) > LIMIT


def test_kolmogorov_smirnov(values):
    assert kolmogorov_smirnov(values) < LIMIT


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_bits(3),
        lambda: of_words(same, lambda b: b & 0xFC000000),  # 64 angles
        lambda: of_words(same, same) + 0.01,
    ],
    ids=["a uniform of three bits", "an angle of six bits", "shifted by a hundredth"],
)
def test_teeth_of_kolmogorov_smirnov(make):
    assert kolmogorov_smirnov(make()) > LIMIT


# ---- Independence ----


def correlation(x, y):
    """Of the values and of their squares."""
    n = math.sqrt(x.numel())
    values = (x * y).double().mean() * n
    squares = ((x * x - 1) * (y * y - 1)).double().mean() * n / 2
    return max(abs(values.item()), abs(squares.item()))


def neighbours(values):
    """Elements up to eight apart: of one call, of pairs of it and of the next two."""
    return max(correlation(values[..., :-lag], values[..., lag:]) for lag in range(1, 9))


def between(values, seed_shift, step_shift):
    """One sample and another, at the same element and around it."""
    first = values[: SEEDS - seed_shift, max(-step_shift, 0) : STEPS - max(step_shift, 0)]
    second = values[seed_shift:, max(step_shift, 0) : STEPS + min(step_shift, 0)]
    length = values.shape[-1]
    found = [correlation(first[..., lag:], second[..., : length - lag]) for lag in (0, 1, 4, 8)]
    return max(found + [correlation(first[..., : length - lag], second[..., lag:]) for lag in (1, 4, 8)])


SHIFTS = {"seeds": (1, 0), "steps": (0, 1), "seeds and steps": (1, 1), "seeds against steps": (1, -1)}


def test_neighbouring_elements(values):
    assert neighbours(values) < LIMIT


@pytest.mark.parametrize(
    "make",
    [
        lambda: stream(elements=256).unflatten(-1, (-1, 4)).repeat_interleave(2, -2).flatten(-2),
        lambda: torch.cat([of_words(same, same), of_words(same, lambda b: b.flip(0))], -1).flatten(),
        lambda: torch.cat([of_words(same, same), of_words(lambda a: a.flip(0), same)], -1).flatten(),
        lambda: stream(elements=256) + 0.06 * stream(elements=256).roll(8, -1),
    ],
    ids=["every call twice", "one radius for both pairs", "one angle for both pairs", "a little of the eighth before"],
)
def test_teeth_of_neighbouring_elements(make):
    assert neighbours(make()) > LIMIT


@pytest.mark.parametrize("name", SHIFTS)
def test_consecutive_samples(values, name):
    assert between(values, *SHIFTS[name]) < LIMIT


def added_to_the_block(number):
    long = stream(SEED_OF * 0, STEP_OF * 0, 256 + 4 * SEEDS * STEPS)[0, 0]
    return torch.stack([long[4 * n : 4 * n + 256] for n in number.tolist()]).view(SEEDS, STEPS, 256)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("seeds", lambda: stream(SEED_OF * 0, elements=256)),
        ("seeds", lambda: added_to_the_block(SEED_OF)),
        ("steps", lambda: stream(steps=STEP_OF * 0, elements=256)),
        ("steps", lambda: added_to_the_block(STEP_OF)),
        ("seeds and steps", lambda: stream(SEED_OF - STEP_OF, STEP_OF * 0, 256)),
        ("seeds against steps", lambda: stream(SEED_OF + STEP_OF, STEP_OF * 0, 256)),
    ],
    ids=["seed ignored", "seed into the block", "step ignored", "step into the block", "their difference", "their sum"],
)
def test_teeth_of_consecutive_samples(name, make):
    assert between(make(), *SHIFTS[name]) > LIMIT
