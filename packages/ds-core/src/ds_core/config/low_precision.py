"""What the bf16 section asks of the optimizer: bf16 states, and rounding that loses no update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ds_core import optimizers
from ds_core.config.sections import Bf16Section
from ds_core.errors import ConfigError

_MASTER = "bf16.bf16_master_weights_and_grads"
_STATES = "bf16.bf16_optimizer_states"
_ACCEPT = (
    "or set bf16.stochastic_rounding to false, with which updates of less than 1/512 of a weight "
    "are lost"
)


def params_for(
    bf16: Bf16Section, type_name: str, params: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """(params to add to those of an optimizer section, problems of which there may be none)."""
    if bf16.enabled is False or optimizers.problems(type_name, params):
        return {}, []  # said elsewhere
    derived: dict[str, Any] = {}
    found = []
    if bf16.bf16_master_weights_and_grads and bf16.stochastic_rounding:
        if optimizers.takes(type_name, params, "stochastic_rounding"):
            derived["stochastic_rounding"] = True
        else:
            found.append(
                f"{_MASTER}: got true, but {type_name} here rounds to nearest; "
                f"{_instead(type_name)}, {_ACCEPT}"
            )
    if bf16.bf16_optimizer_states and not _keeps_bf16(bf16, type_name, params):
        if optimizers.takes(type_name, params, "fp32_optimizer_states"):
            derived["fp32_optimizer_states"] = False
        elif type_name.lower() == "adam8bit":
            found.append(f"{_STATES}: got true, but Adam8bit keeps them in 8 bits; remove the key")
        else:
            found.append(
                f"{_STATES}: got true, but the states of {type_name} here are fp32; "
                f"{_instead(type_name)}, or remove the key"
            )
    for key, wanted in list(derived.items()):
        if key in params and params[key] is not wanted:
            asks = _STATES if key == "fp32_optimizer_states" else _MASTER
            instead = "" if asks == _STATES else ", or set bf16.stochastic_rounding to false"
            found.append(
                f"optimizer.params.{key}: got {str(params[key]).lower()}, but {asks} is true; "
                f"remove one of the two{instead}"
            )
        if key in params:
            del derived[key]
    return derived, found


def check_given(bf16: Bf16Section, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError unless an optimizer that a program built does what the section asks for.

    For a run whose parameters are bf16.
    """
    name = type(optimizer).__name__
    groups = optimizer.param_groups
    is_random = all(group.get("stochastic_rounding") for group in groups)
    if bf16.bf16_master_weights_and_grads and bf16.stochastic_rounding and not is_random:
        raise ConfigError(
            f"{_MASTER}: got true, but the given {name} rounds to nearest; build one of ds-ops "
            f"with stochastic_rounding=True, {_ACCEPT}"
        )
    if bf16.bf16_optimizer_states:
        follows = bf16.bf16_master_weights_and_grads and _is_torchs(type(optimizer))
        if not follows and any(group.get("fp32_optimizer_states", True) for group in groups):
            raise ConfigError(
                f"{_STATES}: got true, but the given {name} keeps other states; build one of "
                f"ds-ops with fp32_optimizer_states=False, or remove the key"
            )


def _keeps_bf16(bf16: Bf16Section, type_name: str, params: Mapping[str, Any]) -> bool:
    """Whether it is a class of torch that keeps states in the format of bf16 weights anyway."""
    if not bf16.bf16_master_weights_and_grads or bf16.stochastic_rounding:
        return False
    return all(_is_torchs(cls) for cls in optimizers.classes(type_name, params))


def _is_torchs(cls: Any) -> bool:
    return bool(cls.__module__.partition(".")[0] == "torch")


def _instead(type_name: str) -> str:
    if not optimizers.has_own_kernels():
        return "pip install ds-ops"
    return "use AdamW, Adam8bit, Lion, Adagrad or FusedSGD"
