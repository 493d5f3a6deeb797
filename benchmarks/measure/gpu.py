"""Time guided steps on a GPU beside the ceiling and the rivals of the same run: bandwidth, small steps, host time.

GPU times are taken between two events around a CUDA graph of several steps, so that they hold no launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastguide
from fastguide.step.backends.registry import BACKENDS

from ..contenders.plain_torch import coefficients, straight_lines
from ..workloads import GUIDANCE_SCALE, NUM_STEPS, SCHEDULE, STEP, abar_at
from .timing import in_a_graph

LARGE = (64, 4, 512, 512)  # 268 MB of float32: one tensor alone is larger than any cache
SMALL = [(1, 4, 64, 64), (1, 16, 128, 128)]
NOISES = ("none", "given", "torch", "portable")
SMALL_REPEATS = 50  # of a small step in a graph
CURSOR_STEPS = 1000  # of a loop that is not finished while its steps are timed


class GpuStep:
    """A guided step on the GPU with classifier-free guidance: DDIM without noise, DDPM with noise."""

    def __init__(
        self,
        shape: tuple[int, ...],
        state: torch.dtype,
        model: torch.dtype,
        noise: str,
        *,
        cursor: bool = False,
        device: str = "cuda",
    ) -> None:
        solver = fastguide.ddim if noise == "none" else fastguide.ddpm
        self.table = solver(SCHEDULE, CURSOR_STEPS if cursor else NUM_STEPS).to(device)
        self.noise = noise
        self.sample = torch.randn(shape, device=device).to(state)
        self.uncond, self.cond = (torch.randn(shape, device=device).to(model) for _ in range(2))
        self.out = self.sample if cursor else torch.empty_like(self.sample)
        self.cursor = fastguide.Cursor(device=device).start(self.table) if cursor else None
        self.index = torch.tensor(STEP, device=device)
        self.guidance = fastguide.ClassifierFree(GUIDANCE_SCALE)
        self.given = torch.randn(shape, device=device).to(state) if noise == "given" else None
        self.source: dict[str, Any] = {}
        if noise == "given":
            self.source = {"noise": self.given}
        elif noise == "torch":
            self.source = {"generator": fastguide.DeviceGenerator(0)}
        elif noise == "portable":
            self.source = {"seeds": torch.arange(shape[0], device=device)}

    @property
    def bytes(self) -> int:
        """Bytes to move: each input read once, the output written once."""
        tensors = (self.sample, self.uncond, self.cond, self.out, self.given)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def fastguide(self, backend: str) -> Callable[[], object]:
        """Return the step into ``out`` with a backend."""
        predictions = [self.uncond, self.cond]
        return lambda: fastguide.guided_step(
            self.table,
            self.index if self.cursor is None else self.cursor,
            self.sample,
            predictions,
            self.guidance,
            out=self.out,
            backend=backend,
            **self.source,
        )

    def from_the_start(self, measure: Callable[[Callable[[], object]], float]) -> Callable[..., float]:
        """Return the measurement of a loop that begins now, and does not come to its end meanwhile."""
        cursor = self.cursor or fastguide.Cursor(device=self.sample.device)

        def measured(call: Callable[[], object]) -> float:
            cursor.start(self.table)
            found = measure(call)
            if int(cursor.state[0, 0]) >= len(self.table):
                raise RuntimeError("the loop was finished while its steps were timed; expected more steps in its table")
            return found

        return measured

    def compiled(self) -> Callable[[], object]:
        """Return the formula under torch.compile into ``out``, with torch.randn_like where the step draws its noise."""
        torch._dynamo.reset()  # otherwise torch.compile would reach its limit of recompilations
        draws, given, out = self.noise in ("torch", "portable"), self.given, self.out
        noisy = self.noise != "none"
        function = straight_lines("ddpm" if noisy else "ddim", 2, ["noise"] * noisy, out=True)
        row = torch.tensor(coefficients(*abar_at(NUM_STEPS, STEP)), device="cuda")

        @torch.compile(fullgraph=True, dynamic=False)
        def step(row: Tensor, x: Tensor, uncond: Tensor, cond: Tensor) -> None:
            noise = [torch.randn_like(x) if draws else given] if noisy else []
            function(row, x, uncond, cond, *noise, out)

        return lambda: step(row, self.sample, self.uncond, self.cond)


def plain_triton(s: GpuStep) -> Callable[[], object] | None:
    """Return the shortest Triton kernel that moves the bytes of a DDIM step; None without Triton."""
    if not BACKENDS["triton"].serves("cuda"):
        return None
    from ..contenders.plain_triton import plain_step

    return lambda: plain_step(s.out, s.sample, s.uncond, s.cond, GUIDANCE_SCALE)


def gpu_microseconds(call: Callable[[], object], repeats: int) -> float:
    """Return the microseconds of one call among ``repeats`` in a captured graph."""
    return 1e6 * in_a_graph(call, repeats)


@torch.no_grad()
def host_microseconds(call: Callable[[], object], calls: int = 300) -> float:
    """Return the median microseconds until a call returns, with never more than 20 calls in the GPU's queue."""
    times = []
    for i in range(calls):
        if i % 20 == 0:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times[20:]) * 1e6


def copy_rate() -> float:
    """Return the GB/s, read and written, of a copy from device to device: the ceiling."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_microseconds(lambda: target.copy_(source), 5) / 1e3


def backends() -> list[str]:
    """Return the backends with a kernel of their own that run on this GPU."""
    return [name for name in ("native", "triton") if BACKENDS[name].serves("cuda")]


class Times(dict[str, float]):
    """Microseconds by contender; the exception of a contender is in ``errors`` instead."""

    def __init__(self, calls: dict[str, Callable[[], object]], measure: Callable[[Callable[[], object]], float]):
        self.errors: dict[str, str] = {}
        for name, call in calls.items():
            try:
                self[name] = measure(call)
            except Exception as error:  # any exception of a compiler or a capture goes into the record
                self.errors[name] = f"{type(error).__name__}: {str(error)[:500]}"


def contenders(s: GpuStep) -> dict[str, Callable[[], object]]:
    """Return our backends, torch.compile and, for a step without noise, plain Triton."""
    calls = {name: s.fastguide(name) for name in backends()}
    calls["torch.compile"] = s.compiled()
    plain = plain_triton(s) if s.noise == "none" else None
    return calls if plain is None else calls | {"plain triton": plain}


def measure_large() -> Iterator[dict[str, object]]:
    """Yield the share of the copy's bandwidth that steps of more than 256 MB reach."""
    for state, model in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2):
        for noise in NOISES:
            ceiling = copy_rate()
            s = GpuStep(LARGE, state, model, noise)
            times = Times(contenders(s), lambda call: gpu_microseconds(call, 5))
            yield {
                "name": f"large {LARGE}, state {state}, model {model}, noise {noise}",
                "noise": noise,
                "state": str(state).removeprefix("torch."),
                "bytes": s.bytes,
                "copy_gb_per_s": ceiling,
                "microseconds": times,
                "share_of_copy": {name: s.bytes / t / 1e3 / ceiling for name, t in times.items()},
                "errors": times.errors,
            }


def measure_small() -> Iterator[dict[str, object]]:
    """Yield the GPU time of a small step in a graph and the host time of an eager one."""
    for shape in SMALL:
        for noise in NOISES:
            s = GpuStep(shape, torch.float32, torch.bfloat16, noise)
            calls = contenders(s)
            times, hosts = (
                Times(calls, lambda call: gpu_microseconds(call, SMALL_REPEATS)),
                Times(calls, host_microseconds),
            )
            yield {
                "name": f"small {shape}, noise {noise}",
                "noise": noise,
                "gpu_microseconds": times,
                "host_microseconds": hosts,
                "errors": times.errors | {f"{name}, host": error for name, error in hosts.errors.items()},
            }


def measure_cursor() -> Iterator[dict[str, object]]:
    """Yield the same of a small step whose row a cursor on the device gives and advances: the sampler's own step."""
    for noise in ("none", "torch", "portable"):
        s = GpuStep(SMALL[0], torch.float32, torch.bfloat16, noise, cursor=True)
        calls = {name: s.fastguide(name) for name in backends()}
        times = Times(calls, s.from_the_start(lambda call: gpu_microseconds(call, SMALL_REPEATS)))
        hosts = Times(calls, s.from_the_start(host_microseconds))
        yield {
            "name": f"small {SMALL[0]}, noise {noise}, cursor",
            "noise": noise,
            "gpu_microseconds": times,
            "host_microseconds": hosts,
            "errors": times.errors | {f"{name}, host": error for name, error in hosts.errors.items()},
        }


def measure_torch_generator() -> dict[str, float]:
    """Return the host time of a step whose kernel draws the noise of a torch.Generator."""
    s = GpuStep(SMALL[0], torch.float32, torch.bfloat16, "torch")
    s.source = {"generator": torch.Generator("cuda").manual_seed(0)}
    return {name: host_microseconds(s.fastguide(name)) for name in backends()}
