"""Counts what a thread of the GPU kernels executes, by following their machine code: no GPU is needed."""
