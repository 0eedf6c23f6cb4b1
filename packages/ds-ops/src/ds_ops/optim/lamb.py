"""LAMB in two passes: Adam's direction with its norm, then a step as long as the weights allow."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.errors import OptimizerError
from ds_core.ops.lamb_update import lamb_apply_, lamb_update_
from ds_ops.optim.arguments import check_betas, check_not_negative
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update


class FusedLamb(FusedOptimizer):
    """Adam's direction, as long as a trust ratio per tensor makes it; see `ds_core.optim.Lamb`.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr: learning rate.
        bias_correction: whether the averages are divided by what is missing in their first steps.
        betas: decay of the averages of gradients, and of their squares.
        eps: added to the root of the latter.
        eps_inside_sqrt: refused if true.
        weight_decay: inside the direction, and so inside the trust ratio.
        max_grad_norm: refused if not 0: clip with the engine's gradient_clipping.
        max_coeff, min_coeff: bounds of the trust ratio.
        amsgrad: refused.
        fp32_optimizer_states: False: both averages in bf16.

    It needs whole tensors, so it cannot be sharded elementwise. Source: You et al. 2020, "Large
    Batch Optimization for Deep Learning: Training BERT in 76 minutes", Algorithm 2.
    """

    ops = ("lamb_update_", "lamb_apply_")
    state_keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        *,
        fp32_optimizer_states: bool = True,
    ) -> None:
        check_not_negative("FusedLamb", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("FusedLamb", betas)
        if not 0 <= min_coeff <= max_coeff:
            raise OptimizerError(
                f"FusedLamb: min_coeff: got {min_coeff} with max_coeff {max_coeff}; expected "
                f"0 <= min_coeff <= max_coeff"
            )
        if eps_inside_sqrt:
            raise OptimizerError("FusedLamb: eps_inside_sqrt: got True; eps is added to the root")
        if max_grad_norm:
            raise OptimizerError(
                f"FusedLamb: max_grad_norm: got {max_grad_norm}; clip with the engine's "
                f"gradient_clipping, or torch.nn.utils.clip_grad_norm_"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "amsgrad": amsgrad,
            "fp32_optimizer_states": fp32_optimizer_states,
        }
        super().__init__(params, defaults)

    def _update(self, group: dict[str, Any], update: Update) -> None:
        direction = torch.empty_like(update.param, dtype=torch.float32)
        squares = lamb_update_(
            update.param,
            update.grad,
            update.states[0],
            update.states[1],
            direction,
            step=update.step,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            bias_correction=group["bias_correction"],
            grad_scale=update.options["grad_scale"],
            found_inf=update.options["found_inf"],
        )
        # On the device: a host that waited for each tensor's norms would let a GPU run dry.
        weight, length = squares.sqrt().unbind()
        ratio = (weight / length).clamp(group["min_coeff"], group["max_coeff"])
        ratio = torch.where((weight > 0) & (length > 0), ratio, torch.ones_like(ratio))
        lamb_apply_(
            update.param,
            direction,
            float(group["lr"]),
            update.options["copy"],
            ratio=ratio,
            found_inf=update.options["found_inf"],
        )
