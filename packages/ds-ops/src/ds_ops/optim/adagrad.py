"""Adagrad in one pass: gradient scale, step, and low-precision copy together."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.ops.adagrad_step import adagrad_step_
from ds_ops.optim.arguments import check_not_negative, check_on_cpu
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update


class FusedAdagrad(FusedOptimizer):
    """Adagrad in one pass over memory, on any device; state dicts are `torch.optim.Adagrad`'s.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr: learning rate.
        eps: added to the root of the sum of squares.
        weight_decay: adds to the gradient.
        amsgrad: refused.
        fp32_optimizer_states: False: the sum in bf16; small squares are then lost from it, unless
            rounding is stochastic.
        lr_decay: step t uses `lr / (1 + (t - 1) lr_decay)`.
        initial_accumulator_value: what the sum starts from.
        maximize: go up instead of down.
        stochastic_rounding: of parameters and states in bf16, so that small updates are not lost.

    Source: Duchi, Hazan and Singer 2011, "Adaptive Subgradient Methods", equation 1.
    """

    ops = ("adagrad_step_",)
    state_keys = ("sum",)
    step_options = FusedOptimizer.step_options | {"undo"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        *,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        check_not_negative(
            type(self).__name__,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            lr_decay=lr_decay,
            initial_accumulator_value=initial_accumulator_value,
        )
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "fp32_optimizer_states": fp32_optimizer_states,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _new_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = super()._new_state(group, param)
        state["sum"].fill_(group["initial_accumulator_value"])
        return state

    def _update(self, group: dict[str, Any], update: Update) -> None:
        adagrad_step_(
            update.param,
            update.grad,
            *update.states,
            step=update.step,
            lr=float(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            **update.options,
        )


class CPUAdagrad(FusedAdagrad):
    """`FusedAdagrad` with the arguments of DeepSpeedCPUAdagrad, for parameters in host memory."""

    devices = ("cpu",)

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
        *,
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            model_params,
            lr,
            eps,
            weight_decay,
            amsgrad,
            fp32_optimizer_states,
            lr_decay=lr_decay,
            initial_accumulator_value=initial_accumulator_value,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
        )

    def _check_param(self, param: torch.Tensor) -> None:
        super()._check_param(param)
        check_on_cpu("CPUAdagrad", param, "FusedAdagrad")
