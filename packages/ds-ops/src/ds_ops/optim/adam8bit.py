"""Adam whose two averages take one byte per element each, in blocks with a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.ops.adam8bit_step import BLOCK, adam8bit_step_
from ds_ops.optim.arguments import check_betas, check_not_negative
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update


class Adam8bit(FusedOptimizer):
    """AdamW with a quarter of the state: 2 bytes per parameter, and 8 per `BLOCK` of 256.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr: learning rate.
        betas: decay of the averages of gradients, and of their squares.
        eps: added to the root of the latter.
        weight_decay: decoupled.
        adam_w_mode: False: weight decay adds to the gradient, as in Adam.
        stochastic_rounding: of the states, and of parameters in bf16. Without it the average of
            squares cannot follow slow changes.

    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2.
    """

    ops = ("adam8bit_step_",)
    state_keys = ("exp_avg_codes", "exp_avg_sq_codes")
    _SCALES = ("exp_avg_scales", "exp_avg_sq_scales")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        stochastic_rounding: bool = True,
    ) -> None:
        check_not_negative("Adam8bit", lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas("Adam8bit", betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": adam_w_mode,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults)

    def _new_state(self, group: dict[str, Any], param: torch.Tensor) -> dict[str, torch.Tensor]:
        blocks = -(-param.numel() // BLOCK)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        for codes, scales in zip(self.state_keys, self._SCALES, strict=True):
            state[codes] = torch.zeros_like(param, dtype=torch.uint8)
            state[scales] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state

    def state_bytes(self, numel: int) -> int:
        """Bytes of state of a tensor of `numel` elements, for plans: blocks have scales."""
        return 2 * numel + 8 * -(-numel // BLOCK)

    def _states(self, param: torch.Tensor) -> list[torch.Tensor]:
        state, found = self.state[param], []
        for codes, scales in zip(self.state_keys, self._SCALES, strict=True):
            found += [self._laid_out(state, codes, param), state[scales]]
        return found

    def _new_state_keys(self) -> tuple[str, ...]:
        return ("step", *self.state_keys, *self._SCALES)

    def _update(self, group: dict[str, Any], update: Update) -> None:
        adam8bit_step_(
            update.param,
            update.grad,
            *update.states,
            step=update.step,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=group["decoupled_weight_decay"],
            **update.options,
        )
