"""Train the demo's two models once, and cache them as safetensors in the user's cache folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from ..schedules import NoiseSchedule
from ..training import classifier_loss, denoising_loss, drop_condition
from .digits import Digits
from .models import NULL_CLASS, Denoiser, NoiseAwareClassifier

_BATCH = 128
_P_UNCOND = 0.15
_VERSION = 1  # raise it when models or training change: older checkpoints are then not loaded

_Model = TypeVar("_Model", bound=nn.Module)


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/fastguide``, usually ``~/.cache/fastguide``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastguide"


def trained(
    schedule: NoiseSchedule, train: Digits, *, quick: bool, retrain: bool
) -> tuple[Denoiser, NoiseAwareClassifier]:
    """Return both models, trained now or loaded from the cache; with ``retrain``, trained in any case."""
    steps = (1500, 300) if quick else (8000, 1500)

    def denoiser_loss(model: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        dropped = drop_condition(labels, torch.tensor(NULL_CLASS), _P_UNCOND, generator=generator)
        return denoising_loss(lambda x, t: model(x, t, dropped), schedule, images, generator=generator)

    def noisy_loss(model: NoiseAwareClassifier, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        return classifier_loss(model, schedule, images, labels, generator=generator)

    return (
        _trained(Denoiser, denoiser_loss, train, steps[0], "denoiser", retrain),
        _trained(NoiseAwareClassifier, noisy_loss, train, steps[1], "classifier", retrain),
    )


def _trained(
    build: Callable[[], _Model],
    loss: Callable[[_Model, Tensor, Tensor, torch.Generator], Tensor],
    train: Digits,
    steps: int,
    name: str,
    retrain: bool,
) -> _Model:
    with torch.random.fork_rng():  # does not change the caller's random state
        torch.manual_seed(0)
        model = build()
    path = cache_folder() / f"digits-{name}-{steps}-v{_VERSION}.safetensors"
    if path.exists() and not retrain:
        try:
            model.load_state_dict(load_file(path))
            print(f"{name}: loaded from {path}")
            return model.eval()
        except (SafetensorError, RuntimeError) as error:
            print(f"{name}: {path} cannot be used ({error}); training again")
    model = _train(model, loss, train, steps, name)
    try:
        save(model.state_dict(), path)
    except OSError as error:
        print(f"{name}: not cached: {path} cannot be written ({error})")
    return model


def _train(
    model: _Model,
    loss: Callable[[_Model, Tensor, Tensor, torch.Generator], Tensor],
    train: Digits,
    steps: int,
    name: str,
) -> _Model:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = copy.deepcopy(model)
    for step in trange(steps, desc=f"training the {name}", unit="step"):
        chosen = torch.randint(len(train.labels), (_BATCH,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss(model, train.images[chosen], train.labels[chosen], generator).backward()
        optimizer.step()
        rate.step()
        with torch.no_grad():  # an exponential moving average samples better than the last iterate
            decay = min(0.995, (step + 1) / (step + 10))
            for averaged, current in zip(average.parameters(), model.parameters(), strict=True):
                averaged.lerp_(current, 1 - decay)
    return average.eval()


def save(state: dict[str, Tensor], path: Path) -> None:
    """Save a state by writing a second file and renaming it: an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(state, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
