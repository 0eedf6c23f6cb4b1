"""Test kit: real gloo ranks from a shared pool, fake large worlds, and injected faults."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_core.testing.fake import fake_world
from ds_core.testing.faults import (
    Fault,
    FaultInjector,
    die,
    die_on_call,
    file_size_limit,
    flip_byte,
    poisoned_empty,
    truncate,
)
from ds_core.testing.outcome import Died, Hung, Raised, RankFailure, Returned
from ds_core.testing.pool import RankPool, free_port, run_ranks, shared_pool
from ds_core.testing.task import TaskError

if TYPE_CHECKING:
    from ds_core.testing.contracts import (
        ObserverContract,
        OpContract,
        RunnerContract,
        ShardingContract,
        TransportContract,
    )

__all__ = [
    "Died",
    "Fault",
    "FaultInjector",
    "Hung",
    "ObserverContract",
    "OpContract",
    "Raised",
    "RankFailure",
    "RankPool",
    "Returned",
    "RunnerContract",
    "ShardingContract",
    "TaskError",
    "TransportContract",
    "die",
    "die_on_call",
    "fake_world",
    "file_size_limit",
    "flip_byte",
    "free_port",
    "poisoned_empty",
    "run_ranks",
    "shared_pool",
    "truncate",
]


def __getattr__(name: str) -> Any:
    # The contracts need pytest and the engine; the rest of the kit does not.
    if name in __all__:
        return getattr(importlib.import_module("ds_core.testing.contracts"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
