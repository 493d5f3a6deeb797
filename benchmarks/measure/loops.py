"""Time whole loops beside diffusers': small models, whose loops wait for the host, and a large one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastguide import ClassifierFree, NoiseSchedule, Sampler, ddim, ddpm

from ..contenders.registry import is_ours
from .timing import Times, describe, in_turns

SCALE = 7.5
MODELS: dict[str, dict[str, Any]] = {  # a robot's policy, two with many launches, one that keeps a device busy
    "policy": {"cross_attention_dim": 32},
    "tiny UNet": {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32},
    "small DiT": {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "cross_attention_dim": 64},
    "large UNet": {"block_out_channels": (320, 640), "layers_per_block": 2, "cross_attention_dim": 768},
}
LATENTS = {
    "policy": (1, 16, 7),
    "tiny UNet": (1, 4, 16, 16),
    "small DiT": (1, 4, 16, 16),
    "large UNet": (1, 4, 64, 64),
}
MODES = {False: "Sampler, eager", "auto": "Sampler, a graph of a step", "loop": "Sampler, one graph"}
_AGREEMENT = 1e-2  # relative: sums in another order, magnified by 50 steps of a random model


class _Output(dict[str, Tensor]):
    """An output with ``.sample``, as diffusers' models return it."""

    @property
    def sample(self) -> Tensor:
        return self["sample"]


class Policy(torch.nn.Module):
    """Denoise 16 actions of 7 joints; it is called like diffusers' models."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        inputs = 16 * 7 + 32 + 1
        layers = [torch.nn.Linear(inputs, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 16 * 7))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> _Output | tuple[Tensor]:
        """Predict the noise; ``encoder_hidden_states`` are observations, which are averaged."""
        time_ = (timestep.expand(len(sample)) / 1000).to(sample.dtype)
        inputs = torch.cat([sample.flatten(1), encoder_hidden_states.mean(1), time_[:, None]], 1)
        output = self.layers(inputs).view_as(sample)
        return _Output(sample=output) if return_dict else (output,)


def denoiser(kind: str, device: torch.device) -> torch.nn.Module:
    """Build a model with random parameters."""
    torch.manual_seed(0)
    if kind == "policy":
        return Policy().eval().to(device)
    import diffusers as installed

    diffusers: Any = installed
    model: Any
    if kind.endswith("DiT"):
        model = diffusers.PixArtTransformer2DModel(
            **MODELS[kind], in_channels=4, out_channels=4, sample_size=16, patch_size=2, caption_channels=32
        )
    else:
        model = diffusers.UNet2DConditionModel(
            sample_size=LATENTS[kind][-1],
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=8,
            **MODELS[kind],
        )
    module: torch.nn.Module = model.eval().to(device)
    return module


class Loops:
    """A model, latents and embeddings, and every way to run the loop with them."""

    def __init__(self, kind: str, steps: int, device: torch.device) -> None:
        self.kind, self.steps, self.device = kind, steps, device
        self.model: Any = denoiser(kind, device)
        generator = torch.Generator().manual_seed(1)
        width = 32 if kind.endswith("DiT") else MODELS[kind]["cross_attention_dim"]
        self.x_T = torch.randn(LATENTS[kind], generator=generator).to(device)
        self.embeddings = torch.randn(2, 77, width, generator=generator).to(device)
        self.compiled: Any = torch.compile(self.model, mode="reduce-overhead") if device.type == "cuda" else None

    @property
    def _more(self) -> dict[str, Any]:
        """The arguments that only a DiT takes."""
        if not self.kind.endswith("DiT"):
            return {}
        return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def by_hand(self, scheduler: Any, model: Any, fused: bool) -> Tensor:
        """Run the loop as pipelines write it."""
        x = self.x_T
        for t in scheduler.timesteps:
            if self.compiled is not None:
                torch.compiler.cudagraph_mark_step_begin()
            output = model(
                torch.cat([x, x]), timestep=t.expand(2), encoder_hidden_states=self.embeddings, **self._more
            ).sample
            if fused:
                x = scheduler.step(output, t, x, guidance_scale=SCALE).prev_sample
            else:
                uncond, cond = output.chunk(2)
                x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        return x

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """Return the contenders by name, diffusers first."""
        import diffusers as installed

        from fastguide import diffusers as ours

        diffusers: Any = installed
        config: dict[str, Any] = {"clip_sample": False, "beta_schedule": "scaled_linear"}
        theirs, fused = diffusers.DDIMScheduler(**config), ours.DDIMScheduler(**config)
        for scheduler in (theirs, fused):
            scheduler.set_timesteps(self.steps, device=self.device)
        table = ours.step_table(theirs, self.steps).to(self.device)
        uncond, cond = self.embeddings[:1], self.embeddings[1:]
        calls: dict[str, Callable[[], Tensor]] = {
            "diffusers": lambda: self.by_hand(theirs, self.model, False),
            "diffusers, fastguide's scheduler": lambda: self.by_hand(fused, self.model, True),
        }
        if self.compiled is not None:
            calls["diffusers, compiled model"] = lambda: self.by_hand(theirs, self.compiled, False)

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            output: Tensor = self.model(x, timestep=t, encoder_hidden_states=y, return_dict=False, **self._more)[0]
            return output

        for mode in MODES if self.device.type == "cuda" else (False,):
            sampler = Sampler(model, table, ClassifierFree(SCALE), cuda_graph=mode)  # type: ignore[arg-type]
            calls[MODES[mode]] = lambda sampler=sampler: sampler(self.x_T, cond=cond, uncond=uncond)  # type: ignore
        return calls


@torch.no_grad()
def measure(kind: str, steps: int, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender: its time, its speed over diffusers', on a GPU the memory that it reserves."""
    row = {"suite": "loops", "workload": f"{kind}, {steps} steps"}
    try:
        calls = Loops(kind, steps, device).contenders()
    except ImportError:
        yield row | {"contender": "all", "status": "not run", "reason": "diffusers is not installed"}
        return
    yield from compared(row, calls, device, seconds)


@torch.no_grad()
def compared(
    row: dict[str, Any],
    calls: dict[str, Callable[[], Tensor]],
    device: torch.device,
    seconds: float,
    groups: Sequence[tuple[str, ...]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender that agrees with diffusers: its time, and on a GPU the memory that it reserves.

    ``groups``: of contenders that take turns with each other alone, so that no other's code and data evict theirs from
    the caches, and whose first is what the others are compared with; ``None``: all do, and diffusers is the first.
    """
    groups = groups or (tuple(calls),)
    assert sorted(name for group in groups for name in group) == sorted(calls)
    try:
        reference = calls["diffusers"]()
    except Exception as error:  # there is nothing to check the others against
        yield row | {"contender": "diffusers, and all beside it", "status": "not run", "reason": describe(error)}
        return
    memory: dict[str, int] = {}
    for name in list(calls):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device) if device.type == "cuda" else 0
        try:
            difference = float((calls[name]() - reference).norm() / reference.norm())
        except Exception as error:  # such as a model that cannot be compiled
            del calls[name]
            yield row | {
                "contender": name,
                "status": "failed" if is_ours(name) else "not run",
                "reason": describe(error),
            }
            continue
        if not difference < _AGREEMENT:
            del calls[name]
            reason = f"differs from diffusers by {difference:.1e}"
            yield row | {"contender": name, "status": "wrong", "reason": reason}
        elif device.type == "cuda":
            memory[name] = torch.cuda.max_memory_reserved(device) - before
    times: dict[str, Times] = {}
    failures: dict[str, Exception] = {}
    bases: dict[str, Times | None] = {}
    for group in groups:
        part = {name: calls[name] for name in group if name in calls}
        timed = in_turns(part, seconds / len(groups), device, wall=True)
        bases |= dict.fromkeys(group, timed.times.get(group[0]))
        times |= timed.times
        failures |= timed.failures
    for name, failure in failures.items():
        yield row | {"contender": name, "status": "failed" if is_ours(name) else "not run", "reason": describe(failure)}
    for name, found in times.items():
        base = bases[name]
        yield row | {
            "contender": name,
            "status": "ok",
            **found.fields,
            "bytes_more_reserved": memory.get(name),
            "faster_than_diffusers": None if base is None else base.median / found.median,
        }


@torch.no_grad()
def host_cost(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the host time per step with a model that does nothing: the cost of the loop itself."""
    x = torch.randn(1, 4, 64, 64, device=device)
    output = torch.randn(2, 4, 64, 64, device=device)
    y, steps = torch.zeros(1, device=device), 200
    for name, solver in (("DDIM", ddim), ("DDPM with seeds", ddpm)):
        table = solver(NoiseSchedule.linear(), steps).to(device)
        sampler = Sampler(lambda x, t, y: output, table, ClassifierFree(SCALE))
        seeds = torch.ones(1, dtype=torch.int64, device=device) if name != "DDIM" else None
        found = []
        for _ in range(12):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            sampler(x, cond=y, uncond=y, seeds=seeds)
            found.append((time.perf_counter() - begin) / steps)
        yield {
            "suite": "loops",
            "workload": f"an idle model, {name}",
            "contender": "Sampler, host time a step",
            "status": "ok",
            "seconds": sorted(found)[len(found) // 2],
        }
