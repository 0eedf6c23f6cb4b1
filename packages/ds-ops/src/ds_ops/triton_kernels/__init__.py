"""Kernels in Triton, for NVIDIA and AMD GPUs; nothing here is imported until one is first used.

A file holds the kernels of one op or family, the functions that launch them, and `KERNELS`, which
says how each is cut for which shapes and targets. `catalog.OPS` says which op a function computes.
docs/guides/kernels.md takes one from its reference to its benchmark.
"""
