"""The repeated blocks of a model: what is compiled, sharded or recomputed as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def repeated_stacks(module: nn.Module, leaves: Sequence[nn.Module] = ()) -> list[list[nn.Module]]:
    """The outermost repeated stacks below `module`, each as its list of blocks.

    A stack is a ModuleList, Sequential or ModuleDict two of whose children are of one class.
    Children without parameters are not blocks.

    Args:
        module: the model, or a part of it.
        leaves: modules that must not be divided; each is a stack of itself alone.
    """
    if any(module is leaf for leaf in leaves):
        return [[module]]
    children = [child for child in module.children() if has_parameters(child)]
    if isinstance(module, _CONTAINERS):
        kinds = Counter(type(child) for child in children)
        if kinds and max(kinds.values()) >= 2:
            return [children]
    return [stack for child in children for stack in repeated_stacks(child, leaves)]


def has_parameters(module: nn.Module) -> bool:
    """Whether it has any element to train or to freeze."""
    return any(param.numel() for param in module.parameters())
