"""Adagrad in one pass."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {"DeepSpeedCPUAdagrad": "deepspeed.ops.adagrad.cpu_adagrad:DeepSpeedCPUAdagrad"},
    submodules=("cpu_adagrad",),
)
