"""The device buffers of one kind of run, and its step: model, guidance, solver, and nothing else to launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.groups import number_of_groups
from ..guidance.low_passes import LowPasses
from ..guidance.moment_weights import MomentWeights
from ..guidance.momentum import AddedUp
from ..solvers.table import ROW_COLUMNS, StepTable
from ..step.backends.registry import StepFunction
from ..step.cursor import CURSOR_COLUMNS, Cursor
from ..step.cursor_step import CursorStep
from ..step.memory import empty_like, empty_strided, in_layout_of
from ..step.momentum import updates_key
from ..step.operator import StepArguments
from ..step.thresholds import makes_weights_in_step, thresholds_for
from ..step.weigh import needs_scratch, weighed
from . import conditioning as conditioning
from .conditioning import NamedConditions, Signature
from .distributed.dimension import Dimension
from .distributed.gathered_call import GatheredModelCall
from .model_call import ModelCall, ModelOptions
from .momentum import MomentumBuffers
from .noise import NoiseBuffers
from .request import SampleRequest

_SMALLEST_CAPACITY = 1024  # rows: 70 kB, so that tables of other lengths share a state
_INDEX = CURSOR_COLUMNS.index("index")


class ByIdentity:
    """A function as a key: functions are compared with ``==``, or by identity if they have no hash."""

    def __init__(self, function: object) -> None:
        self.function: Any = function
        try:
            hash(function)
        except TypeError:
            self._key: object = id(function)
        else:
            self._key = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return repr(self.function)


class StateKey(NamedTuple):
    """All that a step's launches depend on and that is not in a buffer: runs of one key share a state."""

    model: ByIdentity
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    model_dtype: torch.dtype
    conditions: Signature
    predictions: int  # of the model
    own_predictions: range  # those that this process calls the model for
    guidance_ranks: Dimension | None  # those that share all of them
    derived: LowPasses | AddedUp | None  # what makes further tensors of them
    weights_from: _Formula | ByIdentity | None
    makes_weights: bool  # whether the step itself makes them, by a program
    needs_scratch: bool  # whether it needs memory for that
    classifier: tuple[object, ...] | None
    labels: bool
    scales_per_sample: bool
    skips_uncond: bool  # whether a step may leave the unconditional prediction out
    batched: bool
    learned_variance: bool
    staged: bool  # whether the model's input is another tensor than the sample
    noise: str  # one of fastguide.step.noise.SOURCES
    inpainting: bool
    history_slots: int  # of what calls leave for later ones
    thresholds: bool  # whether x_0 is divided by one
    originals: bool
    capacity: int  # rows
    calls_per_sample: bool  # whether each sample is at a model call of its own
    timestep_dtype: torch.dtype
    scalar_timestep: bool
    step: StepFunction
    autocast: torch.dtype | None
    training: bool | None  # of a model that is a module

    @classmethod
    def of(
        cls,
        options: ModelOptions,
        request: SampleRequest,
        *,
        originals: bool = False,
        slots: tuple[int, int] | None = None,
    ) -> StateKey:
        """Return the key of a request.

        Args:
            options: the model, and how it is called.
            request: what is sampled.
            originals: whether the steps write their predicted x_0.
            slots: the batch and the capacity of ``Slots``, of which the request is one sample.
        """
        x, table, guidance = request.x_T, request.table, request.guidance
        shape, capacity = (tuple(x.shape), len(table)) if slots is None else ((slots[0], *x.shape[1:]), slots[1])
        model_dtype = x.dtype if options.dtype is None else options.dtype
        own = options.own_predictions(guidance.num_conditions)
        copies = len(own) if options.batched else 1
        classifier, model, device = guidance.classifier, options.model, x.device.type
        return cls(
            model=ByIdentity(model),
            shape=shape,
            strides=(math.prod(shape[1:]), *x.stride()[1:]),  # samples one after the other
            dtype=x.dtype,
            device=x.device,
            model_dtype=model_dtype,
            conditions=request.conditions_signature,
            predictions=guidance.num_conditions,
            own_predictions=own,
            guidance_ranks=options.guidance_ranks,
            derived=None if guidance.derived is None else guidance.derived.kind,
            weights_from=_what_makes_weights(guidance),
            makes_weights=isinstance(guidance.weights_from, MomentWeights)
            and makes_weights_in_step(request.backend, guidance.weights_from, x, table.thresholds),
            needs_scratch=isinstance(guidance.weights_from, MomentWeights)
            and needs_scratch(request.backend, guidance.weights_from, x),
            classifier=None if classifier is None else (guidance.form, *map(ByIdentity, classifier.functions)),
            labels=request.labels is not None,
            scales_per_sample=guidance.batch > 1 or slots is not None,
            skips_uncond=options.skip_unconditional and guidance.num_predictions > 1,
            batched=options.batched,
            learned_variance=table.learned_variance,
            staged=copies > 1 or model_dtype != x.dtype or table.scales_inputs,
            noise=request.noise.source if slots is None else "portable",
            inpainting=request.inpainting is not None,
            history_slots=table.history_slots,
            thresholds=table.thresholds,
            originals=originals,
            capacity=max(_SMALLEST_CAPACITY, 2 ** (capacity - 1).bit_length()),
            calls_per_sample=slots is not None,
            timestep_dtype=options.told_in(table),
            scalar_timestep=options.scalar_timestep,
            step=request.backend.step,
            autocast=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            training=model.training if isinstance(model, torch.nn.Module) else None,
        )

    def difference(self, other: StateKey) -> str:
        """Return the first difference of two keys, for a message."""
        for name, ours, theirs in zip(self._fields, self, other, strict=True):
            if ours != theirs:
                return f"{name} {ours}, got {theirs}"
        return "the same"


def rows_key(guidance: Guidance) -> Hashable:
    """Return what the rows in a state's buffers depend on beside the table."""
    return guidance.form, updates_key(guidance)


class _Formula:
    """What makes weights of moments, as a key, and its name for messages; its parameters are in a buffer."""

    def __init__(self, guidance: Guidance, made_by: MomentWeights) -> None:
        self._guidance, self._key = guidance, (made_by.program, made_by.dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Formula) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"{self._guidance!r} of {len(self._key[0].instructions)} operations"


def _what_makes_weights(guidance: Guidance) -> _Formula | ByIdentity | None:
    made_by = guidance.weights_from
    if isinstance(made_by, MomentWeights):
        return _Formula(guidance, made_by)
    return None if made_by is None else ByIdentity(made_by)


class SamplerState:
    """The buffers that runs with one ``StateKey`` share. A graph captures ``step``; what changes is in the buffers."""

    def __init__(self, key: StateKey, guidance: Guidance) -> None:
        """Make the buffers. ``guidance``: one of this key, for its functions; its scales come with a request."""
        self.key = key
        self.batch = key.shape[0]
        self._guidance = guidance
        with torch.inference_mode(False):  # or the buffers could be written in inference mode only
            self._make_sample_buffers()
            self._make_table_buffers()
            self.condition = conditioning.buffers(key.conditions, len(key.own_predictions) * self.batch, key.device)
            self.labels = torch.zeros(self.batch, dtype=torch.int64, device=key.device) if key.labels else None
            self.noise = NoiseBuffers(key.noise, self.sample)
            copies = len(key.own_predictions) if key.batched else 1
            self.cursor = Cursor(
                self.batch if key.calls_per_sample else None,
                timesteps=None if key.scalar_timestep else copies * self.batch,
                timestep_dtype=key.timestep_dtype,
                device=key.device,
            )
            model_call = (
                ModelCall if key.guidance_ranks is None else functools.partial(GatheredModelCall, key.guidance_ranks)
            )
            self.momentum: MomentumBuffers | None = None
            if isinstance(key.derived, AddedUp):
                self.momentum = MomentumBuffers(key.derived, key.step, self.sample, self.cursor, key.capacity)
            self.model_call = model_call(
                key.model.function,
                self.sample,
                self.sample if self.staged is None else self.staged,
                self.cursor.timestep,
                self.condition,
                num_predictions=key.predictions,
                batched=key.batched,
                learned_variance=key.learned_variance,
            )
        arguments = self._step_arguments()
        self._step = CursorStep(key.step, arguments, self.cursor)
        self._step_without_uncond = self._step
        if arguments.program is not None:
            without_program = arguments._replace(program=None, parameters=None, made=None, scratch=None)
            self._step_without_uncond = CursorStep(key.step, without_program, self.cursor)
        self._loaded: tuple[StepTable, Guidance] | None = None

    def _make_sample_buffers(self) -> None:
        key = self.key
        like = torch.empty_strided(key.shape, key.strides, dtype=key.dtype, device=key.device)
        self.sample = empty_like(like).zero_()
        self.original = empty_like(like).zero_() if key.originals else None
        self.inpainting = [empty_like(like).zero_() for _ in range(3)] if key.inpainting else None
        self.history = self._many(key.history_slots, self.rows_dtype) if key.history_slots else None
        self.staged: Tensor | None = None
        if key.staged:
            self.staged = self._many(len(key.own_predictions) if key.batched else 1, key.model_dtype)

    def _many(self, copies: int, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the batch several times, in the sample's layout."""
        strides = (self.sample.numel() // max(self.batch, 1), *self.sample.stride()[1:])
        shape = (copies * self.batch, *self.key.shape[1:])
        return empty_strided(shape, strides, dtype, self.key.device).zero_()

    @property
    def rows_dtype(self) -> torch.dtype:
        """The precision of the arithmetic."""
        return torch.float64 if self.key.dtype == torch.float64 else torch.float32

    def _make_table_buffers(self) -> None:
        key = self.key
        arithmetic = self.rows_dtype
        scales = self.batch if key.scales_per_sample else 1
        shape = (key.capacity, scales, self._guidance.num_predictions + 1)
        self.rows = torch.zeros(key.capacity, len(ROW_COLUMNS), dtype=arithmetic, device=key.device)
        self.weights = torch.zeros(shape, dtype=arithmetic, device=key.device)
        self.weights_without_uncond = self.weights[..., : key.predictions].clone() if key.skips_uncond else None
        self.program = self.parameters = self.made = self.scratch = None
        made_by = self._guidance.weights_from
        if isinstance(made_by, MomentWeights):
            program, parameters = made_by.on(key.device)
            self.parameters = parameters.new_zeros(key.capacity, scales, parameters.shape[-1])
            if key.makes_weights:
                columns, groups = len(made_by.program.weights) + 1, number_of_groups(made_by.dims, self.sample)
                self.program, self.scratch = program, made_by.scratch_for(self.sample) if key.needs_scratch else None
                self.made = torch.zeros(self.batch * groups, columns, dtype=arithmetic, device=key.device)
        self._no_gradient_scale = torch.zeros(1, 1, 1, dtype=arithmetic, device=key.device)
        self._samples = torch.arange(scales, device=key.device)

    def _step_arguments(self) -> StepArguments:
        """Return the operator's arguments, in its order, with what is the same at every step."""
        generator, inpainting = self.noise.generator, self.inpainting or (None, None, None)
        return StepArguments(
            out=self.sample,
            original=self.original,
            staged=self.staged,
            sample=self.sample,
            predictions=[],
            rows=self.rows,
            weights=self.weights,
            index=0,
            indices=None,
            gradient=None,
            variance=None,
            noise=self.noise.values,
            seeds=self.noise.seeds,
            philox=None if generator is None else generator.state,
            philox_threads=self.noise.grid.threads,
            cursor=self.cursor.state,
            timestep=self.cursor.timestep,
            mask=inpainting[0],
            known=inpainting[1],
            known_noise=inpainting[2],
            history=self.history,
            program=self.program,
            parameters=self.parameters if self.key.makes_weights else None,
            made=self.made,
            scratch=self.scratch,
            inverse_thresholds=thresholds_for(self.sample, self.rows_dtype) if self.key.thresholds else None,
        )

    # ---- Between steps ----

    def load(self, request: SampleRequest) -> None:
        """Fill the buffers for a run; rows and weights that are in them already are not written again."""
        table, guidance = request.table, request.guidance
        if self._loaded is None or self._loaded[0] is not table or self._loaded[1] is not guidance:
            self._loaded = None
            self.write_rows(0, table, guidance)
            self._write_weights(0, slice(None), table, guidance)
            self._loaded = (table, guidance)
        self._load_samples(request, slice(0, self.batch))
        self.cursor.start(table, request.begin)

    def load_slot(self, request: SampleRequest, slot: int, row: int) -> None:
        """Fill one sample's buffers for a run over rows that ``write_rows`` has written from ``row`` on."""
        table, samples = request.table, slice(slot, slot + 1)
        self._write_weights(row, samples, table, request.guidance)
        self._load_samples(request, samples)
        self.cursor.place(slot, row, row + len(table), table.host_timesteps[0])

    def write_rows(self, begin: int, table: StepTable, guidance: Guidance) -> None:
        """Write a table's rows, from row ``begin`` on; they depend on ``rows_key`` of the guidance."""
        self.rows[begin : begin + len(table)].copy_(table.device_rows(guidance.form, self.rows.dtype))
        if self.momentum is not None:
            self.momentum.write_rows(begin, table, guidance)

    def stage(self, in_scale: float, samples: slice | None = None) -> None:
        """Write the model's input, made of the sample; a step does it for the call after it."""
        if self.staged is None or not self.batch:
            return
        samples = slice(0, self.batch) if samples is None else samples
        sample = self.sample[samples]
        if in_scale != 1:
            sample = sample.to(self.rows.dtype) * in_scale
        self.staged.unflatten(0, (-1, self.batch))[:, samples].copy_(sample)

    def _load_samples(self, request: SampleRequest, samples: slice) -> None:
        made_by = request.guidance.weights_from
        if isinstance(made_by, MomentWeights):
            made_by.last_weights = None if self.made is None else made_by.as_last_weights(self.made, self.sample)
        self.sample[samples].copy_(request.first)
        self._write_conditions(request.conditions, samples)
        if self.labels is not None and request.labels is not None:
            self.labels[samples].copy_(request.labels)
        if self.inpainting is not None and request.inpainting is not None:
            for buffer, values in zip(self.inpainting, request.inpainting, strict=True):
                buffer[samples].copy_(values)
        request.noise.load(self.noise, samples)
        if self.momentum is not None:
            self.momentum.restart(samples)
        self.stage(request.table.in_scales[request.begin], samples)

    def _write_weights(self, begin: int, samples: slice, table: StepTable, guidance: Guidance) -> None:
        """Write a guidance's weights for the table's rows, of some samples."""
        weights = guidance.weights(self.key.device, self.weights.dtype).expand(len(table), -1, -1)
        rows = slice(begin, begin + len(table))
        self.weights[rows, samples].copy_(weights)
        if isinstance(guidance.weights_from, MomentWeights):
            assert self.parameters is not None
            _, parameters = guidance.weights_from.on(self.key.device)
            self.parameters[rows, samples].copy_(parameters.expand(len(table), -1, -1))
        if self.weights_without_uncond is not None:  # m without p_0, whose weight is zero: anchored at p_1
            self.weights_without_uncond[rows, samples, :1].copy_(weights[..., :1])
            self.weights_without_uncond[rows, samples, 1:-1].copy_(weights[..., 2 : self.key.predictions])
            self.weights_without_uncond[rows, samples, -1:].copy_(weights[..., -1:])

    def _write_conditions(self, conditions: NamedConditions, samples: slice) -> None:
        if self.condition is None:
            return
        own = self.key.own_predictions
        for k, (_, condition) in enumerate(conditions[own.start : own.stop]):
            first = k * self.batch
            conditioning.write(self.condition, slice(first + samples.start, first + samples.stop), condition)

    # ---- The step ----

    def step(self, skip_uncond: bool = False) -> None:
        """Call the model, combine its predictions, and make each sample's step, at the row in the cursor."""
        gradient = None if self._guidance.classifier is None else self._gradient()
        predictions, variance = self.model_call(skip_uncond)
        if not skip_uncond:
            predictions = self._terms(predictions)
        made_by = self._guidance.weights_from
        if skip_uncond:
            self._step_without_uncond(predictions, gradient, variance, self.weights_without_uncond)
            return
        if made_by is None or self.key.makes_weights:
            self._step(predictions, gradient, variance, None)
            return
        arguments = self._step.arguments(predictions, gradient, variance)
        if isinstance(made_by, MomentWeights):
            assert self.parameters is not None
            arguments = weighed(arguments, made_by, self.parameters)
        else:
            weights = self._guidance.anchored_weights(predictions, self._gradient_scale())
            arguments = arguments._replace(weights=weights)
        self._step.once(arguments)

    def _terms(self, predictions: list[Tensor]) -> list[Tensor]:
        """Return what the weights are of: predictions, and what is made of them."""
        if self.momentum is not None:
            return self.momentum.terms(predictions)
        if isinstance(self.key.derived, LowPasses):
            return [in_layout_of(self.sample, each) for each in self.key.derived.extended(predictions)]
        return predictions

    def _gradient(self) -> Tensor:
        assert self._guidance.classifier is not None
        timestep = self.cursor.timestep[: self.batch] if self.cursor.timestep.dim() else self.cursor.timestep
        timestep = timestep.to(torch.int64).expand(self.batch)
        return in_layout_of(self.sample, self._guidance.classifier.gradient(self.sample, timestep, self.labels))

    def _gradient_scale(self) -> Tensor:
        """Return the present row's scale of the gradient, shape (1, batch or 1, 1), without reading it on the host."""
        if self._guidance.classifier is None:
            return self._no_gradient_scale
        row = self.cursor.state[:, _INDEX].clamp(max=self.key.capacity - 1)  # finished samples are one row further
        return self.weights[row, self._samples, -1].reshape(1, -1, 1)
