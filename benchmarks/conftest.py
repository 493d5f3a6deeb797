"""What pytest shall not import here: Triton's kernel, as Triton is optional."""

collect_ignore = ["contenders/plain_triton.py"]
