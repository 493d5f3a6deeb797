"""The version, and the oldest torch that it works with: read by the build without importing torch."""

__version__ = "0.1.0"
TORCH_FLOOR = (2, 10)  # whose stable ABI has all that csrc/binding uses
