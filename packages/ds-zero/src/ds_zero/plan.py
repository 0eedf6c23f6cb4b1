"""Which parameters travel together: the units of a model, found from its repeated blocks.

A unit is one communication step. The blocks of a repeated stack (a ModuleList, Sequential or
ModuleDict whose children are of one class) become units, neighbours merged until a unit is
worth a message; large submodules outside the stacks (embeddings, heads) become units too; what is
left over, and every parameter that two units would share, forms the root unit, which stays whole
from the start of a forward to the end of its backward.

Nothing here communicates or touches parameter data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from ds_core.blocks import repeated_stacks
from ds_core.comm import Placement, placement_of
from ds_zero.errors import ShardError

#: How a unit or leaf may be named: a module, a class, or a pattern on qualified names.
Selector = nn.Module | type[nn.Module] | str


@runtime_checkable
class OwnUnits(Protocol):
    """A module with parts that are units by themselves, also within a larger unit."""

    def own_units(self) -> list[nn.Module]:
        """Those parts; none contains another."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter to shard.

    Attributes:
        name: fully qualified name; the first of them for a tied parameter.
        param: the parameter itself.
        group_index: the optimizer's parameter group that updates it; None if frozen.
    """

    name: str
    param: nn.Parameter
    group_index: int | None


@dataclass
class UnitSpec:
    """Parameters of one dtype and placement that travel together, all trainable or all frozen.

    Attributes:
        name: the qualified name of its first module, for messages and accounts.
        modules: their forward needs the parameters; in order of first use as built.
        params: sorted by optimizer group.
        is_root: stays whole during a whole forward and backward.
        is_tile: one of a module's `own_units`, which is not whole for longer than its use.
    """

    name: str
    modules: list[nn.Module]
    params: list[ParamSpec] = field(default_factory=list)
    is_root: bool = False
    is_tile: bool = False

    @property
    def trainable(self) -> bool:
        return self.params[0].group_index is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].param.dtype

    @property
    def placement(self) -> Placement:
        return placement_of(self.params[0].param)


def mark_leaf(module: nn.Module, flag: bool = True) -> None:
    """Say of a module that it must not be divided among units when its model is sharded.

    For code that makes a module and does not call `shard`, such as that of a mixture of experts.
    """
    module._ds_zero_leaf = flag  # type: ignore[assignment]


def is_leaf(module: nn.Module) -> bool:
    """Whether `mark_leaf` said so."""
    return bool(getattr(module, "_ds_zero_leaf", False))


def plan_units(
    model: nn.Module,
    params: Sequence[ParamSpec],
    *,
    units: Iterable[Selector] | None = None,
    leaves: Iterable[Selector] = (),
    min_unit_numel: int = 1 << 18,
) -> list[UnitSpec]:
    """Divide `params` among units, in the order of the model's definition.

    What a module names as its `own_units` (the tiles of a `TiledLinear`) are units also within
    another unit, unless the module is a leaf, inside one, or named in `units` itself.

    Args:
        model: where the parameters live.
        params: every parameter to place, each once.
        units: modules that become units, instead of those found; what they leave over forms
            the root unit.
        leaves: modules that must not be divided further, such as mixtures of experts whose
            ranks use different ones; beside those of `mark_leaf`.
        min_unit_numel: neighbouring blocks are merged until a unit has that many elements.

    Raises ShardError if a selector matches no module.
    """
    names = {module: name for name, module in model.named_modules()}
    marked = [module for module in model.modules() if is_leaf(module)]
    leaf_modules = _select(model, [*leaves, *marked])
    named = None if units is None else _select(model, units)
    tiles = _own_units(model, {*leaf_modules, *(named or ())}, set(leaf_modules))
    if named is not None:
        chosen = [[module] for module in named]
    elif _numel(model, tiles) < min_unit_numel:
        chosen = []  # the whole model is less than one unit
    else:
        found = repeated_stacks(model, leaf_modules)
        stacks = [[block for block in stack if block not in tiles] for stack in found]
        chosen = _merge(stacks, tiles, min_unit_numel)
        inside = {m for stack in stacks for block in stack for m in block.modules()}
        chosen += [[m] for m in _large_rest(model, inside, tiles, min_unit_numel)]
    order = {module: position for position, module in enumerate(names)}
    chosen += [[tile] for tile in tiles]
    chosen.sort(key=lambda modules: order[modules[0]])
    owner = _owners(chosen, tiles)
    specs = [
        UnitSpec(names[modules[0]] or "model", modules, is_tile=modules[0] in tiles)
        for modules in chosen
    ]
    root = UnitSpec("root", [model], is_root=True)
    for spec in params:
        index = owner.get(id(spec.param))
        (root if index is None else specs[index]).params.append(spec)
    return [part for spec in (root, *specs) for part in _split(spec)]


def _own_units(
    module: nn.Module, undivided: set[nn.Module], leaves: set[nn.Module]
) -> dict[nn.Module, None]:
    """What modules below want as units of their own; nothing of those undivided or in leaves."""
    if module in leaves:
        return {}
    found: dict[nn.Module, None] = {}
    if isinstance(module, OwnUnits) and module not in undivided:
        found.update(dict.fromkeys(module.own_units()))
    for child in module.children():
        found.update(_own_units(child, undivided, leaves))
    return found


def _merge(
    stacks: list[list[nn.Module]], tiles: dict[nn.Module, None], min_numel: int
) -> list[list[nn.Module]]:
    merged: list[list[nn.Module]] = []
    for stack in stacks:
        run: list[nn.Module] = []
        for block in stack:
            run.append(block)
            if sum(_numel(each, tiles) for each in run) >= min_numel:
                merged.append(run)
                run = []
        if run and merged and merged[-1][-1] in stack:
            merged[-1] += run
        elif run:
            merged.append(run)
    return merged


def _large_rest(
    module: nn.Module, inside: set[nn.Module], tiles: dict[nn.Module, None], min_numel: int
) -> Iterator[nn.Module]:
    """Maximal submodules without a block in them that are worth a message of their own."""
    for child in module.children():
        if child in inside or child in tiles:
            continue
        if any(descendant in inside for descendant in child.modules()):
            yield from _large_rest(child, inside, tiles, min_numel)
        elif _numel(child, tiles) >= min_numel:
            yield child


def _owners(chosen: list[list[nn.Module]], tiles: dict[nn.Module, None]) -> dict[int, int]:
    """Index of the only chosen unit that reaches each parameter; shared ones are left out."""
    reached: dict[int, set[int]] = {}
    for index, modules in enumerate(chosen):
        for module in modules:
            for param in _params_of(module, tiles):
                reached.setdefault(id(param), set()).add(index)
    return {key: next(iter(units)) for key, units in reached.items() if len(units) == 1}


def _split(unit: UnitSpec) -> list[UnitSpec]:
    """One unit per dtype, placement and trainability, in a fixed order."""
    parts: dict[tuple[object, ...], UnitSpec] = {}
    for spec in unit.params:
        key = (spec.param.dtype, placement_of(spec.param), spec.group_index is None)
        empty = UnitSpec(unit.name, unit.modules, is_root=unit.is_root, is_tile=unit.is_tile)
        part = parts.setdefault(key, empty)
        part.params.append(spec)
    for part in parts.values():
        part.params.sort(key=lambda spec: -1 if spec.group_index is None else spec.group_index)
    return list(parts.values())


def _select(model: nn.Module, selectors: Iterable[Selector]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for selector in selectors:
        hits = [m for name, m in model.named_modules() if _matches(name, m, selector)]
        outermost = [m for m in hits if not any(m is not o and m in set(o.modules()) for o in hits)]
        if not outermost:
            known = ", ".join(sorted({name for name, _ in model.named_modules() if name})[:8])
            raise ShardError(
                f"units: {_describe(selector)} matches no module of {type(model).__name__}; its "
                f"modules are {known}, ..."
            )
        found.update(dict.fromkeys(outermost))
    return list(found)


def _matches(name: str, module: nn.Module, selector: Selector) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    return module is selector


def _describe(selector: Selector) -> str:
    if isinstance(selector, str):
        return repr(selector)
    return selector.__name__ if isinstance(selector, type) else type(selector).__name__


def _params_of(module: nn.Module, tiles: dict[nn.Module, None]) -> Iterator[nn.Parameter]:
    """The parameters of a module and of what is in it, except in tiles; some maybe twice."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if child not in tiles:
            yield from _params_of(child, tiles)


def _numel(module: nn.Module, tiles: dict[nn.Module, None]) -> int:
    return sum(param.numel() for param in set(_params_of(module, tiles)))
