"""Benchmarks: ``pytest benchmarks --benchmark-only`` for the tables, ``python -m benchmarks.compare`` for the ratios."""
