"""Checkpointing chosen from outside: which blocks of a model are computed again in backward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ds_core.activation_checkpointing.policy import Policy
from ds_core.blocks import repeated_stacks
from ds_core.errors import DsError

logger = logging.getLogger(__name__)


class CheckpointedBlocks:
    """The blocks that `checkpoint_blocks` has changed.

    Attributes:
        names: their qualified names.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        self._blocks = blocks
        self.names = tuple(blocks)

    def remove(self) -> None:
        """Give the blocks their own forward back."""
        for block in self._blocks.values():
            block.__dict__.pop("forward", None)
        self._blocks.clear()


def checkpoint_blocks(
    model: nn.Module,
    blocks: Iterable[str] | None = None,
    *,
    number: int | None = None,
    policy: Policy | None = None,
) -> CheckpointedBlocks:
    """Make blocks of a model compute their activations again in backward, while they train.

    A block's hooks run around its forward as before, once: only what its forward does inside is
    repeated. Names, parameters and the state dict stay as they are.

    Args:
        model: changed in place.
        blocks: patterns of qualified names ("encoder.layers.*"); default: its repeated blocks.
        number: how many of them, spread evenly; default, or if there are fewer: all.
        policy: how; default: `Policy()`.

    Raises DsError if there is no such block, or if one is inside another.
    """
    chosen = _found(model, blocks)
    if number is not None:
        if number < 1:
            raise DsError(f"checkpoint_blocks: number: got {number}, expected at least 1")
        chosen = _spread(chosen, number)
    policy = policy or Policy()
    for name, block in chosen.items():
        if "forward" in block.__dict__:
            raise DsError(
                f"checkpoint_blocks: {name!r} has a forward of its own already, from an earlier "
                f"call or another library; undo that first, or leave the block out"
            )
        own = replace(policy, statistics=policy.statistics + _with_statistics(block))
        # A partial, unlike a closure, is copied with its module by copy.deepcopy.
        block.forward = functools.partial(_forward, block, block.forward, own)
    logger.info("activations are computed again in backward in %s", ", ".join(chosen))
    return CheckpointedBlocks(chosen)


def compiled_inside(
    forward: Callable[..., Any], compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """`compiled(forward)`; of a block whose checkpoint moves inputs, what is inside is compiled.

    Moving them is nothing that a compiler can trace: around it, the block would run as it is.
    """
    if isinstance(forward, functools.partial) and forward.func is _forward:
        block, inner, policy = forward.args
        if policy.storage is not None:
            return functools.partial(_forward, block, compiled(inner), policy)
    return compiled(forward)


def _forward(
    block: nn.Module, forward: Callable[..., Any], policy: Policy, *args: Any, **kwargs: Any
) -> Any:
    if not block.training or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return policy(forward, *args, **kwargs)


def _found(model: nn.Module, patterns: Iterable[str] | None) -> dict[str, nn.Module]:
    names = {module: name for name, module in model.named_modules()}
    if patterns is None:
        found = {names[block]: block for stack in repeated_stacks(model) for block in stack}
        if not found:
            raise DsError(
                f"checkpoint_blocks: {type(model).__name__} has no repeated blocks (a ModuleList, "
                f"Sequential or ModuleDict with two children of one class); name the modules"
            )
        return found
    found = {}
    for pattern in patterns:
        hits = {name: module for module, name in names.items() if fnmatchcase(name, pattern)}
        if not hits:
            known = ", ".join([name for name in names.values() if name][:8])
            raise DsError(
                f"checkpoint_blocks: {pattern!r} matches no module of {type(model).__name__}; its "
                f"modules are {known}, ..."
            )
        found.update(hits)
    for name, module in found.items():
        inside = [other for other in module.modules() if other is not module]
        twice = next((names[other] for other in inside if names[other] in found), None)
        if twice is not None:
            raise DsError(
                f"checkpoint_blocks: {twice!r} is inside {name!r}, and both are named; it would be "
                f"computed twice again; name one of them"
            )
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            raise DsError(
                f"checkpoint_blocks: {name!r} is a {type(module).__name__}, which has no forward; "
                f"name what is in it: {name + '.*'!r}"
            )
    order = list(names.values())
    return dict(sorted(found.items(), key=lambda item: order.index(item[0])))


def _spread(blocks: dict[str, nn.Module], number: int) -> dict[str, nn.Module]:
    entries = list(blocks.items())
    number = min(number, len(entries))
    return dict(entries[place * len(entries) // number] for place in range(number))


def _with_statistics(block: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(
        module
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    )
