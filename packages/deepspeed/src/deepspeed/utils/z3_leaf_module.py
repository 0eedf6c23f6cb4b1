"""Modules that stage 3 gathers as one: `ds_zero.mark_leaf` by class, name or end of name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable

from torch import nn

import ds_zero
from ds_zero import ShardError


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether a module is a leaf."""
    return ds_zero.is_leaf(model)


def z3_leaf_parameter(model: nn.Parameter) -> bool:
    """Whether a parameter belongs to a leaf of a model that `deepspeed.initialize` has sharded."""
    return hasattr(model, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The leaves of `model`."""
    return [module for module in model.modules() if ds_zero.is_leaf(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Make one module a leaf, or no longer one."""
    ds_zero.mark_leaf(model, flag)
    model._z3_leaf = flag  # type: ignore[assignment]


def set_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: list[type[nn.Module]] | list[str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """Make leaves of all modules of some classes, given as types or names, full ones or short.

    Returns them. Raises ShardError, a ValueError, if there is none and `raise_if_not_found`.
    """
    return _mark_classes(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module,
    leaf_module_classes: list[type[nn.Module]] | list[str],
    raise_if_not_found: bool = True,
) -> list[nn.Module]:
    """The opposite of `set_z3_leaf_modules`."""
    return _mark_classes(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module,
    module_names: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Make leaves of modules by their qualified names; returns them, and the names not found."""
    return _mark_named(model, module_names, flag, raise_if_not_found, str.__eq__)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: list[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """The same by the ends of qualified names."""
    return _mark_named(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)


def _mark_classes(
    model: nn.Module,
    classes: Iterable[type[nn.Module] | str],
    flag: bool,
    raise_if_not_found: bool,
) -> list[nn.Module]:
    wanted = list(classes)
    wrong = [each for each in wanted if not isinstance(each, type | str)]
    if wrong:
        raise ShardError(f"leaf_module_classes: got {wrong[0]!r}, expected classes or their names")
    types = tuple(each for each in wanted if isinstance(each, type))
    found = [
        module
        for module in model.modules()
        if isinstance(module, types) or any(name in wanted for name in _names_of(module))
    ]
    if not found and raise_if_not_found:
        raise ShardError(
            f"leaf_module_classes: {type(model).__name__} has no module of {wanted}; give classes "
            f"that it has, or raise_if_not_found=False"
        )
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _names_of(module: nn.Module) -> tuple[str, str]:
    cls = type(module)
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


def _mark_named(
    model: nn.Module,
    names: list[str],
    flag: bool,
    raise_if_not_found: bool,
    matches: Callable[[str, str], bool],
) -> tuple[list[nn.Module], list[str]]:
    known = dict(model.named_modules())
    hits = {each: [m for name, m in known.items() if matches(name, each)] for each in names}
    missing = [each for each, modules in hits.items() if not modules]
    if missing and raise_if_not_found:
        raise ShardError(
            f"leaf modules: {type(model).__name__} has no module named {', '.join(missing)}; its "
            f"modules are {', '.join(list(known)[1:9])}"
        )
    found = list(dict.fromkeys(module for modules in hits.values() for module in modules))
    for module in found:
        set_z3_leaf_module(module, flag)
    return found, missing


class _CallableModule(types.ModuleType):
    """This module, which `deepspeed.utils.z3_leaf_module` is once it is imported: also a function.

    The original gives that name to its function of the same name.
    """

    def __call__(self, model: nn.Module) -> bool:
        return z3_leaf_module(model)


sys.modules[__name__].__class__ = _CallableModule
