"""Adam and AdamW in one pass: gradient scale, step, and low-precision copy together."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ds_core.ops.adam_step import adam_step_
from ds_ops.optim.arguments import check_betas, check_not_negative, check_on_cpu
from ds_ops.optim.fused_optimizer import FusedOptimizer, Request, Update, is_dense


class FusedAdam(FusedOptimizer):
    """AdamW (or Adam) whose step reads and writes every byte once, on any device.

    Plain fp32 parameters go to torch's own fused kernel, which is as fast. With bf16 or fp16
    parameters or gradients, a low-precision copy, a gradient scale or an undo buffer, ours does in
    one pass what torch does in several. State dicts are those of `torch.optim.AdamW`.

    Args:
        params: parameters, or groups of them: fp32, bf16 or fp16.
        lr: learning rate.
        bias_correction: whether the averages are divided by what is missing in their first steps.
        betas: decay of the averages of gradients, and of their squares.
        eps: added to the root of the latter.
        adam_w_mode: decoupled weight decay; False: it adds to the gradient, as in Adam.
        weight_decay: 0 by default, unlike torch's AdamW.
        amsgrad: refused.
        set_grad_none: whether `zero_grad` sets gradients to None.
        maximize: go up instead of down.
        fp32_optimizer_states: False: both averages in bf16, for half the memory.
        stochastic_rounding: of parameters and states in bf16, so that small updates are not lost.

    Source: Kingma and Ba 2015, "Adam", Algorithm 1; Loshchilov and Hutter 2019, "Decoupled Weight
    Decay Regularization", Algorithm 2.
    """

    ops = ("adam_step_",)
    state_keys = ("exp_avg", "exp_avg_sq")
    step_options = FusedOptimizer.step_options | {"undo"}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        *,
        maximize: bool = False,
        fp32_optimizer_states: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        name = type(self).__name__
        check_not_negative(name, lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(name, betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": adam_w_mode,
            "bias_correction": bias_correction,
            "fp32_optimizer_states": fp32_optimizer_states,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, set_grad_none)

    def _step_group(self, group: dict[str, Any], request: Request) -> None:
        plain = self._torchs(group, request)
        if plain is None:
            super()._step_group(group, request)
        elif plain:
            self._step_by_torch(group, plain, request)

    def _torchs(self, group: dict[str, Any], request: Request) -> list[torch.Tensor] | None:
        """The parameters to update, if torch's kernel does all that is asked for, on all."""
        if request.undo or request.copies or request.grad_scale is not None:
            return None
        if request.found_inf is not None:
            return None
        if not group["bias_correction"] or not group["fp32_optimizer_states"]:
            return None
        params = []
        for param in group["params"]:
            grad = request.gradients.get(param, param.grad)
            if grad is None:
                continue
            fits = grad.layout is torch.strided and grad.stride() == param.stride()
            same = grad.shape == param.shape and grad.device == param.device
            fits = fits and is_dense(param)
            if not (fits and same and param.dtype is grad.dtype is torch.float32):
                return None
            params.append(param)
        one_device = len({param.device for param in params}) <= 1
        known = all(param.device.type in ("cpu", "cuda") for param in params)
        return params if one_device and known else None

    def _step_by_torch(
        self, group: dict[str, Any], params: list[torch.Tensor], request: Request
    ) -> None:
        gradients, steps, means, squares = [], [], [], []
        counts: dict[float, torch.Tensor] = {}
        for param in params:
            grad = request.gradients.get(param, param.grad)
            assert grad is not None
            gradients.append(grad)
            self._ensure_state(group, param)
            self._undos.pop(param, None)
            state = self.state[param]
            state["step"] += 1
            count = float(state["step"])
            if count not in counts:  # one transfer, not one for each parameter
                counts[count] = param.new_full((), count)
            steps.append(counts[count])
            means.append(self._laid_out(state, "exp_avg", param))
            squares.append(self._laid_out(state, "exp_avg_sq", param))
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(
            params,
            gradients,
            means,
            squares,
            [],
            steps,
            lr=float(group["lr"]),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )

    def _update(self, group: dict[str, Any], update: Update) -> None:
        adam_step_(
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
            bias_correction=group["bias_correction"],
            maximize=group["maximize"],
            **update.options,
        )


class CPUAdam(FusedAdam):
    """`FusedAdam` with the arguments of DeepSpeedCPUAdam, for parameters in host memory.

    Args: as `FusedAdam` has them; adamw_mode is its adam_w_mode.
    """

    devices = ("cpu",)

    def __init__(
        self,
        model_params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
        *,
        maximize: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(
            model_params,
            lr,
            bias_correction,
            betas,
            eps,
            adamw_mode,
            weight_decay,
            amsgrad,
            maximize=maximize,
            fp32_optimizer_states=fp32_optimizer_states,
            stochastic_rounding=stochastic_rounding,
        )

    def _check_param(self, param: torch.Tensor) -> None:
        super()._check_param(param)
        check_on_cpu("CPUAdam", param, "FusedAdam")
