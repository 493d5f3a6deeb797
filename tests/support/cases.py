"""What the kernel tests run over: shapes, dtypes and tables, each with the branch that it is there for."""

from __future__ import annotations

import torch

import fastguide

SHAPES = [
    ((0, 3, 4), "no samples"),
    ((2, 0, 5), "no elements"),
    ((1,), "one element, no inner dimension"),
    ((3, 7), "shorter than any vector: tails only"),
    ((2, 3, 17, 19), "prime sizes: vectors and a tail, more than one converted block"),
    ((2, 3, 23, 61), "several tiles of a GPU's kernel, and a tail"),
    ((2, 4, 64, 64), "exactly one grain: no threads"),
    ((3, 1, 131, 127), "threads that begin inside a sample"),
    ((40, 1031), "threads that hold several samples"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

MIXED_DTYPES = [  # sample (and output), predictions and the rest
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
]

SCHEDULE = fastguide.NoiseSchedule.linear()
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
FORMS = ("epsilon", "epsilon_after_clip", "mean")

TABLES = {  # each with the flags of the kernel that it switches on
    "ddim": fastguide.ddim(SCHEDULE, 10),  # neither noise nor clip
    "ddim clipped": fastguide.ddim(SCHEDULE, 10, clip_sample_range=1.0, prediction_type="v_prediction"),
    "ddim noisy": fastguide.ddim(SCHEDULE, 10, eta=1.0, use_clipped_model_output=True, clip_sample_range=1.0),
    "ddpm": fastguide.ddpm(SCHEDULE, 10, clip_sample_range=1.0),  # noise
    "ddpm learned": fastguide.ddpm(SCHEDULE, 10, variance_type="learned_range"),  # noise and variance
}


def alphas(table: fastguide.StepTable, step: int) -> tuple[float, float]:
    """abar at a step of a table of SCHEDULE and at the next, 1 after the last."""
    t = table.host_timesteps
    a = SCHEDULE.alphas_cumprod
    return a[t[step]].item(), a[t[step + 1]].item() if step + 1 < len(t) else 1.0
