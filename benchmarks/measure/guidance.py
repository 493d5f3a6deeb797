"""Compare classifier guidance with classifier-free guidance: cost as the models grow, and quality."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastguide import Classifier, ClassifierFree, Guidance, NoiseSchedule, Sampler, StepTable, ddim

WIDTHS = (32, 64, 128, 256, 512)
SCALES = (1.0, 2.0, 4.0)
_IMAGES, _STEPS = 32, 10


class PeakMemory(TorchDispatchMode):
    """Count the most bytes that new tensors hold at once; torch has no such count for the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, Tensor):  # tensors made before, such as parameters, do not count
                self._count(tensor.untyped_storage(), 0)
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage, storage.nbytes())
        return result

    def _count(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._counted:
            return
        self._counted.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._now -= size


def costs(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield the time per image and step and the peak memory of untrained models of growing width."""
    try:
        from fastguide.demo.models import NULL_CLASS, Denoiser, NoiseAwareClassifier
    except ModuleNotFoundError as error:
        yield {"suite": "guidance", "status": "not run", "reason": f"needs fastguide[demo]: {error}"}
        return
    table = ddim(NoiseSchedule.linear(), _STEPS, clip_sample_range=1.0).to(device)
    labels = (torch.arange(_IMAGES) % 10).to(device)
    x_T = torch.randn(_IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    null = torch.full_like(labels, NULL_CLASS)
    for width in WIDTHS:
        torch.manual_seed(0)
        model, classifier = Denoiser(width).to(device).eval(), NoiseAwareClassifier(width).to(device).eval()
        calls: dict[str, tuple[Guidance | None, dict[str, Any]]] = {
            "none": (None, {"cond": labels}),
            "classifier-free": (ClassifierFree(2.0), {"cond": labels, "uncond": null}),
            "classifier": (Classifier(classifier, 2.0), {"cond": null, "labels": labels}),
        }
        for method, (guidance, options) in calls.items():
            sampler = Sampler(model, table, guidance)
            yield {
                "suite": "guidance",
                "what": "cost",
                "method": method,
                "width": width,
                "parameters": sum(p.numel() for p in model.parameters()),
                "status": "ok",
                **_measured(sampler, x_T, options, device),
            }


def _measured(sampler: Sampler, x_T: Tensor, options: dict[str, Any], device: torch.device) -> dict[str, float]:
    sampler(x_T, **options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        Sampler(sampler.model, sampler.table, sampler.guidance, cuda_graph=False)(x_T, **options)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with PeakMemory() as memory:
            Sampler(sampler.model, sampler.table, sampler.guidance)(x_T, **options)
        peak = memory.peak
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        sampler(x_T, **options)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return {"seconds_per_image_step": sorted(times)[3] / _STEPS / _IMAGES, "peak_bytes_per_image": peak / _IMAGES}


def quality(device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield agreement and diversity of each method's images, with the demo's small models, trained if necessary."""
    try:
        from fastguide.demo import checkpoints, digits
        from fastguide.demo.methods import labels_to_sample
        from fastguide.demo.models import NULL_CLASS
    except ModuleNotFoundError as error:
        yield {"suite": "guidance", "status": "not run", "reason": f"needs fastguide[demo]: {error}"}
        return
    schedule = NoiseSchedule.linear()
    train, held_out = digits.load()
    denoiser, classifier = (m.to(device) for m in checkpoints.trained(schedule, train, quick=True, retrain=False))
    judge, labels = digits.Judge(train, held_out), labels_to_sample(20)
    real = digits.coverage(digits.first_of_each_class(train, 20).images, held_out)
    table: StepTable = ddim(schedule, 25, clip_sample_range=1.0, use_clipped_model_output=True).to(device)
    x_T = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    labels_on_device = labels.to(device)
    null = torch.full_like(labels_on_device, NULL_CLASS)
    for scale in SCALES:
        methods: tuple[tuple[str, Guidance, dict[str, Any]], ...] = (
            ("classifier-free", ClassifierFree(scale), {"cond": labels_on_device, "uncond": null}),
            ("classifier", Classifier(classifier, scale), {"cond": null, "labels": labels_on_device}),
        )
        for method, guidance, options in methods:
            sampler = Sampler(denoiser, table, guidance)
            images = sampler(x_T, **options).cpu()
            begin = time.perf_counter()
            sampler(x_T, **options).cpu()
            yield {
                "suite": "guidance",
                "what": "quality",
                "method": method,
                "scale": scale,
                "status": "ok",
                "seconds_per_image": (time.perf_counter() - begin) / len(labels),
                "agreement": judge.agreement(images, labels),
                "diversity": digits.coverage(images, held_out) / real,
            }
