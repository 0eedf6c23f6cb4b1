"""Adagrad for states in host memory."""

from __future__ import annotations

import torch

from ds_ops.optim import CPUAdagrad
from ds_ops.optim.fused_optimizer import FusedOptimizer


class DeepSpeedCPUAdagrad(CPUAdagrad):
    """`ds_ops.optim.CPUAdagrad` that also takes parameters which are on a device for now."""

    def _check_param(self, param: torch.Tensor) -> None:
        FusedOptimizer._check_param(self, param)
