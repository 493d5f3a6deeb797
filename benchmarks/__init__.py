"""Time fastguide beside diffusers, guided-diffusion and plain torch: ``python -m benchmarks``; see README.md."""
