"""Lion in one pass: gradient scale, step, and low-precision copy together."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.ops.lion_step import lion_step_
from ds_ops.optim.arguments import check_betas, check_not_negative, check_on_cpu
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update


class FusedLion(FusedOptimizer):
    """Steps by the sign of a momentum, on any device; the arithmetic of `ds_core.optim.Lion`.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr: learning rate; 3 to 10 times smaller than AdamW's is good.
        betas: decay in the update, and of the momentum.
        weight_decay: decoupled, times the learning rate.
        set_grad_none: whether `zero_grad` sets gradients to None.
        maximize: go up instead of down.
        fp32_optimizer_states: False: the momentum in bf16.
        stochastic_rounding: of parameters and states in bf16, so that small updates are not lost.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2.
    """

    ops = ("lion_step_",)
    state_keys = ("exp_avg",)
    step_options = FusedOptimizer.step_options | {"undo"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        *,
        maximize: bool = False,
        fp32_optimizer_states: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        name = type(self).__name__
        check_not_negative(name, lr=lr, weight_decay=weight_decay)
        check_betas(name, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "fp32_optimizer_states": fp32_optimizer_states,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, set_grad_none)

    def _counts_steps(self, group: dict[str, Any]) -> bool:
        # Only random rounding needs a count: else the state is that of `ds_core.optim.Lion`.
        return bool(group["stochastic_rounding"])

    def _update(self, group: dict[str, Any], update: Update) -> None:
        lion_step_(
            update.param,
            update.grad,
            *update.states,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            **update.options,
        )


class CPULion(FusedLion):
    """`FusedLion` with the arguments of DeepSpeedCPULion, for parameters in host memory."""

    devices = ("cpu",)

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            model_params,
            lr,
            betas,
            weight_decay,
            maximize=maximize,
            fp32_optimizer_states=fp32_optimizer_states,
            stochastic_rounding=stochastic_rounding,
        )

    def _check_param(self, param: torch.Tensor) -> None:
        super()._check_param(param)
        check_on_cpu("CPULion", param, "FusedLion")
