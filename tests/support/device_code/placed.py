"""Steps tensors at chosen places in larger buffers. All values are whole numbers: exact in every dtype."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastguide import ROW_COLUMNS, portable_noise
from fastguide.step.backends import reference
from tests.support.device_code import arguments_of, module

GUARD = 64  # elements of NaN before and behind
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STEPS = 3


def rows() -> Tensor:
    """Make rows whose columns are different whole numbers, some of them different in each row."""
    values = torch.zeros(STEPS, len(ROW_COLUMNS))
    for step in range(STEPS):
        columns = {"x0_scale": 1, "x0_sample": 1, "x0_pred": 2, "x0_grad": 1, "clip": 20 + step, "out_x0": 1 + step}
        columns |= {"out_sample": 2, "out_pred": 1, "out_grad": 1, "out_var_grad": 1, "out_noise": 1}
        columns |= {"logvar_base": 0, "logvar_span": 1, "in_scale": 2, "in_timestep": 0}
        columns |= {"known_sample": 1 + step, "known_noise": 2}
        columns |= {"hist_slot": -1}
        values[step] = torch.tensor([columns.get(name, 0) for name in ROW_COLUMNS])
    return values


class Placed:
    """A tensor of shape (batch, size) in a buffer of NaN, ``offset`` elements behind a multiple of 16 bytes."""

    def __init__(self, values: Tensor, dtype: torch.dtype, stride: int, offset: int) -> None:
        batch, size = values.shape
        self.place = (batch, size), (stride, 1), GUARD + offset
        self.buffer = torch.full((2 * GUARD + offset + (batch - 1) * stride + size,), torch.nan, dtype=dtype)
        assert self.buffer.data_ptr() % 16 == 0
        self.view = self.buffer.as_strided(*self.place)
        self.view.copy_(values)

    def nothing_beside_it(self) -> bool:
        """Check that all of the buffer that is not the tensor is still NaN."""
        rest = self.buffer.clone()
        rest.as_strided(*self.place).fill_(torch.nan)
        return bool(rest.isnan().all())


@dataclass
class Case:
    """A step's options and its tensors' layouts; ``None`` for offset, stride or dtype draws one for each tensor."""

    batch: int
    size: int
    noise: str = "given"  # none, given, portable, torch
    count: int = 1
    gradient: bool = False
    variance: bool = False
    masked: bool = False
    original: bool = False
    copies: int = 0
    in_place: bool = True
    offset: int | None = 0
    stride: int | None = None
    dtype: torch.dtype | None = torch.float32
    indices: str = "int"  # int, one, per sample
    scales: str = "one"  # one, per sample, per step, both
    threads: int = 256
    few_tiles: int = 1024  # launches of more have two vectors a thread
    seed: int = 0
    layouts: dict[str, tuple] = field(default_factory=dict)  # name: offset, stride and dtype of its own
    bad_indices: dict[int, int] = field(default_factory=dict)  # sample: an index that is in no table
    tensors: dict[str, Placed] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def whole_numbers(self, *shape: int, low: int = -2, high: int = 3) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).float()

    def put(self, name: str, values: Tensor) -> Tensor:
        offset = self.random.randrange(8) if self.offset is None else self.offset
        stride = self.size + self.random.randrange(9) if self.stride is None else self.stride
        dtype = self.random.choice(DTYPES) if self.dtype is None else self.dtype
        self.tensors[name] = Placed(values, *reversed(self.layouts.get(name, (offset, stride, dtype))))
        return self.tensors[name].view

    def run(self, order: int = 1) -> int:
        """Step, check results and all other memory, and return the number of 16-byte accesses."""
        b, n = self.batch, self.size
        sample = self.put("sample", self.whole_numbers(b, n))
        predictions = [self.put(f"prediction {k}", self.whole_numbers(b, n)) for k in range(self.count)]
        gradient = self.put("gradient", self.whole_numbers(b, n)) if self.gradient else None
        variance = self.put("variance", -400 * self.whole_numbers(b, n, low=0, high=2)) if self.variance else None
        if self.variance_is_unused:
            variance.fill_(torch.nan)
        noise = self.put("noise", self.whole_numbers(b, n)) if self.noise == "given" else None
        known = [None, None, None]  # mask, image, noise
        if self.masked:
            known = [self.put(f"known {k}", self.whole_numbers(b, n, low=0, high=2)) for k in range(3)]
        seeds = torch.arange(7, 7 + b) if self.noise == "portable" else None
        philox = torch.tensor([5, 16]) if self.noise == "torch" else None
        index = self.random.randrange(STEPS)
        indices = {"int": None, "one": torch.tensor(index), "per sample": torch.arange(b) % STEPS}[self.indices]
        steps = STEPS if self.scales in ("per step", "both") else 1
        samples = b if self.scales in ("per sample", "both") else 1
        weights = self.whole_numbers(steps, samples, max(self.count, 1) + 1, low=0, high=2)
        inputs = [rows(), weights, index, indices, gradient, variance, noise]

        expected = torch.empty(b, n), torch.empty(b, n), torch.empty(max(self.copies, 1) * b, n)
        z = self.values(sample.dtype, indices, index)
        exact = [t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in (*inputs[:-1], z)]
        floats = [t.float() if t is not None else None for t in known]
        predicted = [p.float() for p in predictions]
        reference.guided_step(*expected, sample.float(), predicted, *exact, None, None, 0, None, None, *floats)
        for bad, value in self.bad_indices.items():
            indices[bad] = value
            for want in expected:
                want[bad::b] = torch.nan
        before = {name: placed.buffer.clone() for name, placed in self.tensors.items()}
        out = sample if self.in_place else self.put("out", torch.full((b, n), torch.nan))
        original = self.put("original", torch.full((b, n), torch.nan)) if self.original else None
        staged = self.put("staged", torch.full((self.copies * b, n), torch.nan)) if self.copies else None
        plain = arguments_of(
            out, original, staged, sample, predictions, *inputs, seeds, philox, self.threads, None, None, *known
        )
        accesses = module().launch({**plain, "few_tiles": self.few_tiles}, order, None)

        for got, want in zip((out, original, staged), expected, strict=True):
            if got is not None:
                torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0, equal_nan=True)
        for name, placed in self.tensors.items():
            assert placed.nothing_beside_it(), name
            if name in before and placed.view is not out:
                assert torch.equal(placed.buffer.nan_to_num(99), before[name].nan_to_num(99)), name
        return accesses

    def values(self, dtype: torch.dtype, indices: Tensor | None, index: int) -> Tensor | None:
        """Return the values of the noise; other tests check that torch's are right."""
        b, n = self.batch, self.size
        if self.noise == "portable":
            return portable_noise(range(7, 7 + b), (b, n), step=index if indices is None else indices)
        if self.noise == "torch":
            z = module().torch_normal(5, 16, torch.arange(b * n).numpy().astype("uint64"), self.threads)
            return torch.from_numpy(z).to(dtype).float().view(b, n)
        return self.tensors["noise"].view if self.noise == "given" else None

    @property
    def variance_is_unused(self) -> bool:
        """Whether the step ignores the variance, which then may be anything."""
        return self.variance and self.noise == "none" and not self.gradient

    @property
    def has_torch_vectors(self) -> bool:
        """Whether there is a kernel with torch's noise in vectors: ``torch_vectors_compiled`` in parameters.h."""
        return self.count in (1, 2) or not (self.gradient or self.variance or self.masked)

    def accesses_due(self) -> int:
        """Count the accesses of 16 bytes that a step should make, by trying where vectors may begin."""
        own = {name: placed.view for name, placed in self.tensors.items()}
        own["out"] = own.get("out", own["sample"])
        if self.variance_is_unused:
            del own["variance"]
        each = sum((2 if t.itemsize == 4 else 1) * t.shape[0] // self.batch for t in own.values())

        def all_aligned(sample: int, element: int) -> bool:
            views = [t[s, :1] for t in own.values() for s in range(sample, t.shape[0], self.batch)]
            return all((t.data_ptr() + element * t.element_size()) % 16 == 0 for t in views)

        if self.noise == "torch":
            whole = self.size % 8 == 0 and self.batch * self.size > self.threads and self.has_torch_vectors
            aligned = all(all_aligned(sample, 0) for sample in range(self.batch))
            return self.batch * self.size // 8 * each if whole and aligned else 0
        vectors = 0
        for sample in range(self.batch):
            heads = [h for h in range(0, 8, 4 if self.noise == "portable" else 1) if all_aligned(sample, h)]
            vectors += max(self.size - heads[0], 0) // 8 if heads else 0
        return vectors * each
