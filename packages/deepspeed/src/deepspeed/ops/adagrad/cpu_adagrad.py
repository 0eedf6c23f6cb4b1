"""Adagrad for states in host memory."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.errors import DsError
from ds_ops.optim import CPUAdagrad
from ds_ops.optim.fused_optimizer import FusedOptimizer


class DeepSpeedCPUAdagrad(CPUAdagrad):
    """`ds_ops.optim.CPUAdagrad` that also takes parameters which are on a device for now.

    adamw_mode: accelerate passes False to whatever it maps an optimizer to; it means nothing here.
    """

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        *,
        adamw_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        if adamw_mode:
            raise DsError("DeepSpeedCPUAdagrad: adamw_mode: got True, but Adagrad has no such mode")
        super().__init__(
            model_params, lr, eps, weight_decay, amsgrad, fp32_optimizer_states, **kwargs
        )

    def _check_param(self, param: torch.Tensor) -> None:
        FusedOptimizer._check_param(self, param)
