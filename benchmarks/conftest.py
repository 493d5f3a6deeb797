"""Keep pytest from importing the Triton kernel: Triton is optional."""

collect_ignore = ["contenders/plain_triton.py"]
