"""The guided sampling loop: model, guidance and step, from x_T to x_0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .guidance import Guidance
from .noise import DeviceGenerator, seeds_tensor
from .ops import check_run, guided_step
from .table import StepTable

Condition: TypeAlias = "Tensor | Mapping[str, Condition]"
"""What a model is conditioned on: a tensor with the batch in front, or several by the name of the model's argument, of
which each may be a mapping again."""


class Sampler:
    """Runs a step table over a model.

    Args:
        model: ``model(x, t)``, or ``model(x, t, condition)``; a condition that is a mapping is passed as keyword
            arguments. t is an int64 tensor of shape (rows of x,). Returns a tensor of x's shape, or, with a learned
            variance, of twice its channels: prediction, then variance.
        table: from ``ddpm`` or ``ddim``; ``table[k:]`` starts at step k.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None``.
        dtype: what x is cast to for the model, such as ``torch.bfloat16``; ``None``: the state's own. The state keeps
            the dtype of ``x_T``, best float32.
        backend: as in ``guided_step``.

    The model must not write to x. With weights for several predictions it is called once a step, on a batch that holds
    the sample several times: unconditional first, then each condition. With a learned variance, the last (conditional)
    prediction's is used.

    >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
    >>> sampler = Sampler(lambda x, t, y: 0.1 * x * y[:, None], ddim(NoiseSchedule.linear(), 5), ClassifierFree(3.0))
    >>> sampler(torch.randn(2, 4), cond=torch.ones(2), uncond=torch.zeros(2)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        table: StepTable,
        guidance: Guidance | None = None,
        *,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if not isinstance(table, StepTable):
            raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance: expected a Guidance or None, got {type(guidance).__name__}")
        self.model = model
        self.table = table
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
        self.guidance = guidance
        self.dtype = dtype
        self.backend = backend

    @torch.no_grad()
    def __call__(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        generator: torch.Generator | DeviceGenerator | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        callback: Callable[[int, int, Tensor], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Sample from ``x_T``, which is left as it is, to x_0.

        Args:
            x_T: the starting noise, shape (batch, ...), of the dtype the state is to be kept in (float32).
            cond: the condition, with the batch in front; with ``Composed``, a sequence of them, one for each scale.
            uncond: the null condition, or a negative one. Required where the guidance weighs an unconditional
                prediction.
            labels: int64 of shape (batch,), for the classifier of ``Classifier``.
            generator: draws the steps' noise; ``None``: torch's global generator.
            seeds: one for each sample, instead of a generator: the steps' noise is of the portable stream, so that a
                sample depends on its seed and not on the batch it is in. ``portable_noise(seeds, shape)`` is an
                ``x_T`` of the same kind.
            callback: called after each step with the step, its timestep and the sample so far.
            progress: show a progress bar (needs tqdm: ``pip install "fastguide[demo]"``).
        """
        table, guidance = self.table, self.guidance
        if not isinstance(x_T, Tensor) or x_T.dim() == 0:
            raise TypeError(f"x_T: expected a tensor of shape (batch, ...), got {x_T!r}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
        check_run(table, "x_T", x_T, guidance, self.backend)
        copies = 1 if guidance is None else guidance.num_predictions
        conditions = _conditions(cond, uncond, copies)
        condition = _batched(conditions, x_T.shape[0])
        classifier = None if guidance is None else guidance.classifier
        if labels is not None and (classifier is None or not classifier.takes_labels):
            raise ValueError("labels: expected None, as the guidance has no classifier to give them to, got some")
        if seeds is not None:
            if generator is not None:
                raise ValueError("seeds: expected either seeds or a generator, got both")
            seeds = seeds_tensor(seeds, x_T.device)
            if seeds.shape != x_T.shape[:1]:
                raise ValueError(f"seeds: expected {x_T.shape[0]}, one for each sample, got shape {tuple(seeds.shape)}")
        elif generator is None and table.adds_noise_anywhere:
            generator = _default_generator(x_T.device)

        sample = x_T
        steps = range(len(table))
        for step in _progress_bar(steps) if progress else steps:
            timestep = table.timesteps[step]
            gradient = None
            if classifier is not None:
                gradient = classifier.gradient(sample, timestep.expand(x_T.shape[0]), labels)
                gradient = _in_layout_of(sample, gradient)
            output = self._predict(sample, timestep, condition, copies)
            prediction, variance = _split_variance(output, sample, copies, table.learned_variance)
            # A fresh output each time: the model, the callback or the caller may have kept the last sample.
            sample = guided_step(
                table,
                step,
                sample,
                prediction,
                guidance,
                gradient=gradient,
                variance=variance,
                generator=generator,
                seeds=seeds,
                backend=self.backend,
            )
            if callback is not None:
                callback(step, table.host_timesteps[step], sample)
        return sample

    def _predict(self, sample: Tensor, timestep: Tensor, condition: Condition | None, copies: int) -> Tensor:
        batched = sample if copies == 1 else torch.cat([sample] * copies)
        batched = batched if self.dtype is None else batched.to(self.dtype)
        timesteps = timestep.expand(batched.shape[0])
        if condition is None:
            output = self.model(batched, timesteps)
        elif isinstance(condition, Mapping):
            output = self.model(batched, timesteps, **condition)
        else:
            output = self.model(batched, timesteps, condition)
        if not isinstance(output, Tensor):
            raise TypeError(f"model: expected it to return a tensor, got {type(output).__name__}")
        return output


def _conditions(
    cond: Condition | Sequence[Condition] | None, uncond: Condition | None, copies: int
) -> list[tuple[str, Condition]]:
    """The condition of each prediction, with its argument's name, in the order of the weights."""
    several: list[tuple[str, Condition]]
    if isinstance(cond, (Tensor, Mapping)):
        several = [("cond", cond)]
    elif cond is None or isinstance(cond, (list, tuple)):
        several = [(f"cond[{i}]", c) for i, c in enumerate(cond or [])]
    else:
        raise TypeError(f"cond: expected a tensor or a mapping of tensors, got {type(cond).__name__}")
    if copies == 1:
        if uncond is not None:
            raise ValueError("uncond: expected None, as the guidance weighs no unconditional prediction")
        if len(several) > 1:
            raise ValueError(f"cond: expected one condition, got {len(several)}")
        return several
    if uncond is None:
        raise ValueError("uncond: expected the null (or a negative) condition, as the guidance weighs it, got None")
    if len(several) != copies - 1:
        raise ValueError(f"cond: expected {copies - 1} condition(s) for this guidance, got {len(several)}")
    return [("uncond", uncond), *several]


def _batched(conditions: list[tuple[str, Condition]], batch: int) -> Condition | None:
    """All conditions as one, along the batch."""
    if not conditions:
        return None
    first = conditions[-1][1]
    if not isinstance(first, Mapping):
        return _concatenated(conditions, batch)
    parts: dict[str, list[tuple[str, Condition]]] = {key: [] for key in first}
    for name, condition in conditions:
        if not isinstance(condition, Mapping) or condition.keys() != first.keys():
            raise ValueError(f"{name}: expected a mapping with the keys {sorted(first)}, as the other conditions have")
        for key, value in condition.items():
            parts[key].append((f"{name}[{key!r}]", value))
    batched = {key: _batched(part, batch) for key, part in parts.items()}
    return {key: value for key, value in batched.items() if value is not None}


def _concatenated(parts: Sequence[tuple[str, Condition]], batch: int) -> Tensor:
    tensors = []
    for name, part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}: expected a tensor, or mappings throughout, got {type(part).__name__}")
        if part.dim() == 0 or part.shape[0] != batch:
            raise ValueError(f"{name}: expected the batch of {batch} in front, got shape {tuple(part.shape)}")
        tensors.append(part)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _split_variance(
    output: Tensor, sample: Tensor, copies: int, learned: bool
) -> tuple[Tensor | list[Tensor], Tensor | None]:
    """The predictions in the sample's layout, and the learned variance: that of the last, conditional one."""
    batch, rest = sample.shape[0], sample.shape[1:]
    expected = (copies * batch, *rest)
    if learned:
        if sample.dim() < 2:
            raise ValueError("x_T: expected shape (batch, channels, ...) for a table of learned variance")
        expected = (copies * batch, 2 * rest[0], *rest[1:])
    if output.shape != expected:
        raise ValueError(f"model: expected it to return shape {expected}, got {tuple(output.shape)}")
    if not learned and output.stride()[1:] == sample.stride()[1:]:
        return output, None  # all predictions in one tensor, as they came
    parts = [output[k * batch : (k + 1) * batch] for k in range(copies)]
    if not learned:
        return [_in_layout_of(sample, part) for part in parts], None
    channels = rest[0]
    predictions = [_in_layout_of(sample, part[:, :channels]) for part in parts]
    return predictions, _in_layout_of(sample, parts[-1][:, channels:])


def _in_layout_of(sample: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the sample's layout; copied only where a model or classifier returns another."""
    if tensor.stride()[1:] == sample.stride()[1:]:
        return tensor
    return torch.empty_like(sample, dtype=tensor.dtype).copy_(tensor)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    if device.type != "cpu":
        raise ValueError(f"generator: expected one for {device.type}, as torch names no global one there, got None")
    return torch.default_generator


def _progress_bar(steps: range) -> Sequence[int]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress: expected tqdm to be installed: pip install "fastguide[demo]"') from error
    bar: Sequence[int] = tqdm(steps, desc="sampling", unit="step")
    return bar
