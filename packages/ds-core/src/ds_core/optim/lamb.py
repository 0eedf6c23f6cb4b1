"""LAMB: Adam whose step is as long as each layer's weights allow, for very large batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Lamb(Optimizer):
    """Adam's direction, as long as a trust ratio per tensor makes it.

    The direction is `u = m / (sqrt(v) + eps) + wd p`, the ratio `|p| / |u|`, so that
    `p = p - lr |p| / |u| u`. The ratio of a tensor is kept in `[min_coeff, max_coeff]`, and is 1
    where either norm is 0. It needs whole tensors, so it cannot be sharded elementwise.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the averages of gradients, and of their squares.
        eps: added to the root of the latter.
        weight_decay: inside the direction, and so inside the trust ratio.
        bias_correction: whether the averages are divided by what is missing in their first steps.
        max_coeff, min_coeff: bounds of the trust ratio.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", Algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"Lamb: got lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}; "
                f"expected none below 0, and betas in [0, 1)"
            )
        if not 0 <= min_coeff <= max_coeff:
            raise ValueError(
                f"Lamb: got min_coeff={min_coeff} and max_coeff={max_coeff}; expected "
                f"0 <= min_coeff <= max_coeff"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"bias_correction": bias_correction}
        defaults |= {"max_coeff": max_coeff, "min_coeff": min_coeff}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        gradients: list[Any] = [param.grad for param in params]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
        means = [self.state[param]["exp_avg"] for param in params]
        squares = [self.state[param]["exp_avg_sq"] for param in params]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        steps = [float(self.state[param]["step"]) for param in params]
        correct = group["bias_correction"]
        first = [1 - beta1**step if correct else 1.0 for step in steps]
        second = [(1 - beta2**step) ** 0.5 if correct else 1.0 for step in steps]
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, second)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, first)
        torch._foreach_div_(updates, roots)
        torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        ratios = self._trust_ratios(group, params, updates)
        torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(params, updates, alpha=-float(group["lr"]))

    @staticmethod
    def _trust_ratios(
        group: dict[str, Any], params: Sequence[torch.Tensor], updates: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        weights, steps = torch._foreach_norm(list(params)), torch._foreach_norm(list(updates))
        low, high = group["min_coeff"], group["max_coeff"]
        return [
            torch.where((w > 0) & (s > 0), (w / s).clamp(low, high), torch.ones_like(w))
            for w, s in zip(weights, steps, strict=True)
        ]
