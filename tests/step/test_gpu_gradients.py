"""Gradients on a GPU: the reference's, in one launch that waits for nothing, and the same bits at every call."""

from __future__ import annotations

import pytest
import torch

from fastguide import ClassifierFree, guided_step
from fastguide.step.backends.registry import BACKENDS
from tests.support.backward_cases import CASES, CLIPPED, SHAPES, gradients_of
from tests.support.on_gpu import NO_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request):
    if not BACKENDS[request.param].serves("cuda"):
        pytest.skip(f"{request.param}: {BACKENDS[request.param].status}")
    return request.param


@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 3, 331, 333), (2, 16, 128, 128)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_reference_s(gpu_backend, name, shape):
    expected = gradients_of(name, shape, "reference", "cuda")
    found = gradients_of(name, shape, gpu_backend, "cuda")
    exact = gradients_of(name, shape, gpu_backend, "cuda")
    for got, again, wanted in zip(found, exact, expected, strict=True):
        if wanted is None:
            assert got is None
            continue
        assert torch.equal(got, again)
        assert got.dtype == wanted.dtype
        tolerance = 1e-4 if got.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()) + 1e-6)


def test_the_way_back_is_one_launch_and_waits_for_nothing():
    if not BACKENDS["native"].serves("cuda"):
        pytest.skip(BACKENDS["native"].status)
    x, uncond, cond = (torch.randn(4, 4, 64, 64, device="cuda").requires_grad_() for _ in range(3))
    noise = torch.randn_like(x).detach()
    y = guided_step(CLIPPED.to("cuda"), 3, x, [uncond, cond], ClassifierFree(3.0), noise=noise, backend="native")

    def back():
        return torch.autograd.grad(y, [x, uncond, cond], noise, retain_graph=True)

    torch.cuda.set_sync_debug_mode("error")
    try:
        back()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        back()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(names) == 1, names
    assert "backward_kernel" in names[0]
