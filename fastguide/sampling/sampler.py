"""The guided sampling loop: model, guidance and step, from x_T to x_0, on a GPU as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .._counts import check_count
from ..guidance import Guidance
from ..solvers.table import StepTable
from ..step.backends.registry import BACKENDS
from ..step.cursor import TIMESTEP_DTYPES
from ..step.log_probability import Reduction, check_log_prob
from . import capture
from .cached_states import Cached, CachedStates
from .conditioning import Condition
from .continuous_batching import Slots
from .distributed.dimension import Dimension
from .distributed.ranks import RankRun, Ranks
from .eager import EagerRun, differentiable, with_log_probs
from .model_call import ModelOptions
from .noise import Generators
from .request import SampleRequest, checked_guidance, checked_table, make_request
from .state import StateKey
from .trajectory import PolicyTrajectory, Recorder, Trajectory, check_recorded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Callback: TypeAlias = Callable[[int, float, Tensor], object]


class Sampler:
    """Samples with a model: runs a step table over it, from x_T to x_0.

    Args:
        model: ``model(x, t)``, or ``model(x, t, condition)``; a condition that is a mapping is passed as keyword
            arguments. Returns a tensor of x's shape, or, with a learned variance, of twice its channels: prediction,
            then variance. It must neither write to x, t and the condition nor store them: the next step overwrites
            them.
        table: from a solver such as ``ddim``; ``table[k:]`` starts at model call k. It may be replaced between calls.
        guidance: ``ClassifierFree``, ``Composed``, ``Classifier``, a sum of them, ``Guidance.from_predictions``, or
            ``None``. It may be replaced between calls.
        dtype: what x is cast to for the model, such as ``torch.bfloat16``; ``None``: the sample's own. The sample has
            the dtype of ``x_T``, best float32, and conditions are given to the model as they come.
        backend: as in ``guided_step``.
        cuda_graph: on a GPU, ``"auto"`` captures one step, model and all, at its first call, and replays it as often
            as there are steps; ``"loop"`` captures all steps as one graph; ``"try"`` is ``"auto"``, or eager with a
            warning if the model cannot be captured; ``False`` is eager. All give the same bits. On the CPU, ``"auto"``
            and ``"try"`` are eager.
        batched: whether all predictions are one call of the model, on a batch that holds the sample several times,
            unconditional first; ``False``: one call for each, with less memory.
        skip_unconditional: leave the unconditional prediction out at steps that give it no weight, as outside of a
            guidance interval: ``ClassifierFree.per_step([1, 1, 7.5, 7.5, 1, 1])``. Needs constant weights, or
            guidance that is ``within`` an interval.
        timestep_dtype: of the model's t, int64 or float32; ``None``: float32 for a table of real timesteps, else int64.
        scalar_timestep: whether t is of shape (), instead of one for each row of x.
        max_loops: number of kinds of calls, of different shapes, dtypes or inputs, whose buffers and graphs are
            cached; the least recently used are dropped.
        recapture: ``False``: only calls of the first call's kind are allowed.
        mesh: processes that share the work, a ``DeviceMesh`` with dimensions named "data" and "guidance" or one of
            them: each rank makes its part of the samples, and along "guidance" calls the model for its part of the
            predictions. All ranks call the sampler, with the same arguments.

    Number of steps, schedule, scale, seeds and conditions are in small buffers: changing them captures nothing again
    (but scales for each sample instead of one for all, and, with ``"loop"``, another number of steps). A graph reads
    the model's parameters where they were: after any but changes in place, such as ``load_state_dict``'s, call
    ``clear()``. A model that draws from the generator of the steps' noise draws the same values as its step.
    With a learned variance, the last (conditional) prediction's is used. Not thread-safe: use one sampler per thread.

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
        cuda_graph: capture.Mode = "auto",
        batched: bool = True,
        skip_unconditional: bool = False,
        timestep_dtype: torch.dtype | None = None,
        scalar_timestep: bool = False,
        max_loops: int = 8,
        recapture: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: expected a callable, got {type(model).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
        if timestep_dtype is not None and timestep_dtype not in TIMESTEP_DTYPES:
            raise TypeError(f"timestep_dtype: expected one of {TIMESTEP_DTYPES} or None, got {timestep_dtype!r}")
        if cuda_graph not in capture.MODES:
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
        check_count("max_loops", max_loops)
        self.model = model
        self.dtype = dtype
        self.backend = backend
        self.cuda_graph: capture.Mode = cuda_graph
        self.batched = batched
        self.skip_unconditional = skip_unconditional
        self.timestep_dtype = timestep_dtype
        self.scalar_timestep = scalar_timestep
        self.max_loops = max_loops
        self.recapture = recapture
        self.table = table
        self.guidance = guidance
        self._ranks = None if mesh is None else Ranks(mesh)
        if cuda_graph == "try" and self._guidance_ranks is not None:
            raise ValueError("cuda_graph: expected 'auto', 'loop' or False, as all ranks of a guidance do the same")
        self._states = CachedStates()

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes that share the work."""
        return None if self._ranks is None else self._ranks.mesh

    @property
    def table(self) -> StepTable:
        """The model calls and their rows."""
        return self._table

    @table.setter
    def table(self, table: StepTable) -> None:
        self._table = checked_table(table)

    @property
    def guidance(self) -> Guidance | None:
        """The guidance."""
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance | None) -> None:
        self._guidance = checked_guidance(guidance)

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
        gather: bool = True,
    ) -> Tensor:
        """Sample from ``x_T``, which is left as it is, to x_0.

        Args:
            x_T: the starting noise, shape (batch, ...), of the dtype that the sample shall have (float32). Standard
                normal values: the first sample is ``table.init_noise_sigma * x_T``, and the model's first input
                ``table.first_in_scale`` times that. Both factors are 1 for DDPM and DDIM. Of a slice that begins
                later, without ``image``: the sample at its level.
            cond: the condition, with the batch in front; with ``Composed``, a sequence of them, one for each scale.
            uncond: the null condition, or a negative one. Required where the guidance weighs an unconditional
                prediction.
            labels: int64 of shape (batch,), for the classifier of ``Classifier``.
            image: an x_0 of x_T's shape, to begin from, or of which a part is known.
            mask: 1 where the model paints, 0 where ``image`` is known (inpainting, outpainting): any shape that
                broadcasts to x_T's, bool or floating-point; between 0 and 1 it blends, beyond it is refused, and with
                solvers that go back to where a step began (``heun``, ``unipc``, ...) all but 0 and 1 (on a GPU its
                values are not looked at). At every step the known part is ``image`` with x_T for its noise, at the
                step's level; in the end it is ``image``.
            strength: 0 to 1, with ``image``: how much of the table's steps is run, from ``image`` noised by x_T to
                that level, ``alpha * image + sigma * x_T`` (image-to-image); 0 returns ``image``. With a mask, ``None``
                or 1 starts from noise alone.
            generator: draws the steps' noise; ``None``: torch's global generator. A sequence gives each sample its own.
            seeds: one for each sample, instead of a generator: the steps' noise is of the portable stream, so that a
                sample depends on its seed and not on the batch it is in; it counts from the call's first step.
                ``portable_noise(seeds, shape)`` is an ``x_T`` of the same kind.
            callback: ``callback(call, timestep, sample)`` after the step of each model call, counted as the table does:
                a table of two calls a step has more calls than steps. The sample is the sampler's own buffer: clone
                what you store; what you write to it, by operations of torch, is what the next step continues with. An
                exception ends the call, and the sampler can be called again.
            progress: show a progress bar (needs tqdm). It counts launched model calls: nothing waits for the device.
            check_finite: refuse a result that is not finite, naming the step after which that began; waits for the
                device once, at the end.
            gather: with a mesh, whether every rank returns all samples, in their order; ``False``: its own, those of
                ``samples_of_rank``. A callback sees those alone.

        Returns:
            x_0 as a new tensor.

        Raises:
            TypeError, ValueError: an argument is not as described, or the model or classifier returns something else
                than described; the message names it, what was expected and what came.
            RuntimeError: the model cannot be captured; the sampler is in use; another rank has failed or is gone.
            FloatingPointError: with ``check_finite``.
        """
        return self._sample(
            x_T, torch.is_grad_enabled(), cond=cond, uncond=uncond, labels=labels, image=image, mask=mask,
            strength=strength, generator=generator, seeds=seeds, callback=callback, progress=progress,
            check_finite=check_finite, gather=gather,
        ).sample  # fmt: skip

    def trajectory(
        self,
        x_T: Tensor,
        *,
        samples: bool = True,
        originals: bool = True,
        log_prob: bool | Reduction = False,
        **arguments: Any,
    ) -> Trajectory | PolicyTrajectory:
        """Sample as ``__call__`` does, and return what was on the way as well.

        Args:
            x_T: as in ``__call__``.
            samples: whether to return the sample after each model call.
            originals: whether to return the x_0 that each model call predicts.
            log_prob: whether to return a ``PolicyTrajectory``, with the log-probability of each step: as
                ``return_log_prob`` of ``guided_step``. Its steps are made one by one, and none is captured.
            arguments: all others of ``__call__``, by name; with ``log_prob``, those that say what is sampled.

        >>> from fastguide import NoiseSchedule, ddim
        >>> sampler = Sampler(lambda x, t: 0.1 * x, ddim(NoiseSchedule.linear(), 5))
        >>> x_0, samples, originals = sampler.trajectory(torch.randn(2, 4))
        >>> samples.shape, originals.shape
        (torch.Size([6, 2, 4]), torch.Size([5, 2, 4]))
        """
        if log_prob is False:
            return self._sample(x_T, torch.is_grad_enabled(), samples, originals, **arguments)
        check_recorded(samples, originals)
        for name in ("callback", "progress", "check_finite", "mask"):
            value = arguments.pop(name, None)
            if value is not None and value is not False:
                raise ValueError(f"{name}: expected none with log_prob")
        self._refuse_a_mesh()
        reduction: Reduction = "mean" if log_prob is True else log_prob
        check_log_prob(self._table, None, reduction)
        with torch.no_grad():
            run = EagerRun(self._options(), self._table, self._guidance, x_T, **arguments)
            return with_log_probs(run, samples, originals, reduction)

    def differentiable(
        self, x_T: Tensor, *, last: int | None = None, checkpoint: bool = True, **arguments: Any
    ) -> Tensor:
        """Sample as ``__call__`` does, to an x_0 that autograd can go back from, to fine-tune the model by a reward.

        The model's parameters, x_T, the conditions and a tensor ``guidance_scale`` get gradients. Steps are made one
        by one, and none is captured. A ``Classifier`` is refused: its gradient would count as a constant.

        Args:
            x_T: as in ``__call__``.
            last: how many of the last model calls are recorded; the others are made without gradients (DRaFT-K, Clark
                et al. 2024, arXiv 2309.17400); ``None``: all are.
            checkpoint: whether to keep one sample for each call alone, and to call the model once more on the way
                back (torch.utils.checkpoint): the memory is that of one call.
            arguments: of ``__call__``, by name, those that say what is sampled.

        >>> from fastguide import NoiseSchedule, ddim
        >>> model = torch.nn.Linear(4, 4)
        >>> sampler = Sampler(lambda x, t: model(x), ddim(NoiseSchedule.linear(), 5))
        >>> sampler.differentiable(torch.randn(2, 4), last=2).square().mean().backward()
        >>> model.weight.grad.shape
        torch.Size([4, 4])
        """
        self._refuse_a_mesh()
        if last is not None:
            check_count("last", last, 1)
        if not isinstance(checkpoint, bool):
            raise TypeError(f"checkpoint: expected True or False, got {checkpoint!r}")
        run = EagerRun(self._options(), self._table, self._guidance, x_T, **arguments)
        return differentiable(run, last, checkpoint)

    def _refuse_gradients(self, x_T: Tensor) -> None:
        """Refuse inputs whose gradients a loop that may be captured would drop."""
        scaled = self._guidance is not None and self._guidance.requires_grad
        if scaled or (isinstance(x_T, Tensor) and x_T.requires_grad):
            name = "guidance" if scaled else "x_T"
            raise ValueError(
                f"{name}: gradients asked of a captured loop, which records none; expected a call of differentiable(), "
                "or torch.no_grad()"
            )

    def _refuse_a_mesh(self) -> None:
        if self._ranks is not None:
            raise ValueError(
                "mesh: expected None with log_prob and in differentiable(); call them of a Sampler without a mesh, on "
                "each rank for its own samples"
            )

    @torch.no_grad()
    def _sample(
        self,
        x_T: Tensor,
        grad_enabled: bool,
        samples: bool = False,
        originals: bool = False,
        *,
        callback: Callback | None = None,
        progress: bool = False,
        check_finite: bool = False,
        gather: bool = True,
        **arguments: Any,
    ) -> Trajectory:
        options, ranks = self._options(), self._ranks
        shows = ranks is None or ranks.first

        def make() -> SampleRequest:  # with all that may be refused, so that other ranks are told
            check_recorded(samples, originals)
            if grad_enabled:
                self._refuse_gradients(x_T)
            if callback is not None and not callable(callback):
                raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
            if not isinstance(gather, bool) or (ranks is None and not gather):
                raise ValueError(f"gather: expected True, or False with a mesh, got {gather!r}")
            request = make_request(options, self._table, self._guidance, x_T, **arguments)
            capture.check_mode(self.cuda_graph, x_T.device)
            between_steps = callback is not None or progress or check_finite or samples or originals
            capture.check_between_steps(self.cuda_graph, request.calls, between_steps or request.noise.between_steps)
            if progress and shows:
                _tqdm()
            return request

        def borrow(request: SampleRequest) -> AbstractContextManager[Cached]:
            key, whole_loops = key_of(request), self.cuda_graph == "loop"
            return self._states.borrow(key, request.guidance, self.max_loops, self.recapture, whole_loops)

        def sample(request: SampleRequest, cached: Cached) -> Trajectory:
            return self._run(request, cached, samples, callback, progress and shows, check_finite)

        def key_of(request: SampleRequest) -> StateKey:
            return StateKey.of(options, request, originals=originals)

        if ranks is None:
            with borrow(request := make()) as cached:
                return sample(request, cached)
        settings = f"cuda_graph={self.cuda_graph!r}, {options.settings}, {samples=}, {originals=}, {gather=}"
        run = RankRun(make, lambda share: key_of(share) in self._states, borrow, sample)
        return ranks.sampled(run, settings, (samples, originals), gather)

    def _run(
        self,
        request: SampleRequest,
        cached: Cached,
        samples: bool,
        callback: Callback | None,
        progress: bool,
        check_finite: bool,
    ) -> Trajectory:
        table, noise, calls = request.table, request.noise, request.calls
        state, graphs = cached
        records = check_finite or samples or state.original is not None

        def load() -> None:
            state.load(request)

        step = capture.step_function(self.cuda_graph, state, graphs, load, request.skips_uncond, calls)
        load()
        recorder = Recorder(state.sample, state.original, len(calls), samples=samples, finite=check_finite)
        adds_noise, buffers = table.adds_noise, state.noise
        try:
            for number, call in enumerate(_tqdm()(calls, desc="sampling", unit="call") if progress else calls):
                if adds_noise[call]:
                    noise.before_step(buffers)
                    step(call)
                    noise.after_step(buffers)
                else:
                    step(call)
                if callback is not None:
                    version = state.sample._version
                    callback(call, table.host_timesteps[call], state.sample)
                    if state.sample._version != version:  # the step has staged the model's input already
                        state.stage(table.in_scales[call + 1])
                if records:
                    recorder.after_step(number)
        finally:
            noise.end(state.noise)
        with nullcontext() if self._ranks is None else self._ranks.guidance.none_waiting():
            return recorder.result(table, request.begin)

    def slots(self, batch: int, *, capacity: int = 1024) -> Slots:
        """Return places for requests that come and go, for continuous batching.

        Args:
            batch: number of requests that can be active at once.
            capacity: number of rows that all different tables of active requests have.

        The model, dtypes, graphs and default table and guidance are the sampler's. With a mesh, they are this rank's
        own, and requests are not shared.
        """
        if self._guidance_ranks is not None:
            raise ValueError("mesh: expected one rank in its dimension 'guidance' for slots, got more")
        return Slots(self._options(), self._table, self._guidance, self.cuda_graph, batch, capacity)

    def _options(self) -> ModelOptions:
        return ModelOptions(
            self.model,
            self.dtype,
            self.backend,
            self.batched,
            self.skip_unconditional,
            self.timestep_dtype,
            self.scalar_timestep,
            self._guidance_ranks,
        )

    @property
    def _guidance_ranks(self) -> Dimension | None:
        return None if self._ranks is None or self._ranks.guidance.size == 1 else self._ranks.guidance

    def clear(self) -> None:
        """Drop all cached buffers and graphs; waits for the device."""
        self._states.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return all but the cached states, which a copy has to fill itself."""
        return {name: value for name, value in self.__dict__.items() if name != "_states"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._states = CachedStates()


def _tqdm() -> Callable[..., Sequence[int]]:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress: expected tqdm to be installed: pip install tqdm") from error
    bar: Callable[..., Sequence[int]] = tqdm
    return bar
