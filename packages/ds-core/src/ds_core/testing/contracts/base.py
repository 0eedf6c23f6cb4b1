"""What the contracts share: running a subclass's factory in the ranks of a test world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_core.errors import DsError
from ds_core.testing.pool import run_ranks
from ds_core.testing.task import FunctionRef, reference, resolve


class Contract:
    """Base of the contracts.

    Attributes:
        factory: makes what is tested: `staticmethod` of a function at the top level of a module.
        world_sizes: the worlds in which the tests run.
    """

    factory: Callable[..., Any]
    world_sizes: tuple[int, ...] = (1, 2)

    def run(self, body: Callable[..., Any], *args: Any, world_size: int | None = None) -> list[Any]:
        """Run `body(factory, *args)` in every rank of one world, or of each in turn."""
        factory = getattr(type(self), "factory", None)
        if factory is None:
            raise DsError(
                f"{type(self).__name__}: no factory; set `factory = staticmethod(...)` to a "
                f"function at the top level of the test's module"
            )
        ref, results = reference(factory), []
        for size in self.world_sizes if world_size is None else (world_size,):
            results += run_ranks(size, call_with_factory, body, ref, *args)
        return results


def call_with_factory(body: Callable[..., Any], ref: FunctionRef, *args: Any) -> Any:
    """Call `body` in a rank, with the factory that `ref` names."""
    return body(resolve(ref), *args)
