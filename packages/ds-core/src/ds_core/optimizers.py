"""Building the optimizer that a config names: DeepSpeed's names and switches.

The classes are torch's, ds-core's, and those that installed packages register under the entry-point
group `ds_core.optimizers`, by lower-case name. An installed class is also taken where the config
asks for something more general, as `fusedadam` for "adam", if it does the same faster here.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.optim import Adam, AdamW, Optimizer

from ds_core import _signatures, _values, plugins
from ds_core._signatures import Problem
from ds_core.errors import ConfigError
from ds_core.fused import prefer_fused

logger = logging.getLogger(__name__)

#: Finds what is wrong with a type and its params: (key below the section, message) pairs.
Finder = Callable[[str, Mapping[str, Any]], list[Problem]]

_HIDDEN = ("params", "named_params", "model_params")
#: What ds_core.optim has beside torch.
_OWN = MappingProxyType({"lamb": "Lamb", "lion": "Lion", "muon": "Muon"})
#: What does the same as another, with other arguments.
_ALIASES = MappingProxyType(
    {
        "deepspeedcpuadam": "cpuadam",
        "deepspeedcpuadagrad": "cpuadagrad",
        "deepspeedcpulion": "cpulion",
    }
)
#: Which registered class does what another does, in fewer passes over memory.
_FASTER = MappingProxyType(
    {
        "adam": "fusedadam",
        "adamw": "fusedadam",
        "adagrad": "cpuadagrad",
        "lamb": "fusedlamb",
        "lion": "fusedlion",
        "muon": "muon",
    }
)
#: Arguments by which a caller chooses one of torch's implementations.
_KERNEL_CHOICES = ("fused", "foreach", "capturable", "differentiable")
#: DeepSpeed's Adam decays no weights unless told to; torch's AdamW decays by 0.01.
_DEEPSPEED_ADAM_DEFAULTS = MappingProxyType({"weight_decay": 0.0})
_MUP = "not built from a config; pip install mup, build it, and pass it to initialize(optimizer=)"
_NEEDS_OPS = "needs ds-ops, which is not installed: pip install ds-ops"

#: Optimizers that DeepSpeed or torch has and that cannot be built here, and what to do instead.
_REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("onebitadam", "onebitlamb", "zerooneadam"),
            "belongs to ds-comm, which is not installed: pip install ds-comm",
        ),
        **dict.fromkeys(("muadam", "muadamw", "musgd"), _MUP),
        "lbfgs": "needs a closure that evaluates the loss again, which engine.step() has not; "
        "call it in your own loop",
    }
)

#: What to use in place of a class that is not installed.
_INSTEAD = MappingProxyType(
    {
        "cpuadagrad": '"adagrad"',
        "cpuadam": '"adamw"',
        "cpulion": '"lion"',
        "fusedadam": '"adamw"',
        "fusedlamb": '"lamb"',
        "fusedlion": '"lion"',
        "fusedsgd": '"sgd"',
    }
)

#: Switches that only DeepSpeed's Adam has: the values that torch's honour, and why not the others.
_ADAM_SWITCHES: Mapping[str, tuple[tuple[bool, ...], str]] = MappingProxyType(
    {
        "torch_adam": ((True, False), ""),
        "adam_w_mode": ((True, False), ""),
        "bias_correction": ((True,), f"torch's Adam always corrects; false {_NEEDS_OPS}"),
        "set_grad_none": ((True,), "gradients are views that zero_grad() refills; remove the key"),
        "fp32_optimizer_states": ((True,), f"torch's states are fp32; false {_NEEDS_OPS}"),
        "stochastic_rounding": ((False,), f"torch rounds to nearest; true {_NEEDS_OPS}"),
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


class NoOptimizer(Optimizer):
    """In the place of the optimizer of a model that is only run: it updates nothing."""

    def __init__(self) -> None:
        super().__init__([{"params": []}], {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """There is nothing to do."""


def build(
    choice: Choice,
    params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]],
    *,
    fuse: bool = True,
    on_host: bool = False,
) -> Optimizer:
    """The optimizer that a config names, over `params`.

    An installed class that does the same in fewer passes is used where its kernels run on the
    device and dtype of all parameters, else torch's own fused implementation where that does;
    neither if `fused`, `foreach`, `capturable` or `differentiable` is given, or `fuse` is false.
    Hyperparameters are the same whichever it is. The choice is logged.

    Args:
        choice: the optimizer section.
        params: parameters, named ones (which Muon needs), or groups as torch.optim takes them.
        fuse: false where gradients may be sparse, which no fused kernel takes.
        on_host: the step will run on the CPU, whatever the device of `params`.

    Raises ConfigError if the type is unknown or the class refuses its arguments.
    """
    found = problems(choice.type, choice.params)
    if found:
        listing = "; ".join(f"optimizer.{key}: {message}" for key, message in found)
        raise ConfigError(listing)
    given = list(params)
    name, values = _canonical(choice.type), choice.params
    cls, reason = _chosen(name, values, given if fuse else None, on_host)
    arguments = _signatures.coerced(cls, _arguments(name, values, cls))
    try:
        optimizer: Optimizer = cls(_as_taken(cls, given), **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {cls.__name__} refuses its arguments: {error}") from error
    if fuse:
        prefer_fused(optimizer)
    home = cls.__module__.partition(".")[0]
    logger.info("optimizer %s: %s of %s (%s)", choice.type, cls.__name__, home, reason)
    return optimizer


def problems(type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps `build` from honouring a type and its params; keys are relative to the section."""
    name = _canonical(type_name)
    if name in _REFUSED_TYPES:
        return [("type", f"{type_name}: {_REFUSED_TYPES[name]}")]
    installed = plugins.registered("optimizers")
    known = {*_torch_classes(), *_OWN, *installed}
    if name not in known and name in plugins.KNOWN_PROVIDERS["optimizers"]:
        instead = f"; or use {_INSTEAD[name]}" if name in _INSTEAD else ""
        return [("type", f"{type_name}: {_NEEDS_OPS}{instead}")]
    if name not in known:
        valid = sorted(known - set(_REFUSED_TYPES))
        guess = _values.nearest(name, [*valid, *_REFUSED_TYPES])
        hint = f"; did you mean {guess}?" if guess else ""
        expected = f"one of {', '.join(valid)}"
        return [("type", f"{_values.mismatch(type_name, expected)}{hint}")]
    found = [_problems_of(cls, name, params) for cls in _candidates(name, params)]
    return min(found, key=len)


def effective_params(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` completed by the defaults of the optimizer that they configure."""
    name = _canonical(type_name)
    cls = next(
        (cls for cls in _candidates(name, params) if not _problems_of(cls, name, params)),
        _plain_class(name, params),
    )
    complete = _signatures.defaults(cls, hidden=_HIDDEN)
    complete.update(_signatures.coerced(cls, _arguments(name, params, cls)))
    given_switches = {key: params[key] for key in _ADAM_SWITCHES if key in params}
    return {**complete, **given_switches}


def classes(type_name: str, params: Mapping[str, Any]) -> list[Any]:
    """The classes that may be built for a type and params without problems."""
    name = _canonical(type_name)
    return [cls for cls in _candidates(name, params) if not _problems_of(cls, name, params)]


def takes(type_name: str, params: Mapping[str, Any], key: str) -> bool:
    """Whether some class that may be built for a type and its params has a parameter `key`."""
    return any(key in _signatures.parameters(cls) for cls in classes(type_name, params))


def has_own_kernels() -> bool:
    """Whether an installed package has optimizers beside torch's."""
    return "fusedadam" in plugins.registered("optimizers")


# --- Choosing a class -----------------------------------------------------------------------------


def _canonical(type_name: str) -> str:
    name = type_name.lower()
    return _ALIASES.get(name, name)


def _plain_class(name: str, params: Mapping[str, Any]) -> Any:
    """The class that a type names, of torch or ds-core, or of a package that has it alone."""
    if name == "adam":
        return Adam if params.get("adam_w_mode") is False else AdamW
    if name in _OWN:
        return getattr(importlib.import_module("ds_core.optim"), _OWN[name])
    if name in _torch_classes():
        return _torch_classes()[name]
    return plugins.load("optimizers", name)


def _faster_class(name: str, params: Mapping[str, Any]) -> Any:
    """The installed class that does the same in fewer passes, or None."""
    faster = _FASTER.get(name)
    if faster is None or faster not in plugins.registered("optimizers"):
        return None
    asks_for_torchs = params.get("torch_adam") is True or params.get("amsgrad") is True
    if asks_for_torchs or any(params.get(key) is not None for key in _KERNEL_CHOICES):
        return None
    return plugins.load("optimizers", faster)


def _candidates(name: str, params: Mapping[str, Any]) -> list[Any]:
    """The classes that may be built for a type, the one that is preferred first."""
    faster = _faster_class(name, params)
    plain = _plain_class(name, params)
    return [plain] if faster is None else [faster, plain]


def _chosen(
    name: str, params: Mapping[str, Any], given: list[Any] | None, on_host: bool
) -> tuple[Any, str]:
    """The class to build and why; `given` is None where gradients may be sparse."""
    reason = "as the config names it"
    for cls in _candidates(name, params):
        if _problems_of(cls, name, params):
            continue
        if cls is _plain_class(name, params):
            return cls, reason
        impossible, slower = _impossible(given), _slower(cls, given or [], on_host)
        if impossible is None and slower is None:
            return cls, "one pass over memory"
        reason = f"{cls.__name__} is installed, but {impossible or slower}"
        if _problems_of(_plain_class(name, params), name, params):
            if impossible is not None:
                raise ConfigError(f"optimizer.params: they need {cls.__name__}, but {impossible}")
            return cls, f"its params need it, though {slower}"
    return _plain_class(name, params), reason


def _impossible(given: list[Any] | None) -> str | None:
    """Why no installed class can update these parameters, or None."""
    if given is None:
        return "gradients may be sparse"
    for tensor in _tensors(given):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a parameter is {tensor.dtype}"
    return None


def _slower(cls: Any, given: list[Any], on_host: bool) -> str | None:
    """Why an installed class would not be faster for these parameters, or None.

    Where that is for want of something, such as a compiler, it warns as the op itself would, and
    raises OpError with DS_OPS_FALLBACK=error.
    """
    from ds_core import ops

    kinds = {"cpu"} if on_host else {tensor.device.type for tensor in _tensors(given)}
    # Kinds of device that it is for; empty, or not told: all.
    devices: tuple[str, ...] = getattr(cls, "devices", ())
    for device_type in sorted(kinds):
        if devices and device_type not in devices:
            return f"it is for {', '.join(devices)}, not {device_type}"
        for op in cls.ops:
            offered = ops.available(op, device_type)
            if all(reason for name, reason in offered.items() if name != "reference"):
                if ops.choose(op, device_type).passed:
                    ops.select(op, device_type)
                told = "; ".join(f"{name}: {reason}" for name, reason in offered.items() if reason)
                return f"its kernel {op} cannot run on {device_type} ({told or 'none is known'})"
    return None


def _tensors(given: Iterable[Any]) -> Iterable[torch.Tensor]:
    for item in given:
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, tuple):
            yield item[1]
        else:
            inner = item["params"]
            yield from _tensors([inner] if isinstance(inner, torch.Tensor) else inner)


# --- Its arguments --------------------------------------------------------------------------------


def _problems_of(cls: Any, name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps a class from honouring the params of a type."""
    switches = _ADAM_SWITCHES if name in ("adam", "adamw") else {}
    found = _switch_problems(name, params, switches, _signatures.parameters(cls))
    named = {key for key, _ in found}
    checked = {key: value for key, value in params.items() if f"params.{key}" not in named}
    return found + _signatures.check(cls, checked, hidden=_HIDDEN, also=switches)


def _switch_problems(
    name: str,
    params: Mapping[str, Any],
    switches: Mapping[str, tuple[tuple[bool, ...], str]],
    taken: Mapping[str, Any],
) -> list[Problem]:
    found = []
    if "set_grad_none" in taken and not switches:
        switches = {"set_grad_none": _ADAM_SWITCHES["set_grad_none"]}
    for key, (honoured, reason) in switches.items():
        value = params.get(key, honoured[0])
        if not isinstance(value, bool):
            found.append((f"params.{key}", _values.mismatch(value, "true or false")))
        elif value not in honoured and (key not in taken or key == "set_grad_none"):
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


def _arguments(name: str, params: Mapping[str, Any], cls: Any) -> dict[str, Any]:
    """What a class is called with: the type's own defaults, without switches that it has not.

    The values do not depend on which class was chosen.
    """
    taken = _signatures.parameters(cls)
    arguments = {k: v for k, v in params.items() if k not in _ADAM_SWITCHES or k in taken}
    plain = _plain_class(name, params)
    if cls is not plain:
        defaults = _signatures.defaults(plain, hidden=_HIDDEN)
        shared = {key: value for key, value in defaults.items() if key in taken}
        arguments = {**shared, **arguments}
    deepspeeds = name in ("adam", "adamw") and params.get("torch_adam") is not True
    if deepspeeds and "weight_decay" not in params:
        arguments.update(_DEEPSPEED_ADAM_DEFAULTS)
    return arguments


def _as_taken(cls: type[Optimizer], params: Iterable[Any]) -> list[Any]:
    """`params` without names, except for an optimizer that chooses by name."""
    if "named_params" in _signatures.parameters(cls):
        return list(params)
    return [item[1] if isinstance(item, tuple) else item for item in params]
