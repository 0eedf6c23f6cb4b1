"""Lion: the sign of a momentum, so one state per parameter instead of Adam's two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class Lion(Optimizer):
    """Steps by the sign of an average: `p = p (1 - lr wd) - lr sign(b1 m + (1 - b1) g)`.

    Then the momentum follows: `m = b2 m + (1 - b2) g`. Elementwise, so it can be sharded. A good
    learning rate is 3 to 10 times smaller than AdamW's, and weight decay as much larger.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: b1 of the update, b2 of the momentum.
        weight_decay: decoupled, times the learning rate.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"Lion: got lr={lr}, betas={betas}, weight_decay={weight_decay}; expected lr and "
                f"weight_decay of at least 0, and betas in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            gradients = [param.grad for param in params]
            momenta = []
            for param in params:
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param)
                momenta.append(state["exp_avg"])
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            updates = torch._foreach_mul(momenta, beta1)
            torch._foreach_add_(updates, gradients, alpha=1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_mul_(momenta, beta2)
            torch._foreach_add_(momenta, gradients, alpha=1 - beta2)
        return loss
