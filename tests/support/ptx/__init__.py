"""Interprets the PTX of GPU kernels in numpy, where there is no GPU: all threads of a launch at once.

A register is an array over threads. What the interpreter does not know is an error. Every access to memory is checked
(bounds, alignment, whether it may be read or written, whether it was initialised), and so is the order of any two
accesses that conflict. It runs PTX, not machine code; ``ex2``, ``sin`` and ``cos`` are libm's where a GPU approximates.

parse.py reads the text; operands.py, opcodes.py, movements.py and generate.py make Python functions of it; launch.py
and wave.py run them; accesses.py, warps.py, arithmetic.py and memory.py are what those call; trace.py, ordering.py and
races.py judge the order of accesses.

cases.py, placement.py, expected.py and step.py step tensors in it and compare, far.py and triton_step.py in other ways;
listed.py has the cases, and faults.py what must be found. tiny.py runs kernels of a few lines.
``python -m tests.support.ptx`` runs everything.
"""
