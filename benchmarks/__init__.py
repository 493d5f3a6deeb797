"""``pytest benchmarks --benchmark-only`` and ``python -m benchmarks.gpu_check``; see README.md here."""
