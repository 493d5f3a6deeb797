"""Check a few steps of every kind on a GPU against the reference: few enough to run under compute-sanitizer.

python -m benchmarks.gpu_cases native
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import fastguide

from .workloads import SCHEDULE

SHAPES = [
    (1, 5),
    (2, 3, 17, 19),
    (2, 4, 32, 32),
    (3, 1, 1031),
    (2, 4, 256, 256),  # larger than one grid of torch's noise kernel, with vectors
    (3, 5, 191, 193),  # the same, one element at a time
]


@fastguide.as_guidance(predictions=3, dim=-1)
def perturbed_rows(v: Any, scale: Any) -> Any:
    """Return perturbed guidance, each row of which has the deviation of the conditional prediction's in part."""
    uncond, cond, perturbed = v.predictions
    guided = uncond + scale * (cond - uncond) + 2.0 * (cond - perturbed)
    return (0.7 * v.std(cond) / v.std(guided) + 0.3) * guided


def cases(backend: str, device: str) -> int:
    """Run all cases with a backend; returns their number."""
    of_groups = [
        fastguide.Normalized(3.0, dim=-1),
        fastguide.AdaptiveProjected(3.0, norm_threshold=1.0, norm_dim=-1),
        perturbed_rows(3.0),
    ]
    guidances = [None, fastguide.ClassifierFree(3.0), fastguide.Composed([2.0, -1.0]) + fastguide.Classifier(None, 1.0)]
    ran = 0
    for table in (fastguide.ddim(SCHEDULE, 10), fastguide.ddpm(SCHEDULE, 10, variance_type="learned_range")):
        table = table.to(device)
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                for guidance in guidances:
                    step(table, shape, dtype, guidance, backend, device)
                    gradients(table, shape, dtype, guidance, backend, device)
                    ran += 2
                for guidance in of_groups:
                    step(table, shape, dtype, guidance, backend, device)
                    ran += 1
    return ran


def step(
    table: fastguide.StepTable,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    guidance: fastguide.Guidance | None,
    backend: str,
    device: str,
) -> None:
    """Run one case with every source of noise, and compare it with the reference."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, predictions = draw(), [draw() for _ in range(1 if guidance is None else guidance.num_predictions)]
    gradient = draw() if guidance is not None and guidance.form is not None else None
    variance = draw().clamp(-1, 1) if table.learned_variance else None
    noises: list[dict[str, Any]] = [{"noise": draw()}]
    noises += [{"seeds": torch.arange(shape[0], device=device)}] if table.adds_noise_anywhere else []
    for noise in noises:
        results = []
        for name in (backend, "reference"):
            original = torch.empty_like(x)
            staged = torch.empty(2 * shape[0], *shape[1:], device=device, dtype=dtype)
            outputs: dict[str, Any] = {"original": original, "staged": staged, "backend": name}
            result = fastguide.guided_step(
                table, 3, x, predictions, guidance, gradient=gradient, variance=variance, **outputs, **noise
            )
            results.append((result, original, staged))
        for result, expected in zip(*results, strict=True):
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
    if device == "cuda" and table.adds_noise_anywhere:
        for source in (fastguide.DeviceGenerator(1), torch.Generator("cuda").manual_seed(1)):
            fastguide.guided_step(
                table,
                3,
                x,
                predictions,
                guidance,
                gradient=gradient,
                variance=variance,
                generator=source,
                backend=backend,
            )


def gradients(
    table: fastguide.StepTable,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    guidance: fastguide.Guidance | None,
    backend: str,
    device: str,
) -> None:
    """Compare all gradients of one case with the reference's: of what is read element by element, and of scales."""
    count = 1 if guidance is None else guidance.num_predictions
    found = []
    for name in (backend, "reference"):
        generator = torch.Generator().manual_seed(0)

        def draw(generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

        x, noise, predictions = draw(), draw(), [draw() for _ in range(count)]
        inputs = [x, noise, *predictions] if table.adds_noise_anywhere else [x, *predictions]
        options: dict[str, Any] = {"noise": noise, "backend": name}
        used = guidance
        if guidance is not None:
            scales = [torch.full((shape[0],), 2.0 - k, device=device).requires_grad_() for k in range(count - 1)]
            used = fastguide.ClassifierFree(*scales) if count == 2 else fastguide.Composed(scales)
            inputs += scales
        if guidance is not None and guidance.form is not None and used is not None:
            options["gradient"] = draw()
            used = used + fastguide.Classifier(None, 1.0, guidance.form)
            inputs.append(options["gradient"])
        if table.learned_variance:
            options["variance"] = draw().detach().clamp(-1, 1).requires_grad_()
            inputs.append(options["variance"])
        new = fastguide.guided_step(table, 3, x, predictions, used, **options)
        found.append(torch.autograd.grad(new, inputs, draw().detach()))
    for got, expected in zip(*found, strict=True):
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + 1e-6)


if __name__ == "__main__":
    count = cases(sys.argv[1], "cuda")
    torch.cuda.synchronize()
    print(f"{count} cases")
