"""Kernels for GPUs, measured on one: `ds ops bench gpu`."""

from ds_ops.bench.gpu.measuring import rows

__all__ = ["rows"]
