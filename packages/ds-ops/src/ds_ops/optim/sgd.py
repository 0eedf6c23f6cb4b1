"""SGD with momentum in one pass: gradient scale, step, and low-precision copy together."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.errors import OptimizerError
from ds_core.ops.sgd_step import sgd_step_
from ds_ops.optim.arguments import check_not_negative
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update


class FusedSGD(FusedOptimizer):
    """`torch.optim.SGD` on any device and in any float format; state dicts are the same.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as `torch.optim.SGD` has them.
        fp32_optimizer_states: False: the momentum in bf16.
        stochastic_rounding: of parameters and states in bf16, so that small updates are not lost.
    """

    ops = ("sgd_step_",)
    state_keys = ("momentum_buffer",)
    step_options = FusedOptimizer.step_options | {"undo"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        fp32_optimizer_states: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        check_not_negative(type(self).__name__, lr=lr, momentum=momentum, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "fp32_optimizer_states": fp32_optimizer_states,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise OptimizerError(
                f"FusedSGD: nesterov: got momentum {group['momentum']} and dampening "
                f"{group['dampening']}, expected a momentum above 0 and no dampening"
            )

    def _new_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = super()._new_state(group, param)
        if group["momentum"] == 0:
            del state["momentum_buffer"]
        return state

    def _ensure_state(self, group: dict[str, Any], param: torch.Tensor) -> bool:
        was_new = super()._ensure_state(group, param)
        state = self.state[param]
        if group["momentum"] == 0:
            state.pop("momentum_buffer", None)
        elif state.get("momentum_buffer") is None:
            # The momentum was 0 until now.
            dtype = self._state_dtype(group)
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
        return was_new

    def _update(self, group: dict[str, Any], update: Update) -> None:
        sgd_step_(
            update.param,
            update.grad,
            *update.states,
            lr=float(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first_step=update.step == 1,
            **update.options,
        )
