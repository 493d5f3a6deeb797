"""Runs whose steps are made one by one, with no buffers of their own: for gradients, and for log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from ..guidance import Guidance
from ..guidance.momentum import AddedUp
from ..solvers.table import StepTable
from ..step.guided_step import guided_step
from ..step.history import History
from ..step.inpainting import Inpainting
from ..step.log_probability import Reduction
from ..step.memory import empty_like, in_layout_of
from ..step.momentum import Momentum
from ..step.noise import portable_noise
from . import conditioning as conditioning
from .model_call import ModelCall, ModelOptions
from .noise import Generators, NoiseBuffers, noise_source
from .request import make_request
from .trajectory import PolicyTrajectory


class Drawn(NamedTuple):
    """A step's noise, which can be read again: its values, or the seeds that they are drawn from."""

    noise: Tensor | None = None
    seeds: Tensor | None = None


class Earlier(NamedTuple):
    """What earlier calls have left for later ones."""

    entries: Tensor
    """The history's."""
    sums: Tensor | None
    """What guidance with momentum has added up."""


class EagerRun:
    """A run over a table, of which each step is a function of what it is given."""

    def __init__(
        self,
        options: ModelOptions,
        table: StepTable,
        guidance: Guidance | None,
        x_T: Tensor,
        *,
        generator: Generators | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        **arguments: Any,
    ) -> None:
        """Check a call.

        Args:
            options: the model, and how it is called.
            table, guidance: the sampler's.
            x_T, generator, seeds, arguments: as ``Sampler.__call__`` has them.
        """
        request = make_request(
            options, table, guidance, x_T, generator=generator, seeds=seeds, recorded=True, **arguments
        )
        self.table, self.guidance, self.calls = request.table, request.guidance, request.calls
        self.first = request.first.to(x_T.dtype)
        self._options, self._request = options, request
        source = request.backend._replace(torch_stream=False)  # which draws values, to be read again
        self._noise = noise_source(self.table, x_T, generator, seeds, source)
        self._buffers = NoiseBuffers(self._noise.source, self.first.detach())
        self._noise.load(self._buffers, slice(None))
        self._history = History(self.table, self.first.detach())
        with_momentum = isinstance(self.guidance.derived, AddedUp)
        self._momentum = Momentum(self.table, self.guidance, self.first.detach()) if with_momentum else None
        self._condition = self._conditions()
        self._inpainting = None
        if request.inpainting is not None:
            placed = (empty_like(self.first.detach()).copy_(tensor) for tensor in request.inpainting)
            self._inpainting = Inpainting(*placed)

    def _conditions(self) -> conditioning.Condition | None:
        """Return the conditions of all predictions, one after the other."""
        batch, given = len(self.first), self._request.conditions
        whole = conditioning.buffers(
            self._request.conditions_signature, self.guidance.num_conditions * batch, self.first.device
        )
        if whole is not None:
            for k, (_, condition) in enumerate(given):
                conditioning.write(whole, slice(k * batch, (k + 1) * batch), condition)
        return whole

    @property
    def earlier(self) -> Earlier:
        """What there is before the first step."""
        return Earlier(self._history.entries, None if self._momentum is None else self._momentum.values)

    def draw(self, call: int) -> Drawn:
        """Draw the noise of a call's step, in the order of the calls."""
        if not self.table.adds_noise[call]:
            return Drawn()
        self._noise.before_step(self._buffers)
        if self._buffers.values is not None:
            return Drawn(self._buffers.values.clone())
        begin, seeds = self.calls[0], self._buffers.seeds
        if begin == 0 or seeds is None:
            return Drawn(seeds=seeds)
        drawn = portable_noise(seeds, self.first.shape, step=call - begin)  # counted from the first step
        return Drawn(empty_like(self.first.detach()).copy_(drawn))

    def step_of_slots(
        self, call: int, x: Tensor, drawn: Drawn, sums: Tensor | None, *slots: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Make a step; return the next sample, the sums, and the slots, of which only what it has written is new.

        So what is kept of each step is what later ones cannot find elsewhere.
        """
        entries = self._history.entries
        if slots:  # torch.cat chooses a layout of its own
            entries = slots[0] if len(slots) == 1 else in_layout_of(entries, torch.cat(slots))
        new, (left, sums) = self.step(call, x, Earlier(entries, sums), drawn)
        written = int(self.table.coefficients()["hist_slot"][call])
        if written < 0:
            return new, sums, *slots
        entry = left if len(slots) == 1 else left.unflatten(0, (len(slots), -1))[written].clone()
        return new, sums, *slots[:written], entry, *slots[written + 1 :]

    def step(self, call: int, x: Tensor, earlier: Earlier, drawn: Drawn, **options: Any) -> tuple[Any, Earlier]:
        """Call the model and make a step; return what ``guided_step`` does with these options, and what is left."""
        predictions, variance = self._predict(call, x)
        guidance, gradient = self.guidance, None
        if guidance.classifier is not None:
            timestep = torch.full((len(x),), int(self.table.host_timesteps[call]), device=x.device)
            gradient = guidance.classifier.gradient(x, timestep, self._request.labels)
        momentum, (entries, sums) = None, earlier
        if self._request.skips_uncond[call]:
            guidance = _without_unconditional(guidance, x)
        elif self._momentum is None or sums is None:
            predictions = guidance.terms(predictions)
        else:
            momentum = self._momentum.continued(sums, call)
        history = self._history.continued(entries, call)
        result = guided_step(
            self.table, call, x, predictions, guidance, gradient=gradient, variance=variance, noise=drawn.noise,
            seeds=drawn.seeds, inpainting=self._inpainting, history=history, momentum=momentum,
            backend=self._options.backend, **options,
        )  # fmt: skip
        return result, Earlier(history.entries, sums if momentum is None else momentum.values)

    def _predict(self, call: int, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        options, copies = self._options, self.guidance.num_conditions
        scale = self.table.in_scales[call]
        given = x if scale == 1 else x.to(torch.promote_types(x.dtype, torch.float32)) * scale
        given = given.to(x.dtype if options.dtype is None else options.dtype)
        if options.batched and copies > 1:
            given = torch.cat([given] * copies)
        timestep = torch.full(
            () if options.scalar_timestep else (len(given),), self.table.host_timesteps[call],
            dtype=options.told_in(self.table), device=x.device,
        )  # fmt: skip
        model_call = ModelCall(
            options.model, x, given, timestep, self._condition, num_predictions=copies, batched=options.batched,
            learned_variance=self.table.learned_variance,
        )  # fmt: skip
        return model_call(self._request.skips_uncond[call])


def _without_unconditional(guidance: Guidance, x: Tensor) -> Guidance:
    """Return guidance of all predictions but the first, which has no weight, nor has what is derived from it."""
    weights = guidance.weights(x.device, torch.promote_types(x.dtype, torch.float32))
    others = weights[..., 2 : guidance.num_conditions]
    return Guidance(torch.cat([weights[..., :1], others, weights[..., -1:]], -1), guidance.classifier)


def differentiable(run: EagerRun, last: int | None, checkpoint: bool) -> Tensor:
    """Return x_0, whose last steps autograd has recorded; ``Sampler.differentiable`` describes the arguments."""
    if run.guidance.classifier is not None:
        raise ValueError("guidance: expected no Classifier, whose gradient would be taken for a constant, got one")
    if last is not None and last > len(run.calls):
        raise ValueError(f"last: expected at most the run's {len(run.calls)} calls, got {last}")
    begin = run.calls.stop - (len(run.calls) if last is None else last)
    x, earlier = run.first, run.earlier
    for call in run.calls:
        drawn = run.draw(call)
        if call < begin:
            with torch.no_grad():
                x, earlier = run.step(call, x, earlier, drawn)
        elif checkpoint:
            if call == max(begin, run.calls.start):
                slots = earlier.entries.chunk(run.table.history_slots) if run.table.history_slots else ()
                sums = earlier.sums
            x, sums, *slots = checkpointed(run.step_of_slots, call, x, drawn, sums, *slots, use_reentrant=False)
        else:
            x, earlier = run.step(call, x, earlier, drawn)
    return x.clone() if x is run.first else x


def with_log_probs(run: EagerRun, samples: bool, originals: bool, reduction: Reduction) -> PolicyTrajectory:
    """Return what was on the way, with the log-probability of each step; call it without gradients."""
    x, earlier, adds_noise = run.first, run.earlier, run.table.adds_noise
    way = x.new_empty(len(run.calls) + 1, *x.shape) if samples else None
    predicted = x.new_empty(len(run.calls), *x.shape) if originals else None
    log_probs = torch.zeros(len(run.calls), len(x), dtype=torch.float64, device=x.device)
    original = empty_like(x) if originals else None
    for number, call in enumerate(run.calls):
        if way is not None:
            way[number] = x
        drawn = run.draw(call)
        if adds_noise[call]:
            options = {"original": original, "return_log_prob": reduction}
            (x, log_probs[number]), earlier = run.step(call, x, earlier, drawn, **options)
        else:
            x, earlier = run.step(call, x, earlier, drawn, original=original)
        if predicted is not None and original is not None:
            predicted[number] = original
    if way is not None:
        way[-1] = x
    return PolicyTrajectory(x.clone() if x is run.first else x, way, predicted, log_probs)
