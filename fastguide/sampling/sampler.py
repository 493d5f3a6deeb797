"""The guided sampling loop: model, guidance and step, from x_T to x_0, on a GPU as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from ..guidance import Guidance
from ..guidance.weights import UNGUIDED
from ..solvers.table import StepTable
from ..step.backends.registry import BACKENDS
from ..step.cursor import TIMESTEP_DTYPES
from ..step.guided_step import check_run
from . import conditioning as conditioning
from . import stepping
from .capture import Graphs, Pool
from .conditioning import Condition
from .continuous_batching import Slots
from .image_to_image import start as started
from .noise import Generators, noise_source
from .state import Loop, LoopKind, LoopOptions
from .trajectory import Record, Sampled

Callback: TypeAlias = Callable[[int, float, Tensor], object]


class Sampler:
    """Runs a step table over a model.

    Args:
        model: ``model(x, t)``, or ``model(x, t, condition)``; a condition that is a mapping is passed as keyword
            arguments. Returns a tensor of x's shape, or, with a learned variance, of twice its channels: prediction,
            then variance. It must not write to x, t and the condition, nor keep them: the next step overwrites them.
        table: from ``ddpm`` or ``ddim``; ``table[k:]`` starts at step k. It may be replaced between calls.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, or ``None``. It may be replaced
            between calls.
        dtype: what x is cast to for the model, such as ``torch.bfloat16``; ``None``: the state's own. The state keeps
            the dtype of ``x_T``, best float32, and conditions are given to the model as they come.
        backend: as in ``guided_step``.
        cuda_graph: on a GPU, ``"auto"`` captures one step, model and all, at its first call, and replays it as often
            as there are steps; ``"loop"`` captures all steps as one graph; ``"try"`` is ``"auto"``, or eager with a
            warning if the model cannot be captured; ``False`` is eager. All give the same bits. On the CPU, ``"auto"``
            and ``"try"`` are eager.
        batched: whether all predictions are one call of the model, on a batch that holds the sample several times,
            unconditional first; ``False``: one call for each, with less memory.
        skip_unconditional: leave the unconditional prediction out at steps that give it no weight, as outside of a
            guidance interval: ``ClassifierFree.per_step([1, 1, 7.5, 7.5, 1, 1])``.
        timestep_dtype: of the model's t: int64, or float32.
        scalar_timestep: t is of shape (), instead of one for each row of x.
        max_loops: how many kinds of loop are kept, of different shapes, dtypes or inputs, each with its buffers and
            graphs; the least recently used is dropped.
        recapture: ``False``: the first call decides on the kind, and another is refused.

    Number of steps, schedule, scale, seeds and conditions are in small buffers: changing them captures nothing anew
    (but scales for each sample instead of one for all, and, with ``"loop"``, another number of steps). A graph reads
    the model's parameters where they were: after any but changes in place, such as ``load_state_dict``'s, call
    ``clear()``. A model that draws from the generator of the steps' noise draws the same values as its step.
    With a learned variance, the last (conditional) prediction's is used. Of one thread at a time.

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
        cuda_graph: stepping.Mode = "auto",
        batched: bool = True,
        skip_unconditional: bool = False,
        timestep_dtype: torch.dtype = torch.int64,
        scalar_timestep: bool = False,
        max_loops: int = 8,
        recapture: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
        if timestep_dtype not in TIMESTEP_DTYPES:
            raise TypeError(f"timestep_dtype: expected one of {TIMESTEP_DTYPES}, got {timestep_dtype!r}")
        if cuda_graph not in stepping.MODES:
            raise ValueError(f"cuda_graph: expected 'auto', 'loop', 'try' or False, got {cuda_graph!r}")
        for name, flag in (
            ("batched", batched),
            ("skip_unconditional", skip_unconditional),
            ("scalar_timestep", scalar_timestep),
            ("recapture", recapture),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {tuple(BACKENDS)}, got {backend!r}")
        if not isinstance(max_loops, int) or isinstance(max_loops, bool) or max_loops < 1:
            raise ValueError(f"max_loops: expected a positive integer, got {max_loops!r}")
        self.model = model
        self.dtype = dtype
        self.backend = backend
        self.cuda_graph: stepping.Mode = cuda_graph
        self.batched = batched
        self.skip_unconditional = skip_unconditional
        self.timestep_dtype = timestep_dtype
        self.scalar_timestep = scalar_timestep
        self.max_loops = max_loops
        self.recapture = recapture
        self.table = table
        self.guidance = guidance
        self._loops: dict[LoopKind, _Kept] = {}
        self._pools: dict[torch.device, Pool] = {}
        self._in_use = threading.Lock()

    @property
    def table(self) -> StepTable:
        """The steps."""
        return self._table

    @table.setter
    def table(self, table: StepTable) -> None:
        if not isinstance(table, StepTable):
            raise TypeError(f"table: expected a StepTable, got {type(table).__name__}")
        self._table = table

    @property
    def guidance(self) -> Guidance | None:
        """The guidance."""
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance | None) -> None:
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance: expected a Guidance or None, got {type(guidance).__name__}")
        self._guidance = guidance

    @overload
    def __call__(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        generator: Generators | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        check_finite: bool = False,
        return_trajectory: Literal[False] = False,
        return_originals: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        generator: Generators | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        check_finite: bool = False,
        return_trajectory: bool = False,
        return_originals: Literal[True],
    ) -> Sampled: ...

    @overload
    def __call__(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        generator: Generators | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        check_finite: bool = False,
        return_trajectory: Literal[True],
        return_originals: bool = False,
    ) -> Sampled: ...

    @torch.no_grad()
    def __call__(
        self,
        x_T: Tensor,
        *,
        cond: Condition | Sequence[Condition] | None = None,
        uncond: Condition | None = None,
        labels: Tensor | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        strength: float | None = None,
        generator: Generators | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        callback: Callback | None = None,
        progress: bool = False,
        check_finite: bool = False,
        return_trajectory: bool = False,
        return_originals: bool = False,
    ) -> Tensor | Sampled:
        """Sample from ``x_T``, which is left as it is, to x_0.

        Args:
            x_T: the starting noise, shape (batch, ...), of the dtype the state is to be kept in (float32).
            cond: the condition, with the batch in front; with ``Composed``, a sequence of them, one for each scale.
            uncond: the null condition, or a negative one. Required where the guidance weighs an unconditional
                prediction.
            labels: int64 of shape (batch,), for the classifier of ``Classifier``.
            image: an x_0 of x_T's shape, to begin from or to keep a part of.
            mask: 1 where the model paints, 0 where ``image`` is kept (inpainting, outpainting): any shape that
                broadcasts to x_T's, bool or floating-point; between 0 and 1 it blends, beyond it is refused (on a GPU
                not looked at). At every step the kept part is
                ``image`` with x_T for its noise, at the step's level; in the end it is ``image``.
            strength: 0 to 1, with ``image``: how much of the table is run, from ``image`` noised by x_T to that level
                (image-to-image); 0 returns ``image``. With a mask, ``None`` or 1 starts from x_T itself.
            generator: draws the steps' noise; ``None``: torch's global generator. A sequence gives each sample its own.
            seeds: one for each sample, instead of a generator: the steps' noise is of the portable stream, so that a
                sample depends on its seed and not on the batch it is in. ``portable_noise(seeds, shape)`` is an
                ``x_T`` of the same kind.
            callback: ``callback(step, timestep, sample)`` after each step, counted as the table does. The sample is
                the loop's own: clone what is to be kept; what is written to it, by operations of torch, the loop goes
                on with. An exception ends the loop, which can be called again.
            progress: show a progress bar (needs tqdm). It counts steps that are launched: nothing waits for the device.
            check_finite: refuse a result that is not finite, naming the step after which that began; waits for the
                device once, at the end.
            return_trajectory, return_originals: return a ``Sampled`` with every step's sample or predicted x_0.

        Returns:
            x_0 as a new tensor, or a ``Sampled``.

        Raises:
            TypeError, ValueError: an argument is not as described, or the model or classifier returns something else
                than described; the message names it, what was expected and what came.
            RuntimeError: the model cannot be captured; the sampler is in use.
            FloatingPointError: with ``check_finite``.
        """
        self._check_call(x_T, callback)
        table, guidance = self._table, UNGUIDED if self._guidance is None else self._guidance
        start, begin, kept_mask = started(table, x_T, image, mask, strength)
        conditions = conditioning.listed(cond, uncond, guidance.num_predictions)
        conditioning.check_labels(labels, guidance, x_T.shape[0])
        noise = noise_source(table, x_T, generator, seeds, self.backend)
        options = self._options()
        kind = options.kind(
            x_T,
            conditioning.signature(conditions, x_T.shape[0]),
            table,
            guidance,
            capacity=len(table),
            labels=labels is not None,
            noise=noise.kind,
            known=kept_mask is not None,
            originals=return_originals,
        )
        conditional = options.skipped(guidance, len(table))
        with self._using(kind, guidance) as kept:
            loop = kept.loop

            def write() -> None:
                loop.write_table(table, guidance)
                loop.sample.copy_(start)
                loop.write_conditions(conditions)
                for buffer, values in ((loop.labels, labels), (loop.seeds, noise.seeds)):
                    if buffer is not None and values is not None:
                        buffer.copy_(values)
                for buffer, values in zip(loop.known, (kept_mask, image, x_T), strict=True):
                    if buffer is not None and values is not None:
                        buffer.copy_(values)
                if loop.generator is not None:
                    noise.begin(loop.generator)
                loop.cursor.start(table, begin)
                loop.stage()

            steps = range(begin, len(table))
            between = callback is not None or progress or check_finite or return_trajectory or return_originals
            between = between or noise.kind == "given"
            make_step = stepping.step_function(self.cuda_graph, loop, kept.graphs, write, conditional, steps, between)
            write()
            record = Record(loop, len(steps), return_trajectory, return_originals, check_finite)
            stood = noise.stands() if loop.generator is not None else None
            try:
                for number, step in enumerate(_progress_bar(steps) if progress else steps):
                    if noise.kind == "given" and table.adds_noise[step]:
                        loop.draw(noise.generators)
                    if loop.generator is not None and noise.stands() != stood:
                        noise.begin(loop.generator)
                    make_step(step)
                    if loop.generator is not None:
                        noise.advance(loop.increment * table.adds_noise[step])
                        stood = noise.stands()
                    if callback is not None:
                        version = loop.sample._version
                        callback(step, table.host_timesteps[step], loop.sample)
                        if loop.sample._version != version:
                            loop.stage()
                    record.after(number)
            finally:
                if loop.generator is not None:
                    noise.end(loop.generator)
            return record.result(table, begin)

    # ---- What a call needs ----

    def _check_call(self, x_T: Tensor, callback: Callback | None) -> None:
        if not isinstance(x_T, Tensor) or x_T.dim() == 0:
            got = "one without dimensions" if isinstance(x_T, Tensor) else type(x_T).__name__
            raise TypeError(f"x_T: expected a tensor of shape (batch, ...), got {got}")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
        check_run(self._table, "x_T", x_T, self._guidance or UNGUIDED, self.backend)
        if self._table.learned_variance and x_T.dim() < 2:
            raise ValueError("x_T: expected shape (batch, channels, ...) for a table of learned variance")
        stepping.check_mode(self.cuda_graph, x_T.device)

    def _options(self) -> LoopOptions:
        return LoopOptions(
            self.model,
            self.dtype,
            self.backend,
            self.batched,
            self.skip_unconditional,
            self.timestep_dtype,
            self.scalar_timestep,
        )

    def slots(self, batch: int, *, capacity: int = 1024) -> Slots:
        """A batch of places for requests that come and go, for continuous batching.

        Args:
            batch: number of requests that can be under way at once.
            capacity: number of rows of all different tables under way.

        The model, dtypes, graphs and default table and guidance are the sampler's.
        """
        return Slots(self._options(), self._table, self._guidance, self.cuda_graph, batch, capacity)

    @contextmanager
    def _using(self, kind: LoopKind, guidance: Guidance) -> Iterator[_Kept]:
        """The loop of a kind, made if there is none yet and kept if it serves, for one caller at a time."""
        if self._in_use.locked():
            raise RuntimeError("sampler: is running already, in another thread or a callback; expected one of its own")
        with self._in_use:
            pool = self._pools.setdefault(kind.device, Pool(kind.device))
            pool.wait()
            kept = self._loops.get(kind)
            if kept is None:
                if not self.recapture and self._loops:
                    known = next(iter(self._loops))
                    raise ValueError(f"recapture: expected a call like the first, of {known.difference(kind)}")
                only_one = not self.recapture and self.cuda_graph == "loop"
                kept = _Kept(Loop(kind, guidance), Graphs(pool, max(self.max_loops, 2), only_one))
            try:
                yield kept
            except BaseException:
                pool.leave()
                if kind not in self._loops:  # it is given up, and its memory
                    pool.finish()
                raise
            pool.leave()
            self._loops.pop(kind, None)
            while len(self._loops) >= max(self.max_loops, 1):
                self._drop(next(iter(self._loops)))
            self._loops[kind] = kept

    def clear(self) -> None:
        """Forget all loops, with their buffers and graphs; waits for the device."""
        if self._in_use.locked():
            raise RuntimeError("sampler: is running, in another thread or a callback; expected it idle")
        with self._in_use:
            for kind in list(self._loops):
                self._drop(kind)
            self._pools.clear()

    def _drop(self, kind: LoopKind) -> None:
        self._pools[kind.device].finish()
        del self._loops[kind]

    def __getstate__(self) -> dict[str, Any]:
        """Without loops, which are made anew."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_loops", "_pools", "_in_use")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loops, self._pools, self._in_use = {}, {}, threading.Lock()


class _Kept(NamedTuple):
    loop: Loop
    graphs: Graphs


def _progress_bar(steps: range) -> Sequence[int]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError('progress: expected tqdm to be installed: pip install "fastguide[demo]"') from error
    bar: Sequence[int] = tqdm(steps, desc="sampling", unit="step")
    return bar
