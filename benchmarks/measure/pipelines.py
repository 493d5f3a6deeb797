"""Time whole pipelines of diffusers, whose model costs nothing: what is left is guidance, the step, and the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .loops import SCALE, compared

STEPS = 50
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "scaled_linear"}),
    "Euler": ("EulerDiscreteScheduler", {"beta_schedule": "scaled_linear"}),
    "flow Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"beta_schedule": "scaled_linear"}),
    "UniPC": ("UniPCMultistepScheduler", {"beta_schedule": "scaled_linear", "final_sigmas_type": "zero"}),
}
"""Schedulers, with their configurations."""
SHAPES = ((1, 4, 64, 64), (16, 4, 128, 128))
RESCALE = {"classifier-free": 0.0, "rescaled": 0.7}
"""Guidance, with its ``guidance_rescale``."""


def title(scheduler: str, guidance: str, shape: tuple[int, ...]) -> str:
    """Return the name of a workload."""
    return f"pipeline, {STEPS} {scheduler} steps, {guidance}, {shape}"


def workloads() -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the schedulers, guidances and shapes; other schedulers than DDIM's are timed where they are small."""
    every: list[tuple[str, str, tuple[int, ...]]] = [
        ("DDIM", guidance, shape) for shape in SHAPES for guidance in RESCALE
    ]
    return every + [(name, "classifier-free", SHAPES[0]) for name in SCHEDULERS if name != "DDIM"]


def pipeline(output: Tensor, scheduler: str = "DDIM") -> Any:
    """Return a pipeline, written as diffusers' are, whose model always returns this output, ``[uncond, cond]``."""
    import diffusers as installed
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion

    diffusers: Any = installed
    rescale_noise_cfg: Any = pipeline_stable_diffusion.rescale_noise_cfg

    name, config = SCHEDULERS[scheduler]
    scales = hasattr(getattr(diffusers, name), "scale_model_input")
    of_step = {"return_dict": False, **({"eta": 0.0} if name == "DDIMScheduler" else {})}

    class Free(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
            return (output,)

    class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, latents: Tensor, guidance_rescale: float = 0.0) -> Tensor:
            self.scheduler.set_timesteps(STEPS, device=latents.device)
            for t in self.scheduler.timesteps:
                latent_model_input = torch.cat([latents] * 2)
                if scales:
                    latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                noise_pred = self.unet(latent_model_input, t, return_dict=False)[0]
                noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                noise_pred = noise_pred_uncond + SCALE * (noise_pred_text - noise_pred_uncond)
                if guidance_rescale > 0.0:
                    noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, guidance_rescale=guidance_rescale)
                latents = self.scheduler.step(noise_pred, t, latents, **of_step)[0]
            return latents

        @torch.no_grad()
        def leave_guidance_to_the_step(self, latents: Tensor) -> Tensor:
            """Run the same loop, with the guidance written into the call of the step."""
            self.scheduler.set_timesteps(STEPS, device=latents.device)
            for t in self.scheduler.timesteps:
                latent_model_input = torch.cat([latents] * 2)
                if scales:
                    latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                output = self.unet(latent_model_input, t, return_dict=False)[0]
                latents = self.scheduler.step(output, t, latents, guidance_scale=SCALE, **of_step)[0]
            return latents

    return Pipeline(Free(), getattr(diffusers, name)(**config))


def measure(
    scheduler: str, guidance: str, shape: tuple[int, ...], device: torch.device, seconds: float
) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender: its time for all steps, and its speed over diffusers'."""
    row = {"suite": "pipelines", "workload": title(scheduler, guidance, shape)}
    generator = torch.Generator().manual_seed(0)
    output = torch.randn((2 * shape[0], *shape[1:]), generator=generator).to(device)
    latents = torch.randn(shape, generator=generator).to(device)
    try:
        from fastguide import diffusers as ours

        theirs, accelerated, by_hand = (pipeline(output, scheduler) for _ in range(3))
    except ImportError:
        yield row | {"contender": "all", "status": "not run", "reason": "diffusers is not installed"}
        return
    ours.accelerate(accelerated)
    ours.accelerate(by_hand)
    rescale = RESCALE[guidance]
    calls: dict[str, Callable[[], Tensor]] = {
        "diffusers": lambda: theirs(latents, rescale),
        "fastguide, accelerate(pipe)": lambda: accelerated(latents, rescale),
    }
    if guidance == "classifier-free":
        calls["fastguide, step(guidance_scale=)"] = lambda: by_hand.leave_guidance_to_the_step(latents)
    yield from compared(row, calls, device, seconds)
