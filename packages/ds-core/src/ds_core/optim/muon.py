"""Muon for the matrices inside a model, and AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

#: In the names of matrices that map from or to tokens, which Muon is not meant for.
_NOT_HIDDEN = ("embed", "lm_head")


class Muon(Optimizer):
    """`torch.optim.Muon` on hidden matrices, `torch.optim.AdamW` on all other parameters.

    A matrix is hidden unless its name contains "embed" or "lm_head"; a parameter's own attribute
    `use_muon` (True or False) decides before that. It needs whole matrices, so it cannot be sharded
    elementwise.

    Args:
        named_params: (name, parameter) pairs, as `model.named_parameters()` gives them.
        lr: learning rate of both, unless one has its own.
        muon_lr, adam_lr: their own; None: `lr`.
        weight_decay: of both, decoupled.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: as `torch.optim.Muon` has them.
        betas, eps: AdamW's.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(
        self,
        named_params: Iterable[tuple[str, torch.Tensor]],
        lr: float = 1e-3,
        muon_lr: float | None = None,
        adam_lr: float | None = None,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        matrices: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for name, param in named_params:
            (matrices if _is_hidden(name, param) else others).append(param)
        self._parts: list[Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                lr=lr if muon_lr is None else muon_lr,
                weight_decay=weight_decay,
                momentum=momentum,
                nesterov=nesterov,
                ns_coefficients=ns_coefficients,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            self._parts.append(muon)
        if others:
            rate = lr if adam_lr is None else adam_lr
            adam = AdamW(others, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay)
            self._parts.append(adam)
        groups = [group for part in self._parts for group in part.param_groups]
        super().__init__(groups, {})
        # One set of groups and one state, whoever reads or writes them.
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def _is_hidden(name: str, param: torch.Tensor) -> bool:
    said = getattr(param, "use_muon", None)
    if said is not None:
        return bool(said) and param.dim() == 2
    return param.dim() == 2 and not any(part in name.lower() for part in _NOT_HIDDEN)
