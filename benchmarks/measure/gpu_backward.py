"""Time the backward pass of a step on a GPU, of every backend with a kernel for it, beside a copy of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import fastguide
from fastguide.step.backends.registry import BACKENDS

from ..workloads import GUIDANCE_SCALE, NUM_STEPS, SCHEDULE, STEP
from .gpu import LARGE, Times, backends, copy_rate, gpu_microseconds


class Backward:
    """The gradients of DDIM's step: of the sample and two predictions, and of the scale if it ``learns``."""

    def __init__(
        self,
        shape: tuple[int, ...],
        state: torch.dtype,
        model: torch.dtype,
        clip: float | None,
        learns: bool,
        device: str = "cuda",
    ) -> None:
        table = fastguide.ddim(SCHEDULE, NUM_STEPS, clip_sample_range=clip).to(device)
        self.came, self.x, self.of_sample = (torch.randn(shape, device=device).to(state) for _ in range(3))
        self.predictions = [torch.randn(shape, device=device).to(model) for _ in range(2)]
        self.of_predictions = [torch.empty_like(p) for p in self.predictions]
        self.clips = clip is not None
        self.of_weights = torch.empty(shape[0], 3, dtype=torch.float64, device=device) if learns else None
        self.rows = table.device_rows(None, torch.float32)
        self.weights = fastguide.ClassifierFree(GUIDANCE_SCALE).weights(self.came.device, torch.float32)

    @property
    def bytes(self) -> int:
        """Bytes to move: each input read once, each gradient written once."""
        tensors = [self.came, self.of_sample, *self.of_predictions]
        tensors += self.predictions if self.clips or self.of_weights is not None else []
        tensors += [self.x] if self.clips else []
        return sum(tensor.nbytes for tensor in tensors)

    def by(self, backend: str) -> Callable[[], None]:
        """Return the backward pass of a backend, into tensors that are there."""
        run = BACKENDS[backend].backward
        assert run is not None
        kept = self.clips or self.of_weights is not None
        x, predictions = (self.x, self.predictions) if kept else (self.came, [self.came] * 2)
        step = (self.came, None, None, x, predictions, self.rows, self.weights, STEP, None, None, None, None)
        gradients = {
            "grad_out": self.came,
            "grad_sample": self.of_sample,
            "grad_predictions": self.of_predictions,
            "grad_weights": self.of_weights,
        }
        return lambda: run(*step, **gradients)


def measure_backward() -> Iterator[dict[str, object]]:
    """Yield the share of the copy's bandwidth that backward passes of large tensors reach."""
    dtypes = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2)
    for (state, model), (clip, learns) in ((d, c) for d in dtypes for c in ((None, False), (1.0, False), (1.0, True))):
        ceiling = copy_rate()
        s = Backward(LARGE, state, model, clip, learns)
        times = Times({name: s.by(name) for name in backends()}, lambda call: gpu_microseconds(call, 5))
        what = ("clipped, " if clip is not None else "") + ("with the scale's gradient" if learns else "")
        yield {
            "name": f"backward {LARGE}, state {state}, model {model}, {what or 'unclipped'}".removesuffix(", "),
            "state": str(state).removeprefix("torch."),
            "bytes": s.bytes,
            "copy_gb_per_s": ceiling,
            "microseconds": times,
            "share_of_copy": {name: s.bytes / t / 1e3 / ceiling for name, t in times.items()},
            "errors": times.errors,
        }
