"""One explicit statement of the number formats of a training run, and the dynamic loss scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_core.errors import ConfigError


@dataclass(frozen=True)
class LossScale:
    """How the loss is scaled so that fp16 gradients do not underflow.

    Attributes:
        static: the scale, constant; None for a dynamic one.
        initial: first dynamic scale.
        window: steps without overflow after which the scale doubles.
        hysteresis: overflows in a row that are tolerated before the scale halves.
        consecutive_hysteresis: whether a step without overflow refills the hysteresis.
        minimum: the scale never falls below it.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2.
    """

    static: float | None = None
    initial: float = 2.0**16
    window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    minimum: float = 1.0


@dataclass(frozen=True)
class Precision:
    """Number formats of one run; None means "leave it as the model has it".

    Attributes:
        compute: dtype of parameters and activations.
        master: dtype of the optimizer's own copy of the parameters, if it keeps one.
        grad: dtype in which gradients accumulate between micro-batches; None: `compute`.
        autocast: dtype for torch.autocast around forward, or None.
        loss_scale: how the loss is scaled, or None for no scaling.
        inputs: dtype to which floating-point tensors among the model's arguments are cast.
    """

    compute: torch.dtype | None = None
    master: torch.dtype | None = None
    grad: torch.dtype | None = None
    autocast: torch.dtype | None = None
    loss_scale: LossScale | None = None
    inputs: torch.dtype | None = None

    def applied_to(self, forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
        """`forward` with arguments cast and under autocast, as far as asked for; else itself."""
        if self.inputs is not None:
            forward = _casting(forward, self.inputs)
        if self.autocast is not None:
            forward = torch.autocast(device_type, self.autocast)(forward)
        return forward

    def for_inference(self) -> Precision:
        """The same for a model that is only run: no master copy, gradients or loss scale."""
        return replace(self, master=None, grad=None, loss_scale=None)

    def __str__(self) -> str:
        parts = [f"parameters {_short(self.compute)}"]
        parts.append(f"master {_short(self.master)}" if self.master else "no master copy")
        parts.append(f"gradients {_short(self.grad or self.compute)}")
        if self.autocast:
            parts.append(f"autocast {_short(self.autocast)}")
        if self.inputs:
            parts.append(f"inputs cast to {_short(self.inputs)}")
        if self.loss_scale:
            kind = "dynamic" if self.loss_scale.static is None else f"{self.loss_scale.static:g}"
            parts.append(f"loss scale {kind}")
        return ", ".join(parts)


def _casting(forward: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return type(value)(cast(item) for item in value)
        return value

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*(cast(arg) for arg in args), **{k: cast(v) for k, v in kwargs.items()})

    return run


def _short(dtype: torch.dtype | None) -> str:
    return "as built" if dtype is None else str(dtype).removeprefix("torch.")


class LossScaler:
    """The state machine behind a `LossScale`: which scale now, and what an overflow does to it."""

    def __init__(self, policy: LossScale | None) -> None:
        self._policy = policy
        self.scale = 1.0
        if policy is not None:
            self.scale = policy.initial if policy.static is None else policy.static
        self._good_steps = 0
        self._tolerated = policy.hysteresis if policy is not None else 0

    @property
    def may_skip(self) -> bool:
        """Whether a step whose gradients overflow is skipped (else it is an error)."""
        return self._policy is not None

    def update(self, overflowed: bool) -> None:
        """Adjust the scale after a step. Must see the same decision on all ranks.

        Raises ConfigError when the scale is at its minimum and still overflows: the loss
        itself is not finite, and skipping on would never end.
        """
        policy = self._policy
        if policy is None or policy.static is not None:
            return
        if not overflowed:
            self._good_steps += 1
            if policy.consecutive_hysteresis:
                self._tolerated = policy.hysteresis
            if self._good_steps % policy.window == 0:
                self._tolerated = policy.hysteresis
                self.scale *= 2.0
            return
        self._good_steps = 0
        if self._tolerated > 1:
            self._tolerated -= 1
            return
        if self.scale <= policy.minimum:
            raise ConfigError(
                f"fp16: gradients overflow at the minimum loss scale {policy.minimum:g}: the "
                f"model's own values are not finite in fp16. Use bf16, lower the learning rate, or "
                f"look for the first non-finite layer"
            )
        self.scale = max(self.scale / 2.0, policy.minimum)

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters, JSON-able."""
        return {
            "scale": self.scale,
            "good_steps": self._good_steps,
            "tolerated": self._tolerated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.scale = float(state["scale"])
        self._good_steps = int(state["good_steps"])
        self._tolerated = int(state["tolerated"])
