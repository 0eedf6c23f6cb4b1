"""Building the optimizer that a config names: DeepSpeed's names and switches over torch.optim."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.optim import Adam, AdamW, Optimizer

from ds_core import _signatures, _values
from ds_core._signatures import Problem
from ds_core.errors import ConfigError
from ds_core.fused import prefer_fused

#: Finds what is wrong with a type and its params: (key below the section, message) pairs.
Finder = Callable[[str, Mapping[str, Any]], list[Problem]]

_LATER = "not in ds-core 0.1"
_HIDDEN = ("params", "named_params")
#: What ds_core.optim has beside torch.
_OWN = MappingProxyType({"lamb": "Lamb", "lion": "Lion", "muon": "Muon"})
#: DeepSpeed's Adam decays no weights unless told to; torch's AdamW decays by 0.01.
_DEEPSPEED_ADAM_DEFAULTS = MappingProxyType({"weight_decay": 0.0})
_MUP = "not built from a config; pip install mup, build it, and pass it to initialize(optimizer=)"

#: Optimizers that DeepSpeed or torch has and that cannot be built here, and what to do instead.
_REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("onebitadam", "onebitlamb", "zerooneadam"),
            "belongs to ds-comm, which is not installed: pip install ds-comm",
        ),
        "fusedlamb": 'belongs to ds-ops, which is not installed; use "lamb"',
        "fusedlion": 'belongs to ds-ops, which is not installed; use "lion"',
        **dict.fromkeys(
            ("deepspeedcpuadam", "cpuadam"),
            'belongs to offload, which is not in ds-zero 0.1; use "adamw", fused on the CPU too',
        ),
        "fusedadam": 'use "adam" or "adamw": torch\'s fused kernels are the default',
        **dict.fromkeys(("muadam", "muadamw", "musgd"), _MUP),
        "lbfgs": "needs a closure that evaluates the loss again, which engine.step() has not; "
        "call it in your own loop",
    }
)

#: Switches that only DeepSpeed's Adam has: the values honoured, and why not the others.
_ADAM_SWITCHES: Mapping[str, tuple[tuple[bool, ...], str]] = MappingProxyType(
    {
        "torch_adam": ((True, False), ""),
        "adam_w_mode": ((True, False), ""),
        "bias_correction": ((True,), f"{_LATER}; torch's Adam always corrects"),
        "set_grad_none": ((True,), "gradients are views that zero_grad() refills; remove the key"),
        "fp32_optimizer_states": ((True,), f"{_LATER}; optimizer states are fp32"),
    }
)


class Choice(Protocol):
    """What a config says about an optimizer: `ds_core.config`'s optimizer section is one."""

    @property
    def type(self) -> str:
        """Its name."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """Keyword arguments for it."""
        ...


def build(
    choice: Choice,
    params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
    *,
    fuse: bool = True,
) -> Optimizer:
    """The optimizer that a config names, over `params`.

    torch's fused implementation is used where it runs on the device and dtype of all parameters,
    unless `fused`, `foreach`, `capturable` or `differentiable` is given, or `fuse` is false.

    Args:
        choice: the optimizer section.
        params: parameters, named ones (which Muon needs), or groups as torch.optim takes them.
        fuse: false where gradients may be sparse, which no fused kernel takes.

    Raises ConfigError if the type is unknown or the class refuses its arguments.
    """
    found = problems(choice.type, choice.params)
    if found:
        listing = "; ".join(f"optimizer.{key}: {message}" for key, message in found)
        raise ConfigError(listing)
    cls = _class_of(choice.type, choice.params)
    arguments = _signatures.coerced(cls, _arguments(choice.type, choice.params))
    try:
        optimizer: Optimizer = cls(_as_taken(cls, params), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {cls.__name__} refuses its arguments: {error}") from error
    if fuse:
        prefer_fused(optimizer)
    return optimizer


def problems(type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps `build` from honouring a type and its params; keys are relative to the section."""
    name = type_name.lower()
    if name in _REFUSED_TYPES:
        return [("type", f"{type_name}: {_REFUSED_TYPES[name]}")]
    if name not in _torch_classes() and name not in _OWN:
        valid = sorted({*_torch_classes(), *_OWN} - set(_REFUSED_TYPES))
        guess = _values.nearest(name, [*valid, *_REFUSED_TYPES])
        hint = f"; did you mean {guess}?" if guess else ""
        expected = f"one of {', '.join(valid)}"
        return [("type", f"{_values.mismatch(type_name, expected)}{hint}")]
    switches = _ADAM_SWITCHES if name in ("adam", "adamw") else {}
    found = _switch_problems(name, params, switches)
    named = {key for key, _ in found}
    cls = _class_of(type_name, params)
    checked = {key: value for key, value in params.items() if f"params.{key}" not in named}
    return found + _signatures.check(cls, checked, hidden=_HIDDEN, also=switches)


def effective_params(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` completed by the defaults of the optimizer that they configure."""
    cls = _class_of(type_name, params)
    complete = _signatures.defaults(cls, hidden=_HIDDEN)
    complete.update(_signatures.coerced(cls, _arguments(type_name, params)))
    given_switches = {key: params[key] for key in _ADAM_SWITCHES if key in params}
    return {**complete, **given_switches}


def _switch_problems(
    name: str, params: Mapping[str, Any], switches: Mapping[str, tuple[tuple[bool, ...], str]]
) -> list[Problem]:
    found = []
    for key, (honoured, reason) in switches.items():
        value = params.get(key, honoured[0])
        if not isinstance(value, bool):
            found.append((f"params.{key}", _values.mismatch(value, "true or false")))
        elif value not in honoured:
            found.append((f"params.{key}", f"got {_values.shown(value)}: {reason}"))
    if name == "adamw" and params.get("adam_w_mode") is False:
        found.append(("params.adam_w_mode", 'got false, but type is adamw; use type "adam"'))
    if "max_grad_norm" in params:
        found.append(
            ("params.max_grad_norm", "not a parameter; use the top-level gradient_clipping")
        )
    return found


def _torch_classes() -> dict[str, type[Optimizer]]:
    """The optimizers of torch by lower-case name."""
    return {
        name.lower(): cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


def _class_of(type_name: str, params: Mapping[str, Any]) -> Any:
    name = type_name.lower()
    if name == "adam":
        return Adam if params.get("adam_w_mode") is False else AdamW
    if name in _OWN:
        return getattr(importlib.import_module("ds_core.optim"), _OWN[name])
    return _torch_classes()[name]


def _arguments(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the class is called with: defaults of DeepSpeed, without its switches."""
    arguments = {key: value for key, value in params.items() if key not in _ADAM_SWITCHES}
    if type_name.lower() in ("adam", "adamw") and params.get("torch_adam") is not True:
        arguments = {**_DEEPSPEED_ADAM_DEFAULTS, **arguments}
    return arguments


def _as_taken(cls: type[Optimizer], params: Iterable[Any]) -> list[Any]:
    """`params` without names, except for an optimizer that chooses by name."""
    if "named_params" in _signatures.parameters(cls):
        return list(params)
    return [item[1] if isinstance(item, tuple) else item for item in params]
