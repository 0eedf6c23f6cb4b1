"""Muon for the matrices inside a model, and AdamW for everything else, as one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch.optim import AdamW, Optimizer

from ds_core.errors import OptimizerError

#: In the names of matrices that map from or to tokens, which Muon is not meant for.
_NOT_HIDDEN = ("embed", "lm_head")
#: Added to a norm before it divides.
_EPS = 1e-7


class Muon(Optimizer):
    """Orthogonalized momentum on hidden matrices, AdamW on all other parameters.

    The arithmetic is that of `torch.optim.Muon` and `torch.optim.AdamW`. A matrix is hidden unless
    its name contains "embed" or "lm_head"; a parameter's own attribute `use_muon` (True or False)
    decides before that. It is a `ds_core.whole_matrices.WholeMatrices`, so it can be sharded.

    Args:
        named_params: (name, parameter) pairs, as `model.named_parameters()` gives them.
        lr: learning rate of both, unless one has its own.
        muon_lr, adam_lr: their own; None: `lr`.
        weight_decay: of both, decoupled.
        momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn: as `torch.optim.Muon` has them.
        betas, eps: AdamW's.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """

    #: The optimizer of all other parameters.
    _rest_class: ClassVar[Callable[..., Optimizer]] = AdamW
    #: Newton-Schulz iterations begin by rounding to it anyway.
    direction_dtype: ClassVar[torch.dtype] = torch.bfloat16
    #: Arguments of `step` beside the closure; see `ds_core.fused`.
    step_options: ClassVar[frozenset[str]] = frozenset()

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
        groups: list[dict[str, Any]] = []
        if matrices:
            rate = lr if muon_lr is None else muon_lr
            settings = {
                "use_muon": True,
                "lr": rate,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": tuple(ns_coefficients),
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            }
            _check(settings)
            groups.append({"params": matrices, **settings})
        if not matrices and not others:
            raise OptimizerError("Muon: params: got none, expected pairs of name and parameter")
        self._rest: Optimizer | None = None
        if others:
            rate = lr if adam_lr is None else adam_lr
            self._rest = self._rest_class(
                others, lr=rate, betas=betas, eps=eps, weight_decay=weight_decay
            )
            groups += [{**group, "use_muon": False} for group in self._rest.param_groups]
        super().__init__(groups, {})
        self._is_complete = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rest": self._rest, "_is_complete": True}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after construction: names decide how a parameter is updated."""
        if hasattr(self, "_is_complete"):
            raise OptimizerError(
                "Muon.add_param_group: the names of parameters decide how they are updated; give "
                "all of them to Muon(named_params)"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        gradients: Mapping[torch.Tensor, torch.Tensor] | None = None,
        copies: Mapping[torch.Tensor, torch.Tensor] | None = None,
        grad_scale: torch.Tensor | float | None = None,
    ) -> Any:
        """Update the parameters that have a gradient; returns what `closure` returned.

        `gradients`, `copies` and `grad_scale` are for those who find them in `step_options`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given, written = gradients or {}, copies or {}
        factor = 1.0 if grad_scale is None else grad_scale
        for group in self.param_groups:
            for param in group["params"] if self.is_whole(group) else ():
                grad = given.get(param, param.grad)
                if grad is not None:
                    update = self.whole_update(group, self.direction(group, param, grad, factor))
                    self.apply_update(group, param, update, tuple(param.shape))
                    if param in written:
                        written[param].copy_(param)
        if self._rest is not None:
            # One set of groups and one state, whoever reads or writes them.
            rest: Any = self._rest
            rest.param_groups = [g for g in self.param_groups if not self.is_whole(g)]
            rest.state = self.state
            asked = {"gradients": gradients, "copies": copies, "grad_scale": grad_scale}
            rest.step(**{key: value for key, value in asked.items() if value is not None})
        return loss

    # ------------------------------------------------------------------ the parts of a step

    def is_whole(self, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group are updated as whole matrices."""
        return bool(group.get("use_muon", "ns_steps" in group))

    @torch.no_grad()
    def direction(
        self,
        group: dict[str, Any],
        param: torch.Tensor,
        grad: torch.Tensor,
        grad_scale: float | torch.Tensor = 1.0,
    ) -> torch.Tensor:
        """Update the momentum of any part of a matrix, and return what is orthogonalized."""
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        momentum = state["momentum_buffer"]
        if grad.dtype is not momentum.dtype:
            grad = grad.to(momentum.dtype)
        if torch.is_tensor(grad_scale) or grad_scale != 1.0:
            grad = grad * grad_scale
        momentum.lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        return ahead.to(self.direction_dtype)

    @torch.no_grad()
    def whole_update(self, group: dict[str, Any], direction: torch.Tensor) -> torch.Tensor:
        """The nearest orthogonal matrix, about: Newton-Schulz iterations on `[rows, columns]`.

        Each maps every singular value s to `a s + b s^3 + c s^5`, which ends between 0.7 and 1.2.
        """
        a, b, c = group["ns_coefficients"]
        is_tall = direction.shape[0] > direction.shape[1]
        x = direction.to(self.direction_dtype)
        x = x.T if is_tall else x
        x = x / x.norm().clamp(min=_EPS)
        for _ in range(group["ns_steps"]):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.T if is_tall else x).contiguous()

    @torch.no_grad()
    def apply_update(
        self,
        group: dict[str, Any],
        param: torch.Tensor,
        update: torch.Tensor,
        shape: tuple[int, ...],
    ) -> None:
        """Decay any part of a matrix of `shape`, and subtract its part of the update."""
        lr = float(group["lr"])
        rows, columns = shape
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * math.sqrt(max(rows, columns))
        else:
            ratio = math.sqrt(max(1.0, rows / columns))
        param.mul_(1 - lr * group["weight_decay"])
        param.add_(update, alpha=-lr * ratio)

    def matrix_flops(self, group: dict[str, Any], shape: tuple[int, ...]) -> int:
        """Multiplications and additions of `whole_update`."""
        short, long = min(shape), max(shape)
        return int(group["ns_steps"]) * 2 * short * short * (2 * long + short)


def _check(group: dict[str, Any]) -> None:
    wrong = [
        name
        for name, good in (
            ("lr", group["lr"] >= 0),
            ("weight_decay", group["weight_decay"] >= 0),
            ("momentum", group["momentum"] >= 0),
            ("ns_coefficients", len(group["ns_coefficients"]) == 3),
            ("ns_steps", 0 < group["ns_steps"] < 100),
            ("adjust_lr_fn", group["adjust_lr_fn"] in (None, "original", "match_rms_adamw")),
        )
        if not good
    ]
    for name in wrong:
        raise OptimizerError(
            f"Muon: {name}: got {group[name]!r}, expected lr, weight_decay and momentum of at "
            f"least 0, three ns_coefficients, 1 to 99 ns_steps, and an adjust_lr_fn of None, "
            f"'original' or 'match_rms_adamw'"
        )


def _is_hidden(name: str, param: torch.Tensor) -> bool:
    said = getattr(param, "use_muon", None)
    if said is not None:
        return bool(said) and param.dim() == 2
    return param.dim() == 2 and not any(part in name.lower() for part in _NOT_HIDDEN)
