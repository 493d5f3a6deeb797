"""One loop's buffers on its device, and the step between them: model, guidance, solver, and nothing else to launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..solvers.table import ROW_COLUMNS, StepTable
from ..step.backends.registry import StepFunction, backend_for
from ..step.cursor import Cursor
from ..step.memory import DTYPES, empty_like, empty_strided
from ..step.noise import NO_GRID, DeviceGenerator, draw_noise, torch_grid
from . import conditioning as conditioning
from .conditioning import Condition, Signature

_SMALLEST_CAPACITY = 1024  # rows: 70 kB, so that another number of steps is no other loop


class Same:
    """A function to compare: equal to itself, and to what equals it; those that have no hash are told by identity."""

    def __init__(self, function: object) -> None:
        self.function: Any = function
        try:
            hash(function)
        except TypeError:
            self._key: object = id(function)
        else:
            self._key = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.function)


class LoopKind(NamedTuple):
    """All that a step's launches depend on, and that is not in a buffer: another kind is another loop."""

    model: Same
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    model_dtype: torch.dtype
    conditions: Signature
    predictions: int
    classifier: tuple[object, ...] | None
    labels: bool
    scales_per_sample: bool
    skips: bool  # whether steps may leave the unconditional prediction out
    batched: bool
    learned_variance: bool
    noise: str  # one of SOURCES
    known: bool
    originals: bool
    capacity: int  # rows
    positions: str  # "one" for all samples, or "each" its own
    timestep_dtype: torch.dtype
    scalar_timestep: bool
    step: StepFunction
    autocast: torch.dtype | None
    training: bool | None  # of a model that is a module

    def difference(self, other: LoopKind) -> str:
        """Where two kinds differ first, for a message."""
        for name, ours, theirs in zip(self._fields, self, other, strict=True):
            if ours != theirs:
                return f"{name} {ours}, got {theirs}"
        return "the same"


@dataclass(frozen=True)
class LoopOptions:
    """What a sampler's loops have in common; as ``Sampler`` describes them."""

    model: Callable[..., Tensor]
    dtype: torch.dtype | None
    backend: str | None
    batched: bool
    skip_unconditional: bool
    timestep_dtype: torch.dtype
    scalar_timestep: bool

    def kind(
        self,
        x: Tensor,
        conditions: Signature,
        table: StepTable,
        guidance: Guidance,
        *,
        capacity: int,
        labels: bool,
        noise: str,
        known: bool = False,
        originals: bool = False,
        per_sample: bool = False,
        batch: int | None = None,
    ) -> LoopKind:
        """The loop for such inputs; ``batch``: for so many samples, if not for x's."""
        shape = (x.shape[0] if batch is None else batch, *x.shape[1:])
        rounded = _SMALLEST_CAPACITY
        while rounded < capacity:
            rounded *= 2
        classifier = guidance.classifier
        return LoopKind(
            model=Same(self.model),
            shape=shape,
            strides=(math.prod(shape[1:]), *x.stride()[1:]),  # samples one after the other
            dtype=x.dtype,
            device=x.device,
            model_dtype=x.dtype if self.dtype is None else self.dtype,
            conditions=conditions,
            predictions=guidance.num_predictions,
            classifier=None if classifier is None else (guidance.form, *map(Same, classifier.functions)),
            labels=labels,
            scales_per_sample=guidance.batch > 1 or per_sample,
            skips=self.skip_unconditional and guidance.num_predictions > 1,
            batched=self.batched,
            learned_variance=table.learned_variance,
            noise=noise,
            known=known,
            originals=originals,
            capacity=rounded,
            positions="each" if per_sample else "one",
            timestep_dtype=self.timestep_dtype,
            scalar_timestep=self.scalar_timestep,
            step=backend_for(self.backend, x.device.type).step,
            autocast=torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None,
            training=self.model.training if isinstance(self.model, torch.nn.Module) else None,
        )

    def skipped(self, guidance: Guidance, steps: int) -> tuple[bool, ...]:
        """At which steps the unconditional prediction is left out."""
        if not self.skip_unconditional or guidance.num_predictions < 2:
            return (False,) * steps
        flags = guidance.steps_without_unconditional()
        if flags is None:
            raise ValueError("skip_unconditional: expected scales that the host knows, got a tensor on a device")
        return flags * steps if len(flags) == 1 else flags


class Loop:
    """Buffers of one kind. ``step`` is what a graph captures: all that changes from run to run is in the buffers."""

    def __init__(self, kind: LoopKind, classifier: Guidance | None) -> None:
        """``classifier``: a guidance whose classifier is used, if there is one."""
        self.kind = kind
        self._model = kind.model.function
        self._classifier = None if classifier is None else classifier.classifier
        batch, device, count = kind.shape[0], kind.device, kind.predictions
        self.batch = batch
        copies = count if kind.batched else 1
        arithmetic = torch.float64 if kind.dtype == torch.float64 else torch.float32
        with torch.inference_mode(False):  # or the buffers could be written in inference mode only
            like = torch.empty_strided(kind.shape, kind.strides, dtype=kind.dtype, device=device)
            self.sample = empty_like(like).zero_()
            self.staged: Tensor | None = None
            if copies > 1 or kind.model_dtype != kind.dtype:
                strides = (self.sample.numel() // max(batch, 1), *self.sample.stride()[1:])
                whole = (copies * batch, *kind.shape[1:])
                self.staged = empty_strided(whole, strides, kind.model_dtype, device).zero_()
            self.input = self.sample if self.staged is None else self.staged
            self.original = empty_like(self.sample).zero_() if kind.originals else None
            self.noise = empty_like(self.sample).zero_() if kind.noise == "given" else None
            self.seeds = torch.zeros(batch, dtype=torch.int64, device=device) if kind.noise == "portable" else None
            self.labels = torch.zeros(batch, dtype=torch.int64, device=device) if kind.labels else None
            self.known = [empty_like(self.sample).zero_() for _ in range(3)] if kind.known else [None] * 3
            columns = max(count, 1) + 1
            scales = batch if kind.scales_per_sample else 1
            self.rows = torch.zeros(kind.capacity, len(ROW_COLUMNS), dtype=arithmetic, device=device)
            self.weights = torch.zeros(kind.capacity, scales, columns, dtype=arithmetic, device=device)
            self.conditional_weights = self.weights[..., 1:].clone() if kind.skips else None
            self.condition = conditioning.buffers(kind.conditions, count * batch, device)
        self.cursor = Cursor(
            batch if kind.positions == "each" else None,
            timesteps=None if kind.scalar_timestep else copies * batch,
            timestep_dtype=kind.timestep_dtype,
            device=device,
        )
        self.generator = DeviceGenerator(0, device=device) if kind.noise == "torch_stream" else None
        self._grid = torch_grid(device, self.sample.numel()) if self.generator is not None else NO_GRID
        self._own = {tensor.untyped_storage().data_ptr() for tensor in (self.sample, self.input) if tensor.numel()}
        self._written: tuple[StepTable, Guidance] | None = None
        self._checked: set[tuple[object, ...]] = set()

    # ---- Between runs ----

    def write_table(self, table: StepTable, guidance: Guidance) -> None:
        """The rows and weights of a run; what is there already stays."""
        if self._written is None or self._written[0] is not table or self._written[1] is not guidance:
            self._written = None
            self.write_rows(0, table, guidance)
            self.write_weights(0, slice(None), table, guidance)
            self._written = (table, guidance)

    def write_rows(self, begin: int, table: StepTable, guidance: Guidance) -> None:
        """A table's rows, from row ``begin`` on."""
        self.rows[begin : begin + len(table)].copy_(table.device_rows(guidance.form, self.rows.dtype))

    def write_weights(self, begin: int, samples: slice, table: StepTable, guidance: Guidance) -> None:
        """A guidance's weights for those rows, of some samples."""
        weights = guidance.weights(self.kind.device, self.weights.dtype)
        rows = slice(begin, begin + len(table))
        self.weights[rows, samples].copy_(weights.expand(len(table), -1, -1))
        if self.conditional_weights is not None:  # m without p_0, whose weight is zero: anchored at p_1
            self.conditional_weights[rows, samples, :1].copy_(weights[..., :1].expand(len(table), -1, -1))
            self.conditional_weights[rows, samples, 1:].copy_(weights[..., 2:].expand(len(table), -1, -1))

    def write_conditions(self, conditions: list[tuple[str, Condition]], samples: slice | None = None) -> None:
        """The conditions of all samples, or of some, one for each prediction."""
        if self.condition is None:
            return
        samples = slice(0, self.batch) if samples is None else samples
        for k, (_, condition) in enumerate(conditions):
            rows = slice(k * self.batch + samples.start, k * self.batch + samples.stop)
            conditioning.each(_copy, conditioning.rows_of(self.condition, rows), condition)

    def stage(self) -> None:
        """The model's input, of the sample as it is; after that, the step does it."""
        if self.staged is not None and self.batch:
            self.staged.unflatten(0, (-1, self.batch)).copy_(self.sample)

    def draw(self, generators: Sequence[torch.Generator | DeviceGenerator]) -> None:
        """torch's own noise for the next step, where the kernel draws none; of each sample's generator, or of one."""
        assert self.noise is not None
        parts = [slice(None)] if len(generators) == 1 else [slice(b, b + 1) for b in range(self.batch)]
        for part, generator in zip(parts, generators, strict=True):
            assert isinstance(generator, torch.Generator)
            place = self.noise[part]
            drawn = draw_noise(generator, self.sample[part], place)
            if drawn is not place:
                place.copy_(drawn)

    @property
    def increment(self) -> int:
        """By how much a step with noise moves torch's stream on."""
        return self._grid.increment

    # ---- The step ----

    def step(self, conditional: bool = False) -> None:
        """Model, guidance and solver, from where the cursor stands; ``conditional``: without the first prediction."""
        gradient = None
        if self._classifier is not None:
            timestep = self.cursor.timestep[: self.batch] if self.cursor.timestep.dim() else self.cursor.timestep
            timestep = timestep.to(torch.int64).expand(self.batch)
            gradient = self._classifier.gradient(self.sample, timestep, self.labels)
            gradient = _in_layout_of(self.sample, gradient)
        predictions, variance = self._predictions(conditional)
        self.kind.step(
            self.sample,
            self.original,
            self.staged,
            self.sample,
            predictions,
            self.rows,
            self.conditional_weights if conditional else self.weights,
            0,
            None,
            gradient,
            variance,
            self.noise,
            self.seeds,
            None if self.generator is None else self.generator.state,
            self._grid.threads,
            self.cursor.state,
            self.cursor.timestep,
            *self.known,
        )

    def _predictions(self, conditional: bool) -> tuple[list[Tensor], Tensor | None]:
        count, batch = self.kind.predictions, self.batch
        first = 1 if conditional else 0
        if self.kind.batched:
            return self._split(self._call(slice(first * batch, count * batch)), count - first)
        parts = [self._split(self._call(slice(k * batch, (k + 1) * batch)), 1) for k in range(first, count)]
        places = [p.data_ptr() for predictions, _ in parts for p in predictions if p.numel()]
        if len(set(places)) < len(places):
            raise ValueError("model: expected new memory at each call with batched=False, got the same twice")
        return [prediction for predictions, _ in parts for prediction in predictions], parts[-1][1]

    def _call(self, rows: slice) -> Tensor:
        """The model, on some of all predictions' samples."""
        whole = rows.stop - rows.start == self.kind.predictions * self.batch
        x, timestep = self.input, self.cursor.timestep
        if not whole:
            place = rows if self.kind.batched else slice(0, self.batch)  # all predictions have one input
            x = x[place]
            timestep = timestep[place] if timestep.dim() else timestep
        output: Tensor
        if self.condition is None:
            output = self._model(x, timestep)
            return output
        condition = self.condition if whole else conditioning.rows_of(self.condition, rows)
        if isinstance(condition, Mapping):
            output = self._model(x, timestep, **condition)
        else:
            output = self._model(x, timestep, condition)
        return output

    def _split(self, output: Tensor, count: int) -> tuple[list[Tensor], Tensor | None]:
        """The predictions in the sample's layout, and the learned variance: that of the last, conditional one."""
        sample, batch = self.sample, self.batch
        if not isinstance(output, Tensor):
            hint = (
                "; its .sample is one, and fastguide.diffusers.as_model takes it" if hasattr(output, "sample") else ""
            )
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}{hint}")
        kind = (count, output.shape, output.dtype, output.device)
        if kind not in self._checked:
            self._check(output, count)
            self._checked.add(kind)
        if output.untyped_storage().data_ptr() in self._own:  # a view of its input, which the step writes
            output = output.clone()
        if not self.kind.learned_variance:
            if output.stride()[1:] == sample.stride()[1:]:
                return [output], None  # all predictions in one tensor, as they came
            return [_in_layout_of(sample, output[k * batch : (k + 1) * batch]) for k in range(count)], None
        parts = [output[k * batch : (k + 1) * batch] for k in range(count)]
        channels = sample.shape[1]
        predictions = [_in_layout_of(sample, part[:, :channels]) for part in parts]
        return predictions, _in_layout_of(sample, parts[-1][:, channels:])

    def _check(self, output: Tensor, count: int) -> None:
        rest = self.sample.shape[1:]
        if self.kind.learned_variance:
            rest = torch.Size((2 * rest[0], *rest[1:]))
        expected = (count * self.batch, *rest)
        if output.shape != expected:
            raise ValueError(f"model: expected it to return shape {expected}, got {tuple(output.shape)}")
        if output.dtype not in DTYPES:
            raise TypeError(f"model: expected it to return floating-point numbers, got {output.dtype}")
        if output.device != self.kind.device:
            raise ValueError(f"model: expected it to return a tensor on {self.kind.device}, got {output.device}")


def _copy(to: Tensor, values: Tensor) -> None:
    to.copy_(values, non_blocking=True)


def _in_layout_of(sample: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the sample's layout; copied only where a model or classifier returns another."""
    if tensor.stride()[1:] == sample.stride()[1:]:
        return tensor
    return torch.empty_like(sample, dtype=tensor.dtype).copy_(tensor)
