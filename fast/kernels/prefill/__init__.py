"""Triton kernels for the rows of a prompt, 9 and more in a pass."""
