"""Benchmarks: ``pytest benchmarks --benchmark-only`` for tables, ``python -m benchmarks.compare`` for the ratios."""
