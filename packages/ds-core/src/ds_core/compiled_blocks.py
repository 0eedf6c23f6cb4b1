"""torch.compile of a model in training, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ds_core.activation_checkpointing.blocks import compiled_inside
from ds_core.blocks import repeated_stacks
from ds_core.errors import DsError


class CompiledBlocks:
    """Modules whose `forward` is compiled, until `close`.

    Only forwards are: what hooks do around them (a sharding gathers and frees parameters) runs as
    it is, and blocks of one class share their compiled code.

    Args:
        model: whose blocks.
        modules: which ones; None: its repeated blocks, or the model itself if it has none.
        backend: of torch.compile.
        options: its further arguments.

    Raises DsError for an unknown backend or argument.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[nn.Module] | None,
        backend: str | Any,
        options: dict[str, Any],
    ) -> None:
        blocks = [block for stack in repeated_stacks(model) for block in stack]
        chosen = (blocks or [model]) if modules is None else list(modules)

        def compile_one(forward: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(forward, backend=backend, **options)

        try:
            compiled = [compiled_inside(module.forward, compile_one) for module in chosen]
        except Exception as error:  # dynamo's errors have no common base but Exception
            raise DsError(f"compile: torch.compile refuses its arguments: {error}") from error
        # A block that is checkpointed, say, has a forward beside its class's.
        self._before = [(module, module.__dict__.get("forward")) for module in chosen]
        for module, forward in zip(chosen, compiled, strict=True):
            module.forward = forward

    def close(self) -> None:
        """Give the modules their own forward back."""
        for module, forward in self._before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward
        self._before.clear()
