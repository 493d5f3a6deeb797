"""Make one step of a diffusers scheduler with the fused kernel: ``plan`` it, then ``run`` it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor

from ..guidance import Guidance
from ..schedules.predictions import GradientForm
from ..solvers import StepTable
from ..solvers.ddpm import VarianceType
from ..step.guided_step import guided_step
from ..step.inpainting import Inpainting
from ..step.memory import dense, empty_like, in_layout_of
from ..step.noise import DeviceGenerator
from ..step.repeat import token_of
from . import torch_rules as torch_rules  # the rules, which are set by its import
from .fitted import SHAPES, fitted_predictions, refusal_of
from .guidance_arguments import Scale, guidance_of, is_by_value
from .lazy_guidance import resolved
from .lazy_outputs import LazyOriginal
from .lazy_tensor import plain
from .noise import Generators, noise_of
from .saved_as import SavedAsDiffusers
from .tables import TableCache, current_tables, is_defined, prepare_tables, table_of
from .timesteps import HostTimesteps, move_timesteps, row_of
from .traced import Fusion
from .weights_of_formula import Ahead, Conversion


class SchedulerStep(metaclass=SavedAsDiffusers):
    """Mix this into a scheduler of diffusers: ``plan`` asks it for tables and state, and it holds the caches.

    A class also has ``set_timesteps``, which calls ``_timesteps_are_set``, and ``step``, which calls ``plan`` and
    ``run``.
    """

    _output: Any
    """The type of what ``step`` returns, from lazy_outputs."""
    _transitions: Callable[..., StepTable]
    """The method that makes the table for the arguments of a step that rows depend on."""
    _state: tuple[str, ...]
    """The names of the attributes that rows depend on; diffusers' ``config`` returns the first."""
    _read_state: Callable[[dict[str, Any]], tuple[Any, ...]]
    """The function that reads them from ``__dict__``, which takes a third of the time."""
    _loop: Any = None
    """The function of tables that makes a whole loop's table, for ``step_table``; ``None``: there is none."""
    _steps_before_set_timesteps = False
    """Whether diffusers' scheduler makes steps before its timesteps are set."""
    _prediction_types: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    _variance_types: tuple[str, ...] = get_args(VarianceType)
    """Those that diffusers' scheduler knows; it says what is wrong with others."""

    # diffusers' config mixin answers for an attribute that is missing, and copies are made without __init__: so both
    # caches begin as attributes of the class
    _table_cache: TableCache | None = None
    _timesteps_cache: HostTimesteps | None = None
    _last_plan: tuple[Any, ...] | None = None
    """The fields of ``LastPlan``."""
    _noisings: Any = None
    """What noises samples, see ``noising``, and the tables that it was made of."""
    _fusion: Fusion | None = None
    """Of the pipeline that ``accelerate`` has put it into."""
    _before: Any = None
    """diffusers' scheduler, in whose place ``accelerate`` has put it."""

    if TYPE_CHECKING:

        def __init__(self, *arguments: Any, **keywords: Any) -> None: ...  # diffusers', of each class

    variance_type: str = "fixed_small"
    alphas_cumprod: Tensor
    timesteps: Tensor
    num_inference_steps: int | None
    config: Any

    def _table_state(self) -> tuple[Any, ...]:
        """Return all that the rows depend on, but the arguments of a step; compared by identity."""
        return tuple([getattr(self, name) for name in self._state])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what only saves time, and may hold what cannot be copied, as a GPU's events."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_last_plan", "_noisings")}

    def _linked_timesteps(self) -> tuple[int, ...] | None:
        """Return the timesteps that steps lead along, from one to the next; ``None``: steps lead from any timestep."""
        return None

    def _timesteps_are_set(self, device: str | torch.device | None, *arguments: Any) -> None:
        """Move the timesteps, which diffusers has set on the host, and make their tables now, ahead of the loop.

        ``arguments``: of a step as it is by default; tables of other arguments, once used, are made as well.
        """
        move_timesteps(self, device)
        prepare_tables(self, arguments)
        if self._fusion is not None:
            self._fusion.begin()


class Plan(NamedTuple):
    """One fused step: what ``guided_step`` is called with, and what is made of its result."""

    table: StepTable
    row: int | Tensor
    sample: Tensor
    predictions: Tensor | list[Tensor]
    guidance: Guidance | None
    gradient: Tensor | None
    variance: Tensor | None
    model_dtype: torch.dtype
    """The model output's, in which diffusers draws noise."""
    dtype: torch.dtype
    """The result's, to which diffusers promotes model output and sample."""
    output_type: Any
    """From lazy_outputs."""
    inpainting: Inpainting | None = None
    returns_prediction: bool = False
    """Whether the model predicts x_0, which diffusers returns in the dtype that it has."""

    @property
    def dtype_of_original(self) -> torch.dtype:
        """The x_0's."""
        return self.model_dtype if self.returns_prediction else self.dtype

    def inputs_of_original(self) -> list[Tensor]:
        """Return the tensors that the predicted x_0 depends on."""
        inputs = [self.sample]
        inputs += self.predictions if isinstance(self.predictions, list) else (self.predictions,)
        if self.gradient is not None:
            inputs.append(self.gradient)
        if isinstance(self.row, Tensor):
            inputs.append(self.row)
        return inputs


class LastPlan(NamedTuple):
    """What a scheduler's last planned step and those like it have in common, but their tensors: see ``repeat``."""

    arguments: tuple[Any, ...]
    """Of ``step``, those that rows depend on."""
    guidance_scale: Any
    """A number, the weights of several predictions, or ``None``."""
    state: tuple[Any, ...]
    versions: Any
    """``TableCache``'s."""
    table: StepTable
    guidance: Guidance | None
    table_token: object
    guidance_token: Any
    returns_prediction: bool

    @classmethod
    def of(
        cls,
        cache: TableCache,
        arguments: tuple[Any, ...],
        scale: Any,
        table: StepTable,
        guidance: Guidance | None,
        returns_prediction: bool,
    ) -> LastPlan:
        """Return what steps with this table and guidance have in common."""
        tokens = table._token, token_of(guidance)
        return cls(arguments, scale, cache.state, cache.versions, table, guidance, *tokens, returns_prediction)


def plan(
    scheduler: SchedulerStep,
    arguments: tuple[Any, ...] | None,
    model_output: Tensor,
    timestep: int | Tensor,
    sample: Tensor,
    noise: Tensor | None = None,
    guidance_scale: Scale | None = None,
    gradient: Tensor | None = None,
    gradient_scale: Scale = 1.0,
    gradient_form: GradientForm = "epsilon",
) -> Plan | None:
    """Plan a scheduler's fused step; ``None``: it is left to diffusers' own ``step``.

    Args:
        scheduler: whose step it is.
        arguments: of ``step``, those that the scheduler's rows depend on; ``None``: rows do not express them.
        model_output, timestep, sample, noise, guidance_scale, gradient, gradient_scale, gradient_form: as
            ``DDIMScheduler.step`` takes them.

    Raises:
        TypeError, ValueError, IndexError: an argument that diffusers does not know is not as described.
    """
    output, guidance_scale = resolved(model_output, sample, guidance_scale)
    if type(sample) is not Tensor or gradient is not None or noise is not None:
        sample, gradient, noise = plain(sample), plain(gradient), plain(noise)
    guidance = guidance_of(output, sample, guidance_scale, gradient, gradient_scale, gradient_form)
    if arguments is None:
        count(scheduler, LEFT + "an eta that is not from 0 to 1, or noise besides a generator")
        return None
    cache = current_tables(scheduler)
    refusal = cache.refusal or refusal_of(sample, output, gradient, noise)
    if refusal is not None:
        count(scheduler, LEFT + refusal)
        return None
    row = row_of(scheduler, timestep, sample)
    table = table_of(scheduler, cache, sample.device, arguments)
    sample = dense(sample)
    fitted = fitted_predictions(output, sample, guidance, table.learned_variance)
    if fitted is None:
        count(scheduler, LEFT + SHAPES)
        return None
    if not is_defined(scheduler, table, row):
        count(scheduler, LEFT + "a timestep that leads nowhere")
        return None
    predictions, variance = fitted
    if gradient is not None:
        gradient = in_layout_of(sample, gradient)
    model_dtype = output.dtype
    dtype = sample.dtype if sample.dtype == model_dtype else torch.promote_types(sample.dtype, model_dtype)
    if dtype == torch.float64:
        sample = sample.double()
    count_fused(scheduler, guidance, is_last=is_last_row(scheduler, row))
    returns = scheduler.config.get("prediction_type") == "sample"
    if not torch.compiler.is_compiling():
        repeatable = gradient is None and is_by_value(guidance_scale)
        last = LastPlan.of(cache, arguments, guidance_scale, table, guidance, returns) if repeatable else None
        scheduler._last_plan = None if last is None else tuple(last)  # a plain tuple is unpacked faster
    return Plan(
        table, row, sample, predictions, guidance, gradient, variance, model_dtype, dtype, scheduler._output,
        returns_prediction=returns,
    )  # fmt: skip


def count_fused(scheduler: SchedulerStep, guidance: Guidance | None, *, is_last: bool) -> None:
    """Count a fused step, for ``Acceleration.counts``; after the last one of a run, outputs are not traced."""
    count(scheduler, counted_as(guidance))
    if is_last and scheduler._fusion is not None:
        scheduler._fusion.tries = False


def counted_as(guidance: Guidance | None) -> str:
    """Return what ``Acceleration.counts`` calls a fused step with this guidance."""
    guided = guidance is not None and (guidance.num_predictions > 1 or guidance.classifier is not None)
    guided = (guided and not isinstance(guidance, Conversion)) or isinstance(guidance, Ahead)
    return "fused with guidance" if guided else "fused without guidance"


def is_last_row(scheduler: SchedulerStep, row: int | Tensor) -> bool:
    """Tell whether a row is that of the last timestep that is set, as far as the host knows."""
    cache = scheduler._timesteps_cache
    return cache is not None and len(cache.values) > 0 and isinstance(row, int) and row == cache.values[-1]


def count(scheduler: SchedulerStep, what: str) -> None:
    """Count a step, by what was done, for ``Acceleration.counts``."""
    if scheduler._fusion is not None and not torch.compiler.is_compiling():
        scheduler._fusion.count_step(what)


LEFT = "left to diffusers: "
"""What a count of such steps begins with; the reason follows."""


def run(planned: Plan, generator: Generators, noise: Tensor | None, draws: bool, return_dict: bool) -> Any:
    """Make a planned step, and return what diffusers' ``step`` returns; x_0 is predicted when it is read.

    Args:
        planned: from ``plan``.
        generator: as in diffusers, or a ``DeviceGenerator``.
        noise: standard normal values in the place of a generator's.
        draws: whether diffusers draws noise at this step.
        return_dict: whether to return diffusers' output type, or a tuple.
    """
    table, row, sample = planned.table, planned.row, planned.sample
    source: torch.Generator | DeviceGenerator | None = None
    if noise is not None:
        noise = in_layout_of(sample, noise)
    elif draws:
        adds = table.adds_noise_anywhere if isinstance(row, Tensor) else table.adds_noise[row]
        noise, source = noise_of(generator, sample, planned.model_dtype, adds=adds)
    out = None if planned.dtype == sample.dtype else empty_like(sample, planned.dtype)
    inputs = planned.inputs_of_original()
    if torch.compiler.is_compiling() or any(map(Tensor.is_inference, inputs)):
        # torch does not count who writes to an inference tensor: what is not computed now may be lost
        original = empty_like(sample, planned.dtype_of_original)
        result = _guided_step(planned, noise, source, out, original)
        return planned.output_type.plain(result, original) if return_dict else (result, original)
    result, versions = _guided_step(planned, noise, source, out), tuple(tensor._version for tensor in inputs)

    def original_later() -> Tensor:
        return predict_original(planned, result, inputs, versions)

    if return_dict:
        return planned.output_type(result, original_later)
    return result, LazyOriginal.of(result, original_later, planned.dtype_of_original)


def _guided_step(
    planned: Plan,
    noise: Tensor | None,
    generator: torch.Generator | DeviceGenerator | None,
    out: Tensor | None,
    original: Tensor | None = None,
) -> Tensor:
    """Call the kernel as planned."""
    return guided_step(
        planned.table,
        planned.row,
        planned.sample,
        planned.predictions,
        planned.guidance,
        gradient=planned.gradient,
        variance=planned.variance,
        noise=noise,
        generator=generator,
        inpainting=planned.inpainting,
        original=original,
        out=out,
    )


def predict_original(planned: Plan, result: Tensor, inputs: list[Tensor], versions: tuple[int, ...]) -> Tensor:
    """Predict the x_0 of a step that was made.

    Args:
        planned: the step.
        result: its next sample.
        inputs: what its x_0 depends on.
        versions: how often each of these had been written to when the step was made.

    Raises:
        RuntimeError: one has been written to since.
    """
    if tuple(tensor._version for tensor in inputs) != versions:
        raise RuntimeError("pred_original_sample: expected the inputs of its step as they were, got one changed")
    # The next sample is computed again and dropped, so that any noise will do
    original = empty_like(result, planned.dtype_of_original)
    _guided_step(planned._replace(inpainting=None), planned.sample, None, empty_like(result), original)
    return original
