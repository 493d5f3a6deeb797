"""Whole loops beside diffusers', in turns in one run: a small model, which waits for the host, and a large one.

    python -m benchmarks.loop --output benchmarks/results/loop-cpu.json

Classifier-free guidance, DDIM, batch 1. Each contender's pictures are compared with diffusers' before it is timed. On a
GPU a loop is timed from an idle device to an idle device; "host us a step" is of a model that does nothing: what the
loop itself costs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import Tensor

import fastguide
import fastguide.diffusers

from .compare import processor

SCALE = 7.5
SHAPE = (1, 4, 32, 32)
MODELS = {  # a robot's policy; about 200 launches a call; and one that a GPU is busy with
    "policy": {"cross_attention_dim": 32},
    "small": {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    },
    "large": {
        "block_out_channels": (320, 640),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
    },
}
LATENTS = {"policy": (1, 16, 7), "small": SHAPE, "large": (1, 4, 64, 64)}


class Policy(torch.nn.Module):
    """Denoises 16 actions of 7 joints; called as diffusers' models are."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        inputs = 16 * 7 + 32 + 1
        layers = [torch.nn.Linear(inputs, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(width, 16 * 7))

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> UNet1DOutput | tuple[Tensor]:
        """``encoder_hidden_states`` are observations; their mean is seen."""
        time = (timestep.expand(len(sample)) / 1000).to(sample.dtype)
        inputs = torch.cat([sample.flatten(1), encoder_hidden_states.mean(1), time[:, None]], 1)
        output = self.layers(inputs).view_as(sample)
        return UNet1DOutput(sample=output) if return_dict else (output,)


def denoiser(kind: str, device: torch.device) -> torch.nn.Module:
    """Randomly initialised."""
    torch.manual_seed(0)
    if kind == "policy":
        return Policy().eval().to(device)
    model = diffusers.UNet2DConditionModel(
        sample_size=LATENTS[kind][-1],
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        **MODELS[kind],
    )
    return model.eval().to(device)


class Loops:
    """One model, latents and embeddings, and every way to run the loop over them."""

    def __init__(self, kind: str, steps: int, device: torch.device) -> None:
        self.kind, self.steps, self.device = kind, steps, device
        self.model = denoiser(kind, device)
        generator = torch.Generator().manual_seed(1)
        width = MODELS[kind]["cross_attention_dim"]
        self.x_T = torch.randn(LATENTS[kind], generator=generator).to(device)
        self.embeddings = torch.randn(2, 77, width, generator=generator).to(device)
        self.compiled = torch.compile(self.model, mode="reduce-overhead") if device.type == "cuda" else None

    def by_hand(self, scheduler: diffusers.SchedulerMixin, model: Callable[..., object], fused: bool) -> Tensor:
        """The loop as pipelines write it."""
        scheduler.set_timesteps(self.steps, device=self.device)
        x = self.x_T
        for t in scheduler.timesteps:
            if self.compiled is not None:
                torch.compiler.cudagraph_mark_step_begin()
            output = model(torch.cat([x, x]), t, encoder_hidden_states=self.embeddings).sample
            if fused:
                x = scheduler.step(output, t, x, guidance_scale=SCALE).prev_sample
            else:
                uncond, cond = output.chunk(2)
                x = scheduler.step(uncond + SCALE * (cond - uncond), t, x).prev_sample
        return x

    def contenders(self) -> dict[str, Callable[[], Tensor]]:
        """By name, diffusers first."""
        config = {"clip_sample": False, "beta_schedule": "scaled_linear"}
        theirs, ours = diffusers.DDIMScheduler(**config), fastguide.diffusers.DDIMScheduler(**config)
        table = fastguide.diffusers.step_table(theirs, self.steps).to(self.device)
        uncond, cond = self.embeddings[:1], self.embeddings[1:]
        calls = {
            "diffusers": lambda: self.by_hand(theirs, self.model, False),
            "diffusers, fastguide's scheduler": lambda: self.by_hand(ours, self.model, True),
        }
        if self.compiled is not None:
            calls["diffusers, compiled model"] = lambda: self.by_hand(theirs, self.compiled, False)
        modes = (False, "auto", "loop") if self.device.type == "cuda" else (False,)
        for mode in modes:
            model = fastguide.diffusers.as_model(self.model)
            sampler = fastguide.Sampler(model, table, fastguide.ClassifierFree(SCALE), cuda_graph=mode)
            name = {False: "Sampler, eager", "auto": "Sampler, a graph of a step", "loop": "Sampler, one graph"}[mode]
            calls[name] = lambda sampler=sampler: sampler(self.x_T, cond=cond, uncond=uncond)
        return calls


def milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """Of one run, to the end of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


@torch.no_grad()
def measure(kind: str, steps: int, device: torch.device, seconds: float) -> dict[str, object]:
    """Median milliseconds of every contender, in turns; on a GPU also the memory that each reserves."""
    calls = Loops(kind, steps, device).contenders()
    reference = calls["diffusers"]()
    memory, errors = {}, {}
    for name, call in calls.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
        for _ in range(2):
            result = call()
        error = float((result - reference).norm() / reference.norm())
        if not error < 1e-2:
            raise RuntimeError(f"{name}: expected diffusers' latents, got a relative difference of {error}")
        errors[name] = error
        if device.type == "cuda":
            memory[name] = (torch.cuda.max_memory_reserved() - before) / 2**20
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["diffusers"]) < 3:
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    result = {"milliseconds": {name: statistics.median(values) for name, values in times.items()}, "errors": errors}
    return result | ({"MiB more reserved": memory} if memory else {})


@torch.no_grad()
def loop_cost(device: torch.device) -> dict[str, float]:
    """Host microseconds a step of a model that does nothing: (1,4,64,64), without and with noise."""
    x = torch.randn(1, 4, 64, 64, device=device)
    output = torch.randn(2, 4, 64, 64, device=device)
    steps, costs = 200, {}
    y = torch.zeros(1, device=device)
    for name, solver in (("DDIM", fastguide.ddim), ("DDPM", fastguide.ddpm)):
        table = solver(fastguide.NoiseSchedule.linear(), steps).to(device)
        sampler = fastguide.Sampler(lambda x, t, y: output, table, fastguide.ClassifierFree(SCALE))
        options = {"seeds": torch.ones(1, dtype=torch.int64, device=device)} if solver is fastguide.ddpm else {}
        times = []
        for _ in range(20):
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            sampler(x, cond=y, uncond=y, **options)
            times.append((time.perf_counter() - begin) / steps * 1e6)
        costs[name] = statistics.median(times)
    return costs


def main() -> None:
    """Measure and print; write the JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the results here, as JSON")
    parser.add_argument("--seconds", type=float, default=20.0, help="per model and number of steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    options = parser.parse_args()
    device = torch.empty(0, device=options.device).device
    costs = loop_cost(device)
    print("host us a step of the loop itself:", {name: round(value, 1) for name, value in costs.items()})
    results: dict[str, object] = {"host us a step": costs}
    for kind in options.models:
        for steps in options.steps:
            found = results[f"{kind} model, {steps} steps"] = measure(kind, steps, device, options.seconds)
            print(f"\n{kind} model, {steps} steps")
            baseline = found["milliseconds"]["diffusers"]
            for name, value in found["milliseconds"].items():
                print(f"  {name:<34} {value:9.1f} ms  {baseline / value:5.2f} x faster than diffusers")
    if options.output is not None:
        machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "processor": processor(),
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "fastguide": fastguide.__version__,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"machine": machine, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
