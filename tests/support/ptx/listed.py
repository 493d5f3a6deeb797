"""The cases: a few for CI, which run every kernel, and all."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from tests.support.ptx.cases import DTYPES, NOISES, Case

HALF = torch.float16
SIZES = (1, 2, 7, 8, 9, 15, 127, 128, 1021, 1023, 1024, 1025, 3000)  # around a vector and a tile
BOOLEANS = (False, True)


def few() -> list[Case]:
    """Return the cases of CI: two of each kernel, and some layouts of each kind."""
    return [*each_kernel(2, seed=0), *chosen_layouts()]


def everything(count: int, each: int, seed: int) -> list[Case]:
    """Return all listed cases, ``count`` drawn ones, and ``each`` for each kernel."""
    listed = [*chosen_layouts(), *_variants(), *_extras_and_dtypes(), *_alignments(), *_positions(), *_cursors()]
    listed += [*_many_samples(), *_streams(), *_values()]
    return [*listed, *_drawn(count, seed), *each_kernel(each, seed)]


def chosen_layouts() -> Iterator[Case]:
    """Yield a case of each kind that the other lists have many of."""
    yield Case(2, 45, "given", 2, original=True, copies=3, offset=None, stride=57, dtype=None)
    yield Case(3, 45, "portable", 1, offset=3, stride=56, dtype=torch.bfloat16)
    yield Case(2, 1029, "none", 1, offset=5, stride=1032, dtype=HALF, in_place=False)
    yield Case(2, 1024, "given", 5, together=True, model=torch.bfloat16)
    yield Case(2, 1024, "portable", 2, gradient=True, masked=True, dtype=torch.bfloat16)
    yield Case(4, 515, "given", 2, gradient=True, indices="one", scales="per step", stride=515, values="whole")
    yield Case(6, 1029, "given", 2, True, True, True, False, True, 2, indices="per sample", bad=True, stride=1029)
    yield Case(6, 1032, "torch", 2, indices="per sample", bad=True, stride=1032, copies=1)
    yield Case(2, 771, "given", 2, masked=True, original=True, copies=1, values="special", in_place=False)
    yield Case(2, 1024, "none", 3, gradient=True, original=True, values="special", dtype=None, in_place=False)
    yield Case(3, 1029, "portable", 1, values="pure", stride=1029, indices="per sample")
    yield Case(3, 4096, "torch", 1, values="pure", stride=4096, threads=512)
    yield Case(2, 900, "portable", 1, channels=3, copies=1)
    yield Case(2, 1200, "torch", 1, channels=4, dtype=torch.bfloat16)
    more = {"launches": 3, "copies": 1, "original": True}
    yield Case(3, 1029, "portable", 2, cursor="one", timestep="int64", waves="mixed", stride=1029, seed=1, **more)
    yield Case(3, 520, "given", 1, cursor="per sample", timestep="float32", waves="one by one", seed=2, **more)
    yield Case(3, 1024, "torch", 1, cursor="one", timestep="int64", state=True, stride=1024, seed=3, **more)
    yield Case(3, 261, "torch", 1, cursor="one", state=True, waves="mixed", stride=261, seed=4, **more)
    yield Case(5, 264, "portable", 1, cursor="per sample", timestep="int64", ended=True, waves="mixed", seed=5)
    yield Case(5, 264, "torch", 2, cursor="one", ended=True, state=True, stride=264, seed=6)
    yield Case(40, 24, "portable", 1, cursor="per sample", timestep="int64", waves="mixed", stride=24, seed=7)


def each_kernel(many: int, seed: int) -> Iterator[Case]:
    """Draw so many cases for each kernel, with another dtype for each tensor: a kernel has code for all of them."""
    draw = random.Random(f"each kernel {seed}")
    noises = (*NOISES, "torch one by one")
    kinds = itertools.product(noises, BOOLEANS, BOOLEANS, (1, 2, 0), BOOLEANS, BOOLEANS)
    for noise, extras, history, count, original, staged in kinds:
        for _ in range(many):
            own = {"count": count or draw.choice([0, 3, 5]), "original": original}
            if history:
                own |= {"slots": draw.choice([0, 1, 2, 3, 3]), "anchored": draw.random() < 0.5}
                own["anchored"] |= own["slots"] == 0
            yield replace(_case_of_kernel(draw, noise, extras, staged), **own)


def _case_of_kernel(draw: random.Random, noise: str, extras: bool, staged: bool) -> Case:
    aligned = noise == "torch" or (noise != "torch one by one" and draw.random() < 0.5)
    noise = noise.partition(" ")[0]
    cursor = draw.choice(["", "", "one", "one" if noise == "torch" else "per sample"])
    gradient, variance, masked = (
        draw.choice([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1)]) if extras else (0, 0, 0)
    )
    size = draw.choice([264, 520, 2056]) if aligned else draw.choice([37, 261, 2053])
    stride = size if aligned or draw.random() < 0.7 else None
    launches = draw.choice([1, 1, 3]) if cursor else 1
    channels = 3 if noise == "portable" and draw.random() < 0.2 else 1
    if channels > 1:
        size, stride = 3 * draw.choice([88, 89]), None
    values = draw.choice(["normal", "normal", "whole", "normal" if variance or noise == "torch" else "special"])
    return Case(
        batch=draw.choice([1, 2, 3]),
        size=size,
        noise=noise,
        gradient=bool(gradient),
        variance=bool(variance),
        masked=bool(masked),
        copies=draw.choice([1, 2]) if staged else 0,
        in_place=bool(cursor) or draw.random() < 0.5,
        offset=0 if aligned else draw.choice([0, 4, None]),
        stride=stride,
        dtype=None,
        indices="int" if cursor else draw.choice(["int", "one", "per sample"]),
        scales=draw.choice(["one", "per sample", "per step", "both"]),
        cursor=cursor,
        ended=bool(cursor) and launches == 1 and draw.random() < 0.5,
        timestep=draw.choice(["", "int64", "float32"]) if cursor else "",
        state=draw.random() < 0.5,
        channels=channels,
        values=values,
        one_seed=draw.random() < 0.2,
        launches=launches,
        few_tiles=draw.choice([0, 0, 1024]),
        waves=draw.choice(["together", "mixed", "one by one"]),
        seed=draw.randrange(2**31),
    )


def _variants() -> Iterator[Case]:
    options = itertools.product(NOISES, BOOLEANS, (0, 1, 2, 3), BOOLEANS, (0, 2))
    for noise, extras, count, original, copies in options:
        variant = (noise, count, False, extras, extras, extras, original, copies)
        for size in (1029, 1032):
            yield Case(2, size, *variant, stride=size, dtype=torch.bfloat16)
        yield Case(2, 520, *variant, stride=520, values="whole", in_place=False)


def _extras_and_dtypes() -> Iterator[Case]:
    for noise, extras, dtype in itertools.product(NOISES, itertools.product(BOOLEANS, repeat=3), (torch.float32, HALF)):
        yield Case(3, 1037, noise, 2, False, *extras, True, 1, dtype=dtype, model=torch.bfloat16, stride=1040)
    for dtype, model, noise in itertools.product(DTYPES, DTYPES, NOISES[1:]):
        for size, stride, count in ((2053, 2056, 2), (2048, 2048, 1)):
            yield Case(2, size, noise, count, dtype=dtype, model=model, copies=count, original=True, stride=stride)


def _alignments() -> Iterator[Case]:
    for offset, noise, dtype in itertools.product(range(8), NOISES[1:], (*DTYPES, None)):
        stride = 56 + offset % 2
        yield Case(3, 45, noise, 2, original=True, copies=3, offset=offset, stride=stride, dtype=dtype)
    for size, noise in itertools.product(SIZES, NOISES):
        yield Case(2, size, noise, offset=None if size % 2 else 0, stride=size + size % 3, dtype=torch.bfloat16)
        yield Case(3, size, noise, 2, offset=4, stride=(size + 15) // 8 * 8, values="whole")
    for count, size in itertools.product((2, 3, 5, 16), (1024, 1029)):
        yield Case(2, size, "given", count, together=True, model=torch.bfloat16)
        yield Case(2, size, "torch", count, together=True, threads=512)


def _positions() -> Iterator[Case]:
    for indices, scales, noise, size in itertools.product(
        ("int", "one", "per sample"), ("one", "per sample", "per step", "both"), NOISES[1:], (515, 1024)
    ):
        yield Case(4, size, noise, 2, gradient=True, stride=size, indices=indices, scales=scales, values="whole")
    for noise, size in itertools.product(NOISES, (1024, 1029)):
        yield Case(6, size, noise, 2, True, True, True, False, True, 2, indices="per sample", bad=True, stride=size)


def _cursors() -> Iterator[Case]:
    kinds = itertools.product(
        NOISES, ("one", "per sample"), ("", "int64", "float32"), BOOLEANS, ("together", "one by one", "mixed")
    )
    for seed, (noise, cursor, timestep, ended, waves) in enumerate(kinds):
        if noise == "torch" and cursor == "per sample":
            continue
        own = {"cursor": cursor, "timestep": timestep, "ended": ended, "waves": waves, "seed": seed}
        own |= {"launches": 1 if ended else 3, "copies": 1, "original": True}
        yield Case(5, 1029, noise, 2, stride=1029, **own)
        if noise == "torch" or waves != "mixed":
            yield Case(5, 2048, noise, 2, stride=2048, state=True, **own)


def _many_samples() -> Iterator[Case]:
    """More samples than a warp has lanes."""
    for batch, waves in itertools.product((1, 40, 70), ("together", "mixed")):
        own = {"waves": waves, "stride": 24, "seed": batch}
        yield Case(batch, 24, "portable", cursor="per sample", timestep="int64", ended=True, **own)
        yield Case(batch, 24, "portable", cursor="one", timestep="float32", launches=3, **own)
        yield Case(batch, 24, "torch", cursor="one", timestep="int64", launches=3, state=True, **own)
        yield Case(batch, 24, "torch", launches=3, state=True, **own)


def _streams() -> Iterator[Case]:
    for threads, size, batch, state, dtype in itertools.product(
        (256, 512, 1024), (256, 1000, 4096), (1, 3), BOOLEANS, DTYPES
    ):
        own = {"threads": threads, "state": state, "dtype": dtype, "waves": "mixed", "indices": "per sample"}
        yield Case(batch, size, "torch", 2, stride=size, **own)
    for noise, dtype, channels in itertools.product(("portable", "torch"), DTYPES, (3, 4)):
        yield Case(2, 300 * channels, noise, dtype=dtype, channels=channels, copies=1)


def _values() -> Iterator[Case]:
    for dtype, noise, extras, size in itertools.product((*DTYPES, None), NOISES[:3], BOOLEANS, (771, 1024)):
        own = {"dtype": dtype, "values": "special", "in_place": False}
        yield Case(2, size, noise, 2, False, extras, False, extras, True, 1, **own)
        yield Case(2, size, noise, 3, False, extras, extras, extras, True, 1, **own)
    for noise, dtype, size, cursor in itertools.product(
        NOISES[2:], DTYPES, (1029, 4096, 4100), ("", "one", "per sample")
    ):
        if noise == "portable" or cursor != "per sample":
            own = {"dtype": dtype, "stride": size + size % 8, "values": "pure", "cursor": cursor, "threads": 512}
            yield Case(3, size, noise, indices="int" if cursor else "per sample", seed=size, **own)


def _drawn(count: int, seed: int) -> Iterator[Case]:
    """Draw any options, mostly with alignments that agree."""
    draw = random.Random(f"any {seed}")
    for _ in range(count):
        noise, agree = draw.choice(NOISES), draw.random() < 0.7
        size = draw.choice([1, 7, 8, 9, 127, 255, 1021, 1023, 1024, 1025, 2053, 3072])
        cursor = draw.choice(["", "", "", "one", "one" if noise == "torch" else "per sample"])
        yield Case(
            batch=draw.choice([1, 2, 3, 5]),
            size=size,
            noise=noise,
            count=draw.choice([0, 1, 2, 3, 5]),
            together=draw.random() < 0.2,
            gradient=draw.random() < 0.3,
            variance=draw.random() < 0.3,
            masked=draw.random() < 0.3,
            original=draw.random() < 0.5,
            copies=draw.choice([0, 0, 1, 2]),
            in_place=bool(cursor) or draw.random() < 0.5,
            offset=draw.choice([0, 0, *range(8)]) if agree else None,
            stride=draw.choice([size, size + 1, size + 4, (size + 7) // 8 * 8]) if agree else None,
            dtype=draw.choice([*DTYPES, None]),
            model=draw.choice([*DTYPES, None]),
            indices="int" if cursor else draw.choice(["int", "one", "per sample"]),
            scales=draw.choice(["one", "per sample", "per step", "both"]),
            cursor=cursor,
            ended=bool(cursor) and draw.random() < 0.5,
            timestep=draw.choice(["", "int64", "float32"]) if cursor else "",
            state=draw.random() < 0.5,
            threads=draw.choice([256, 512, 1024]),
            values=draw.choice(["whole", "normal", "normal"]),
            one_seed=draw.random() < 0.2,
            few_tiles=draw.choice([0, 1024]),
            waves=draw.choice(["together", "mixed", "one by one"]),
            seed=draw.randrange(2**31),
        )
