"""Adam whose two averages take one byte per element each, in blocks with a scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.ops.adam8bit_step import BLOCK, adam8bit_step_, decoded, encoded
from ds_ops.optim.arguments import check_betas, check_not_negative
from ds_ops.optim.fused_optimizer import FusedOptimizer, Update, flat


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
            state[scales] = param.new_zeros(blocks, dtype=torch.float32)
        return state

    def portable_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Both averages in fp32, as torch's AdamW has them, and the count of steps; a copy."""
        state = self.state.get(param)
        if not state:
            return {}
        found = {"step": state["step"].clone()}
        codes, scales = self.state_keys, self._SCALES
        for index, key in enumerate(("exp_avg", "exp_avg_sq")):
            found[key] = torch.empty_like(param, dtype=torch.float32)
            own = flat(self._laid_out(state, codes[index], param))
            flat(found[key]).copy_(decoded(own, state[scales[index]], signed=index == 0))
        return found

    def load_portable_state(self, param: torch.Tensor, values: Mapping[str, Any]) -> None:
        """Pack averages in fp32; what `portable_state` gave is taken over exactly."""
        step = torch.as_tensor(values["step"])
        state = {"step": step.detach().to("cpu", torch.float32, copy=True)}
        codes, scales = self.state_keys, self._SCALES
        for index, key in enumerate(("exp_avg", "exp_avg_sq")):
            value = torch.empty_like(param, dtype=torch.float32).copy_(values[key])
            own, state[scales[index]] = encoded(flat(value), signed=index == 0)
            state[codes[index]] = torch.empty_like(param, dtype=torch.uint8)
            flat(state[codes[index]]).copy_(own)
        self.state[param] = state

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
