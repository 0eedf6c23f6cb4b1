"""Building the optimizer that a config names: DeepSpeed's names and switches over torch.optim."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.optim import Adam, AdamW, Optimizer

from ds_core import _signatures, _values
from ds_core._signatures import Problem
from ds_core.errors import ConfigError

#: Finds what is wrong with a type and its params: (key below the section, message) pairs.
Finder = Callable[[str, Mapping[str, Any]], list[Problem]]

_LATER = "not in ds-core 0.1"
_HIDDEN = ("params",)
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
        **dict.fromkeys(
            ("lamb", "fusedlamb", "lion", "fusedlion"),
            "belongs to ds-ops (torch has none), which is not installed: pip install ds-ops",
        ),
        **dict.fromkeys(
            ("deepspeedcpuadam", "cpuadam"),
            'belongs to offload, which is not in ds-zero 0.1; use "adamw", fused on the CPU too',
        ),
        "fusedadam": 'use "adam" or "adamw": torch\'s fused kernels are the default',
        **dict.fromkeys(("muadam", "muadamw", "musgd"), _MUP),
        "muon": f"{_LATER}: a matrix is updated as a whole and everything else by Adam; build "
        "torch.optim.Muon over the matrices yourself and pass it to initialize(optimizer=)",
        "lbfgs": "needs a closure that evaluates the loss again, which engine.step() has not; "
        "call it in your own loop",
        "sparseadam": "needs sparse gradients, which are not supported; use adamw",
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


def build(choice: Choice, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]]) -> Optimizer:
    """The optimizer that a config names, over `params`.

    torch's fused implementation is used where it runs on the device and dtype of all parameters,
    unless `fused`, `foreach`, `capturable` or `differentiable` is given.

    Args:
        choice: the optimizer section.
        params: parameters, or parameter groups as torch.optim takes them.

    Raises ConfigError if the type is unknown or the class refuses its arguments.
    """
    found = problems(choice.type, choice.params)
    if found:
        listing = "; ".join(f"optimizer.{key}: {message}" for key, message in found)
        raise ConfigError(listing)
    cls = _class_of(choice.type, choice.params)
    arguments = _signatures.coerced(cls, _arguments(choice.type, choice.params))
    groups: list[Any] = list(params)
    if _wants_fused(cls, arguments) and _all_fuse(cls, groups):
        arguments["fused"] = True
    try:
        return cls(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {cls.__name__} refuses its arguments: {error}") from error


def problems(type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps `build` from honouring a type and its params; keys are relative to the section."""
    name = type_name.lower()
    if name in _REFUSED_TYPES:
        return [("type", f"{type_name}: {_REFUSED_TYPES[name]}")]
    if name not in _torch_classes():
        valid = sorted(set(_torch_classes()) - set(_REFUSED_TYPES))
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
    return _torch_classes()[name]


def _arguments(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What the class is called with: defaults of DeepSpeed, without its switches."""
    arguments = {key: value for key, value in params.items() if key not in _ADAM_SWITCHES}
    if type_name.lower() in ("adam", "adamw") and params.get("torch_adam") is not True:
        arguments = {**_DEEPSPEED_ADAM_DEFAULTS, **arguments}
    return arguments


def _wants_fused(cls: type[Optimizer], arguments: Mapping[str, Any]) -> bool:
    explicit = ("fused", "foreach", "capturable", "differentiable")
    has_fused = "fused" in _signatures.parameters(cls)
    return has_fused and not any(arguments.get(key) is not None for key in explicit)


def _all_fuse(cls: type[Optimizer], groups: list[Any]) -> bool:
    """Whether the fused kernel runs for every kind of parameter in `groups`."""
    kinds = {(p.device, p.dtype) for group in groups for p in _tensors(group)}
    return bool(kinds) and all(_fuses(cls, device, dtype) for device, dtype in kinds)


def _tensors(group: Any) -> Iterable[torch.Tensor]:
    """The parameters of one item that torch.optim takes: a group, a named or a bare parameter."""
    if isinstance(group, dict):
        inner = group.get("params", ())
        return [inner] if isinstance(inner, torch.Tensor) else _flattened(inner)
    return _flattened([group])


def _flattened(items: Iterable[Any]) -> list[torch.Tensor]:
    tensors = (item[1] if isinstance(item, tuple) else item for item in items)
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def _fuses(cls: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a fused step of one element works: torch has no public table of where it does."""
    if device.type == "meta":
        return False
    probe = torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype), dtype.is_floating_point)
    probe.grad = torch.zeros_like(probe)
    try:
        cls([probe], fused=True).step()
    except RuntimeError:
        return False
    return True
