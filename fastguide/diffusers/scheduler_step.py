"""One step of a diffusers scheduler by the fused kernel: what all schedulers share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..guidance import Classifier, ClassifierFree, Guidance
from ..schedules.predictions import GradientForm
from ..solvers import VarianceType
from ..solvers.table import StepTable
from ..step.guided_step import guided_step
from ..step.memory import empty_like
from ..step.noise import DeviceGenerator
from .lazy_guidance import Deferred, Output

Generators = torch.Generator | list[torch.Generator] | DeviceGenerator | None
Scale = float | Sequence[float] | Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GUIDANCES_KEPT = 64


class FusedStep:
    """Mixed into a scheduler: its tables, a timestep's row, guidance, noise and outputs.

    A table has a row for every training timestep. Where a timestep is on a GPU, the kernel finds the row there; one
    that ``for t in scheduler.timesteps`` gives is known to the host by its place in that tensor.
    """

    _output: Any
    _rows_exist: bool
    timesteps: Tensor
    num_inference_steps: int | None
    config: Any

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> FusedStep:
        """An instance calls itself diffusers' own, so that a pipeline that is saved loads without fastguide."""
        scheduler = super().__new__(cls)
        if cls.__module__.startswith("fastguide."):
            own = next(c.__module__ for c in cls.__mro__ if c.__module__.startswith("diffusers."))
            scheduler.__dict__["__module__"] = own
        return scheduler

    variance_type: str = "fixed_small"
    alphas_cumprod: Tensor

    # ---- Tables ----

    def _state(self) -> tuple[Any, ...]:
        """All that the rows depend on, but the arguments of a step."""
        raise NotImplementedError

    def _transitions(self, *arguments: Any) -> StepTable:
        raise NotImplementedError

    def _table(self, device: torch.device, *arguments: Any) -> StepTable:
        """The table for these arguments, of the state that ``_tables_now`` has seen."""
        tables: dict[Any, StepTable] = self.__dict__["_tables"]
        table = tables.get((device, *arguments))
        if table is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"step: torch.compile does not make the table for these arguments, {arguments}; make one step with "
                    "them before it is compiled"
                )
            table = tables[(device, *arguments)] = self._transitions(*arguments).to(device)
        return table

    def _tables_now(self) -> None:
        """Forget the tables if the scheduler's state is another than they were made of."""
        state, known = self._state(), self.__dict__.get("_known_state")
        compiling = torch.compiler.is_compiling()
        if (
            known is not None
            and all(map(operator.is_, state, known[0]))
            and (compiling or known[1] == _versions(self.alphas_cumprod, self.timesteps))
        ):
            return
        written = None if compiling else _versions(self.alphas_cumprod, self.timesteps)
        self.__dict__.update(_known_state=(state, written), _tables={}, _rows_exist=self._has_rows())

    def _remember(self, device: str | torch.device | None, *arguments: Any) -> None:
        """After diffusers has set the timesteps on the host: note them, move them, and make the tables for them now.

        ``arguments``: of a step as it is by default; steps of others, once made, are prepared for as well.
        """
        self._host_timesteps()
        if device is not None:
            known = self.__dict__["_known_timesteps"]
            self.timesteps = self.timesteps.to(device)
            self.__dict__["_known_timesteps"] = (self.timesteps, known[1], _versions(self.timesteps))
        seen = {key[1:] for key in self.__dict__.get("_tables", ())}
        self._tables_now()
        for kind in {arguments, *seen} if self._rows_exist else ():
            self._table(self.timesteps.device, *kind)

    def _host_timesteps(self) -> tuple[int, ...]:
        """The values of ``timesteps``; read from a device only if they did not come from ``set_timesteps``."""
        known = self.__dict__.get("_known_timesteps")
        version = None if torch.compiler.is_compiling() else _versions(self.timesteps)
        if known is None or known[0] is not self.timesteps or (version and known[2] != version):
            known = self.__dict__["_known_timesteps"] = (self.timesteps, tuple(self.timesteps.tolist()), version)
        values: tuple[int, ...] = known[1]
        return values

    def _row(self, timestep: int | Tensor, sample: Tensor) -> int | Tensor:
        """A timestep's row: a number if the host knows it, else an index for the kernel."""
        device = sample.device
        if not isinstance(timestep, Tensor):
            if torch.compiler.is_compiling():  # else a graph for each timestep
                return torch.full((), timestep, dtype=torch.int64, device=device)
            if isinstance(timestep, bool) or not hasattr(timestep, "__index__"):
                raise TypeError(f"timestep: expected an int or an int64 tensor, got {timestep!r}")
            number: int = operator.index(timestep)
            return number
        if timestep.dim() and timestep.numel() == 1:  # of every sample, as diffusers takes it
            timestep = timestep.reshape(())
        if timestep.is_floating_point() or timestep.dim() > 1:
            got = f"{timestep.dtype} of shape {tuple(timestep.shape)}"
            raise TypeError(f"timestep: expected int64 of shape () or (batch,), got {got}")
        if timestep.dim() == 1:
            if len(timestep) != len(sample):
                raise ValueError(f"timestep: expected shape () or ({len(sample)},), got {tuple(timestep.shape)}")
            if timestep.device.type == "cpu" and not torch.compiler.is_compiling():
                bad = [value for value in timestep.tolist() if not 0 <= value < len(self.alphas_cumprod)]
                if bad:
                    raise IndexError(f"timestep: expected 0 to {len(self.alphas_cumprod) - 1}, got {bad[0]}")
        if timestep.dim() == 0 and not torch.compiler.is_compiling():
            if timestep.device.type == "cpu":
                return int(timestep)
            of = self.timesteps
            if timestep.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() and timestep.dtype == of.dtype:
                place, rest = divmod(int(timestep.storage_offset() - of.storage_offset()), of.stride(0) or 1)
                if rest == 0 and 0 <= place < len(of):
                    return self._host_timesteps()[place]
        return timestep.to(device, torch.int64)

    # ---- One step ----

    def _step(
        self,
        table: StepTable,
        row: int | Tensor,
        model_output: Output,
        sample: Tensor,
        generator: Generators,
        noise: Tensor | None,
        draws: bool,
        return_dict: bool,
        guidance: Guidance | None,
        gradient: Tensor | None,
    ) -> Any:
        """The fused step; ``draws`` says whether diffusers would draw noise here."""
        sample = sample if sample.is_contiguous() or _dense(sample) else sample.contiguous()
        first = model_output if isinstance(model_output, Tensor) else model_output[0]
        predictions: Tensor | list[Tensor]
        variance = None
        if first.shape[1:] != sample.shape[1:]:  # twice the channels
            parts, channels = _parts(model_output, guidance), sample.shape[1]
            predictions = [_laid_out(part[:, :channels], sample) for part in parts]
            if table.learned_variance:
                variance = _laid_out(parts[-1][:, channels:], sample)
        elif first is model_output and _same_layout(first, sample):
            predictions = first
        else:
            predictions = [_laid_out(part, sample) for part in _parts(model_output, guidance)]
        if gradient is not None:
            gradient = _laid_out(gradient, sample)

        dtype = sample.dtype if sample.dtype == first.dtype else torch.promote_types(sample.dtype, first.dtype)
        sample = sample.double() if dtype == torch.float64 else sample
        source: dict[str, Any] = {}
        if noise is not None:
            source["noise"] = _laid_out(noise, sample)
        elif draws:
            source = self._noise(table, row, generator, sample, first.dtype)
        out = None if dtype == sample.dtype else empty_like(sample, dtype)
        arguments = (table, row, sample, predictions, guidance)
        others: dict[str, Any] = {"gradient": gradient, "variance": variance}
        step: Callable[..., Any] = guided_step
        if torch.compiler.is_compiling():
            original = empty_like(sample if out is None else out)
            result = step(*arguments, **others, **source, out=out, original=original)
            return self._output.plain(result, original) if return_dict else (result, original)
        if sample.is_inference() or first.is_inference() or (gradient is not None and gradient.is_inference()):
            # torch does not count who writes to them, so that what is not computed now may be lost
            original = empty_like(sample if out is None else out)
            result = step(*arguments, **others, **source, out=out, original=original)
            return self._output.plain(result, original) if return_dict else (result, original)
        result = step(*arguments, **others, **source, out=out)
        index = row if isinstance(row, Tensor) else None
        versions = _versions(sample, predictions, gradient, index)

        def predicted_original() -> Tensor:
            if _versions(sample, predictions, gradient, index) != versions:
                raise RuntimeError(
                    "pred_original_sample: expected the inputs of its step as they were, got one changed"
                )
            spare = torch.empty_like(result)  # the noise is of no consequence to x_0
            original = empty_like(result)
            step(*arguments, **others, noise=sample, out=spare, original=original)
            return original

        if return_dict:
            return self._output(result, predicted_original)
        return result, Deferred.of(result, predicted_original)

    def _noise(
        self, table: StepTable, row: int | Tensor, generator: Generators, sample: Tensor, dtype: torch.dtype
    ) -> dict[str, Any]:
        """Where the step's noise comes from, so that it is what diffusers draws."""
        if isinstance(generator, DeviceGenerator):
            return {"generator": generator}
        if isinstance(generator, list) and len(generator) == 1:
            generator = generator[0]
        adds = table.adds_noise_anywhere if isinstance(row, Tensor) else table.adds_noise[row]
        if adds and dtype == sample.dtype and not torch.compiler.is_compiling():
            if generator is None and sample.device.type == "cpu":
                return {"generator": torch.default_generator}
            if generator is None and sample.device.type == "cuda":
                return {"generator": torch.cuda.default_generators[sample.device.index]}
            if isinstance(generator, torch.Generator) and generator.device.type == sample.device.type:
                return {"generator": generator}
        noise = randn_tensor(tuple(sample.shape), generator=generator, device=sample.device, dtype=dtype)
        return {"noise": _laid_out(noise, sample)} if adds else {}  # drawn all the same: the generator moves on

    def _serves(self, model_output: Output, sample: Tensor, *others: Tensor | None) -> bool:
        """Whether there are rows, and the kernel takes these tensors."""
        self._tables_now()
        if not self._rows_exist or sample.dim() == 0 or _under_a_transform():
            return False
        device, grad = sample.device, torch.is_grad_enabled()
        for tensor in (sample, *(model_output if isinstance(model_output, tuple) else (model_output,)), *others):
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES or tensor.device != device:
                return False
            if (grad and tensor.requires_grad) or (tensor.dtype == torch.float64 and device.type != "cpu"):
                return False
        return all(other is None or other.shape == sample.shape for other in others)

    def _has_rows(self) -> bool:
        """Whether the configuration is one that rows say: a threshold is none, and diffusers has words for the rest."""
        config = self.config
        steps = self.num_inference_steps
        return (
            not config.get("thresholding")
            and (steps is None or (isinstance(steps, int) and steps > 0))
            and config.prediction_type in ("epsilon", "sample", "v_prediction")
            and (not config.clip_sample or config.clip_sample_range > 0)
            and self.variance_type in get_args(VarianceType)
            and config.get("variance_type", self.variance_type) == self.variance_type
            and all(0 <= timestep < len(self.alphas_cumprod) for timestep in self._host_timesteps())
        )

    def _is_defined(self, table: StepTable, row: int | Tensor) -> bool:
        return isinstance(row, Tensor) or (0 <= row < len(table) and row not in table.undefined_rows)

    def _fits(self, model_output: Output, sample: Tensor, guidance: Guidance | None, twice: bool) -> bool:
        """Whether the output has the sample's shape, as often as guidance weighs it; ``twice``: or double channels."""
        if isinstance(model_output, tuple):
            return all(part.shape == sample.shape for part in model_output) and not self._learns()
        got, expected = model_output.shape, sample.shape  # their batches agree with the guidance
        if got[1:] == expected[1:]:
            return (got[0] == expected[0] or guidance is not None) and not self._learns()
        doubled = len(expected) > 1 and got[1:] == (2 * expected[1], *expected[2:])
        return twice and doubled and (got[0] == expected[0] or guidance is not None)

    def _learns(self) -> bool:
        return self.variance_type.startswith("learned")

    # ---- Guidance ----

    def _guidance(
        self,
        model_output: Output,
        sample: Tensor,
        guidance_scale: Scale | None,
        gradient: Tensor | None,
        gradient_scale: Scale,
        gradient_form: GradientForm,
    ) -> Guidance | None:
        """Weights for the step, and a check that the output is doubled exactly where they expect it."""
        batch = len(sample) if sample.dim() else 0
        doubled = isinstance(model_output, tuple) or model_output.shape[:1] == (2 * batch,)
        if batch == 0:
            doubled = guidance_scale is not None
        if gradient is None:
            if gradient_form != "epsilon" or type(gradient_scale) not in (int, float) or gradient_scale != 1:
                raise ValueError("gradient_scale, gradient_form: expected gradient= with them, got None")
        elif not isinstance(gradient, Tensor) or not gradient.is_floating_point():
            got = gradient.dtype if isinstance(gradient, Tensor) else type(gradient).__name__
            raise TypeError(f"gradient: expected a tensor of floating-point numbers, got {got}")
        elif gradient.shape != sample.shape:
            raise ValueError(
                f"gradient: expected {tuple(sample.shape)}, the sample's shape, got {tuple(gradient.shape)}"
            )
        if isinstance(guidance_scale, Tensor) and guidance_scale.dim() > 1:  # (batch, 1, ...), as it is multiplied
            if guidance_scale.shape != (batch, *[1] * (guidance_scale.dim() - 1)):
                raise ValueError(
                    f"guidance_scale: expected a number, shape ({batch},) or ({batch}, 1, ...), got "
                    f"{tuple(guidance_scale.shape)}"
                )
            guidance_scale = guidance_scale.reshape(-1)
        if doubled != (guidance_scale is not None):
            assert isinstance(model_output, Tensor)
            shapes = f"got shapes {tuple(model_output.shape)} and {tuple(sample.shape)}"
            if doubled:
                raise ValueError(
                    f"model_output: expected the sample's batch, or guidance_scale= with twice that batch; {shapes}"
                )
            raise ValueError(
                "model_output: expected twice the sample's batch with guidance_scale=, [unconditional, conditional]; "
                f"{shapes}"
            )
        if guidance_scale is None and gradient is None:
            return None
        if gradient is None and type(guidance_scale) is float:
            known: Guidance | None = self.__dict__.get("_guidances", {}).get((guidance_scale, False))
            if known is not None:
                return known
        key = (guidance_scale, gradient is not None and (gradient_scale, gradient_form))
        plain = isinstance(guidance_scale, (int, float, type(None))) and isinstance(gradient_scale, (int, float))
        kept: dict[Any, Guidance] = self.__dict__.setdefault("_guidances", {})
        guidance = kept.get(key) if plain else None
        if guidance is None:
            classifier = None if gradient is None else _classifier(gradient_scale, gradient_form)
            free = None if guidance_scale is None else ClassifierFree(guidance_scale)
            guidance = free + classifier if free is not None and classifier is not None else free or classifier
            assert guidance is not None
            if plain:
                if len(kept) >= _GUIDANCES_KEPT:
                    kept.clear()
                kept[key] = guidance
        return guidance

    def _combined(
        self, model_output: Output, sample: Tensor, guidance_scale: Scale | None, gradient: Tensor | None
    ) -> Tensor:
        """The guided output for diffusers' own step."""
        if gradient is not None:
            raise ValueError(
                "gradient: expected None for a step that is left to diffusers (dynamic thresholding, autograd, shapes "
                "that broadcast), got a tensor"
            )
        if isinstance(model_output, Tensor) and guidance_scale is None:
            return model_output
        uncond, cond = model_output if isinstance(model_output, tuple) else model_output.chunk(2)
        scale = torch.as_tensor(guidance_scale, device=cond.device)
        scale = scale.reshape(-1, *[1] * (cond.dim() - 1)) if scale.dim() else scale
        guided = uncond + scale * (cond - uncond)
        channels = sample.shape[1] if sample.dim() > 1 else 0
        if channels and cond.shape[1:2] == (2 * channels,):
            guided = guided[:, :channels]
            if self._learns():  # the conditional prediction's variance
                guided = torch.cat([guided, cond[:, channels:]], 1)
        return guided.to(cond.dtype)


class HostAlphas:
    """Mixed into the schedulers whose methods move ``alphas_cumprod`` to a device, and would leave it there."""

    alphas_cumprod: Tensor

    def _with_alphas_there(self, name: str, tensor: Tensor, *arguments: Any) -> Tensor:
        here = self.alphas_cumprod
        known = self.__dict__.get("_alphas_elsewhere")
        if known is None or known[0] is not here or known[1].device != tensor.device:
            known = self.__dict__["_alphas_elsewhere"] = (here, here.to(tensor.device))
        self.alphas_cumprod = known[1]
        try:
            result: Tensor = getattr(super(), name)(tensor, *arguments)
        finally:
            self.alphas_cumprod = here  # on the host, where rows are computed
        return result

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As diffusers', but that ``alphas_cumprod`` stays where it is."""
        return self._with_alphas_there("add_noise", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As diffusers', but that ``alphas_cumprod`` stays where it is."""
        return self._with_alphas_there("get_velocity", sample, noise, timesteps)


def _under_a_transform() -> bool:
    """Whether torch.func or forward-mode differentiation sees more in a tensor than its values."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


def _classifier(gradient_scale: Scale, gradient_form: GradientForm) -> Classifier:
    if gradient_form not in get_args(GradientForm):
        raise ValueError(f"gradient_form: expected one of {get_args(GradientForm)}, got {gradient_form!r}")
    try:
        return Classifier(None, gradient_scale, gradient_form)
    except (TypeError, ValueError) as error:  # there it is the guidance's only scale
        raise type(error)(str(error).replace("guidance_scale", "gradient_scale")) from None


def _parts(model_output: Output, guidance: Guidance | None) -> Sequence[Tensor]:
    """The predictions, one after the other."""
    if isinstance(model_output, tuple):
        return model_output
    copies = 1 if guidance is None else guidance.num_predictions
    parts: Sequence[Tensor] = model_output.unflatten(0, (copies, model_output.shape[0] // copies)).unbind(0)
    return parts


def _versions(*tensors: Tensor | list[Tensor] | None) -> list[Any]:
    """How often each was written to, where torch counts that."""
    versions: list[Any] = []
    for t in tensors:
        if isinstance(t, Tensor):
            versions.append(None if t.is_inference() else t._version)
        else:
            versions.append(t and _versions(*t))
    return versions


def _dense(sample: Tensor) -> bool:
    """Whether the elements of one sample fill one block of memory."""
    expected = 1
    for stride, size in sorted(zip(sample.stride()[1:], sample.shape[1:], strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _same_layout(tensor: Tensor, sample: Tensor) -> bool:
    inner = tensor.stride()[1:]
    return inner == sample.stride()[1:] or (tensor.is_contiguous() and sample.is_contiguous())


def _laid_out(tensor: Tensor, sample: Tensor) -> Tensor:
    """The tensor in the sample's layout; copied only if it has another."""
    if _same_layout(tensor, sample):
        return tensor
    return torch.empty_like(sample, dtype=tensor.dtype).copy_(tensor)
