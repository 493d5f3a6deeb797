"""One guided step: the operator, what it refuses, and its backends.

Without a classifier, a learned variance and inpainting, this is the whole step; ``backends/reference.py`` has the rest.

>>> def plain_step(table, index, x, predictions, weights, noise):
...     row = {name: values[index].float() for name, values in table.coefficients().items()}
...     m = sum(w * p for w, p in zip(weights, predictions))
...     x0 = row["x0_scale"] * (row["x0_sample"] * x + row["x0_pred"] * m)
...     x0 = x0.clamp(-row["clip"], row["clip"])
...     return row["out_x0"] * x0 + row["out_sample"] * x + row["out_pred"] * m + row["out_noise"] * noise
>>> import torch
>>> from fastguide import ClassifierFree, NoiseSchedule, ddpm, guided_step
>>> table, (x, uncond, cond, noise) = ddpm(NoiseSchedule.linear(), 50), torch.randn(4, 2, 3, 8, 8)
>>> fused = guided_step(table, 10, x, [uncond, cond], ClassifierFree(7.5), noise=noise)
>>> torch.allclose(fused, plain_step(table, 10, x, [uncond, cond], [-6.5, 7.5], noise), atol=1e-4)
True
"""
