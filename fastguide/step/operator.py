"""The step as a torch operator: schema, fake, and ``guided_step``, the public function over it.

``torch.ops.fastguide.guided_step`` is defined here once; backends implement it and enter themselves in ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..guidance.weights import Guidance
from ..solvers.table import StepTable
from . import checks, drawing, memory, reference
from .cursor import Cursor
from .inpainting import Known
from .noise import DeviceGenerator, signed_word

_library = torch.library.Library("fastguide", "DEF")
SCHEMA = (
    "(Tensor(a!) out, Tensor(b!)? original, Tensor(c!)? staged, Tensor sample, Tensor[] predictions, Tensor rows, "
    "Tensor weights, SymInt index, Tensor? indices, Tensor? gradient, Tensor? variance, Tensor? noise, Tensor? seeds, "
    "Tensor(d!)? philox, SymInt philox_threads, Tensor(e!)? cursor=None, Tensor(f!)? timestep=None, "
    "Tensor? mask=None, Tensor? known=None, Tensor? known_noise=None) -> ()"
)
"""Of the operator, and of a backend's that has one of its own.

``cursor`` and ``timestep`` are those of a ``Cursor``, in the place of ``index`` and ``indices``; ``mask``, ``known``
and ``known_noise`` those of a ``Known``.
``philox`` stands for torch's CUDA stream, drawn inside the kernel for a grid of ``philox_threads``: int64, either seed
and offset on the CPU, or ``DeviceGenerator.state``, which the kernel moves on.
"""
_library.define("guided_step" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("guided_step", reference.guided_step, "CompositeExplicitAutograd")


def guided_step_fake(*_arguments: object) -> None:
    """Writes to tensors whose shapes the caller has set: nothing is left to infer."""


torch.library.register_fake("fastguide::guided_step", guided_step_fake, lib=_library)


StepFunction = Callable[..., None]


class Backend(NamedTuple):
    """One implementation of the step.

    ``devices`` are the device types that it serves here and now, ``None`` all; ``status`` says in a line what it is,
    or why it serves none; ``torch_stream`` whether its kernel on a GPU draws torch's noise itself; ``broken`` whether
    it should serve the CPU and cannot: nothing else is chosen in its place.
    """

    name: str
    step: StepFunction
    devices: tuple[str, ...] | None
    status: str
    torch_stream: bool = False
    broken: bool = False

    def serves(self, device: str) -> bool:
        """Whether it serves a type of device here and now."""
        return self.devices is None or device in self.devices


BACKENDS: dict[str, Backend] = {}
_defaults: dict[str, Backend] = {}


def register_backend(backend: Backend, *, default: bool = True) -> None:
    """Enter a backend: the default of those devices that none before it serves, unless it is only to be named."""
    BACKENDS[backend.name] = backend
    for device in (backend.devices or ()) if default else ():
        _defaults.setdefault(device, backend)


def default_backend(device: torch.device | str) -> str:
    """Name of the backend that serves a device when none is named.

    Raises:
        ValueError: it is a GPU, and no backend for GPUs is there; or the compiled one is there, and cannot be loaded.
            ``backend="reference"`` has to be asked for then.
    """
    return backend_for(None, torch.device(device).type).name


UNGUIDED = Guidance(torch.tensor([[[1.0, 0.0]]], dtype=torch.float64, device="cpu"), None)
"""One prediction, as it is."""


@overload
def guided_step(
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | DeviceGenerator | None = None,
    seeds: Tensor | None = None,
    known: Known | None = None,
    return_original: Literal[False] = False,
    out: Tensor | None = None,
    staged: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...


@overload
def guided_step(
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | DeviceGenerator | None = None,
    seeds: Tensor | None = None,
    known: Known | None = None,
    return_original: Literal[True],
    out: Tensor | None = None,
    staged: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def guided_step(
    table: StepTable,
    index: int | Tensor | Cursor,
    sample: Tensor,
    predictions: Tensor | Sequence[Tensor],
    guidance: Guidance | None = None,
    *,
    gradient: Tensor | None = None,
    variance: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | DeviceGenerator | None = None,
    seeds: Tensor | None = None,
    known: Known | None = None,
    return_original: bool = False,
    out: Tensor | None = None,
    staged: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of guided sampling: combine the predictions, add the gradient, apply the solver's row, add the noise.

    One pass over memory. Arithmetic is in float32 (in float64 if the sample is), rounded once to the output's dtype.

    Args:
        table: from ``ddpm`` or ``ddim``, on the sample's device.
        index: the step, 0 to ``len(table) - 1``: an int, or an int64 tensor on the sample's device, of shape () or,
            one per sample, (batch,). The host never waits for a device to read it; on the CPU it is checked. Or a
            ``Cursor``, which the step moves on; ``out`` then has to be the sample itself.
        sample: x_t, shape (batch, ...), dense within a sample (contiguous, channels_last, ...), any batch stride.
        predictions: what the model returned (without autograd, as under ``torch.no_grad()``: the step is not
            differentiable), one tensor of the sample's shape for each weight of the guidance, laid
            out within a sample as the sample is; or one tensor with all of them along the batch,
            ``cat([unconditional, conditional])``.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None`` for one prediction.
        gradient: ``grad_x log p(y | x_t)``, required with a ``Classifier``; see ``Classifier.gradient``.
        variance: the model's variance output, required by tables of ``learned`` and ``learned_range``; with several
            conditions usually that of the conditional prediction.
        noise: standard normal values. Where the row adds noise, one of ``noise``, ``generator`` and ``seeds`` is
            required; where it adds none, nothing is read or drawn (with a tensor index, drawn for every step).
        generator: draws the noise: the values of ``torch.randn(sample.shape, dtype=sample.dtype,
            generator=generator)``, and the generator is left as that leaves it. On a GPU they are made inside of the
            kernel (but by ``torch.randn`` for tensors beyond 2 GiB, and within captures); a CPU generator draws on the
            CPU, and the noise is copied. ``torch.default_generator`` is torch's global one. Not under torch.compile,
            which takes no generators. A ``DeviceGenerator`` keeps its state on the GPU, for captured graphs.
        seeds: draws the noise from the portable stream: int64 on the sample's device, of shape () or, one per sample,
            (batch,). The values of ``portable_noise(seeds, sample.shape, step=index)``, the same to the bit on every
            device and in every batch. The sample is contiguous or channels_last.
        known: a known image, for inpainting: its part of the next sample is replaced by it, noised to that level.
        return_original: also return the predicted (clipped) original sample x_0.
        out: where to write the next sample; it may be one of the inputs, whole. Otherwise a new tensor like the sample.
        staged: where to write the next model input as well: the next sample times the row's ``in_scale`` (1 in DDPM
            and DDIM), rounded once to this tensor's dtype, as often as its batch is a multiple of the sample's. Laid
            out within a sample as the sample is; it shares no memory with any other argument, nor with the gaps between
            another's samples.
        backend: ``"native"``, ``"triton"`` or ``"reference"``; ``None``: the best for the device, see ``fastguide
            info``.

    Returns:
        x_{t-1}, or ``(x_{t-1}, x_0)`` with ``return_original=True``, both of ``out``'s dtype (the sample's).

    Raises:
        TypeError, ValueError, IndexError: an argument is not as described; the message names it, what was expected
            and what came. Nothing has been computed then, and no noise drawn. Only an index on a GPU is looked at by
            the kernel: out of range, it makes the sample NaN.

    >>> from fastguide import ClassifierFree, NoiseSchedule, ddim
    >>> table, x = ddim(NoiseSchedule.linear(), 50), torch.randn(2, 3, 8, 8)
    >>> uncond, cond = torch.randn(2, 2, 3, 8, 8)
    >>> guided_step(table, 0, x, [uncond, cond], ClassifierFree(7.5)).shape
    torch.Size([2, 3, 8, 8])
    """
    guidance = UNGUIDED if guidance is None else guidance
    inputs = checks.listed(predictions)
    together = checks.check_kinds(table, sample, inputs, guidance)
    cursor = index if isinstance(index, Cursor) else None
    if isinstance(index, Cursor):
        checks.check_cursor(table, index, sample, out)
        row, indices = None, None
    else:
        row, indices = checks.check_index(table, index, sample)
    adds_noise = _adds_noise(table, row, noise)
    checks.check_roles(table, guidance, sample, gradient, variance, noise, generator, seeds, adds_noise)
    checks.check_layouts(sample, inputs, together, gradient, variance, noise, out, staged, known)
    chosen = backend_for(backend, sample.device.type)
    step = chosen.step
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    rows = table.device_rows(guidance.form, dtype)
    weights = guidance.weights(sample.device, dtype)
    if not adds_noise:
        noise = generator = seeds = None

    compiling = torch.compiler.is_compiling()
    if compiling and generator is not None:
        raise ValueError("generator: torch.compile takes none; expected noise= or seeds=")
    apart = out is None  # whether the output shares no memory with an input: then noise may be drawn into it
    if out is None:
        out = memory.empty_like(sample)
    elif not compiling:
        if generator is not None or step is reference.guided_step:
            apart = not checks.check_overlap(out, sample, inputs, gradient, variance, noise, known)
        _bump_version(out)
    original = memory.empty_like(out) if return_original else None
    if staged is not None and not compiling:
        checks.check_apart(staged, out, sample, inputs, gradient, variance, noise, indices, seeds, known)
        _bump_version(staged)
    philox, grid = None, drawing.NO_GRID
    if isinstance(generator, DeviceGenerator):
        checks.check_device_generator(chosen.name, chosen.torch_stream, sample, cursor)
        philox, grid = generator.state, drawing.torch_grid(sample.device, sample.numel())
    elif generator is not None:
        if chosen.torch_stream and drawing.draws_in_kernel(generator, sample):
            offset, grid = generator.get_offset(), drawing.torch_grid(sample.device, sample.numel())
            philox = torch.tensor((signed_word(generator.initial_seed()), offset), device="cpu")
        else:
            noise = drawing.draw_noise(generator, sample, out if apart else None)
    try:
        step(
            out,
            original,
            staged,
            sample,
            inputs,
            rows,
            weights,
            row or 0,
            indices,
            gradient,
            variance,
            noise,
            seeds,
            philox,
            grid.threads,
            *(() if cursor is None and known is None else _of_a_loop(cursor, known)),
        )
    except RuntimeError:
        if not compiling:  # the kernel refuses overlaps before it writes; here are the words for it
            checks.check_overlap(out, sample, inputs, gradient, variance, noise, known)
        raise
    if philox is not None and isinstance(generator, torch.Generator):
        generator.set_offset(offset + grid.increment)
    return out if original is None else (out, original)


def _of_a_loop(cursor: Cursor | None, known: Known | None) -> tuple[Tensor | None, ...]:
    """The operator's last arguments, which a step by itself leaves out."""
    state = (None, None) if cursor is None else (cursor.state, cursor.timestep)
    return (*state, *((None, None, None) if known is None else known))


def check_run(table: StepTable, name: str, sample: Tensor, guidance: Guidance | None, backend: str | None) -> None:
    """Refuse, before a model is called, what ``guided_step`` would refuse after it; ``name`` is the sample's."""
    guidance = UNGUIDED if guidance is None else guidance
    if sample.device != table.device:
        raise ValueError(f"table: expected it on {sample.device}, the device of {name}, got {table.device}; use .to()")
    checks.check_guidance(table, guidance, sample.shape[0])
    checks.check_sample(name, sample, torch.is_grad_enabled())
    backend_for(backend, sample.device.type)
    table.device_rows(guidance.form, torch.float32)


def _adds_noise(table: StepTable, row: int | None, noise: Tensor | None) -> bool:
    """Whether the row adds noise, as far as the host knows; where it does not know, the row multiplies by zero."""
    if not table.adds_noise_anywhere:
        return False
    if row is None or (noise is not None and torch.compiler.is_compiling()):  # looking it up would compile each step
        return True
    return table.adds_noise[row]


def backend_for(name: str | None, device: str) -> Backend:
    """The backend that is named, or that serves a type of device by default; refused if it does not serve it."""
    if name is None:
        default = _defaults.get(device)
        if default is None:
            if device == "cuda":  # the reference would be a hundred times slower than what was asked for
                reasons = "; ".join(f"{b.name}: {b.status}" for b in BACKENDS.values() if b.devices is not None)
                raise ValueError(f"backend: none for a sample on a GPU is there ({reasons}); 'reference' is, if named")
            for backend in BACKENDS.values():
                if backend.broken:
                    said = f"{backend.name}: {backend.status}"
                    raise ValueError(f"backend: none for a sample on {device!r} ({said}); 'reference' is, if named")
            return BACKENDS["reference"]
        return default
    chosen = BACKENDS.get(name)
    if chosen is None:
        raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {name!r}")
    if not chosen.serves(device):
        raise ValueError(f"backend: {name!r} does not serve a sample on {device!r} here: {chosen.status}")
    return chosen


def _bump_version(tensor: Tensor) -> None:
    """Autograd shall notice that a tensor is written, if it has saved it."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
