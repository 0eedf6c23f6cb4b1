"""Test kit: real gloo ranks from a shared pool, fake large worlds, and injected faults."""

from ds_core.testing.fake import fake_world
from ds_core.testing.faults import (
    die,
    die_on_call,
    file_size_limit,
    flip_byte,
    poisoned_empty,
    truncate,
)
from ds_core.testing.outcome import Died, Hung, Raised, RankFailure, Returned
from ds_core.testing.pool import RankPool, run_ranks, shared_pool
from ds_core.testing.task import TaskError

__all__ = [
    "Died",
    "Hung",
    "Raised",
    "RankFailure",
    "RankPool",
    "Returned",
    "TaskError",
    "die",
    "die_on_call",
    "fake_world",
    "file_size_limit",
    "flip_byte",
    "poisoned_empty",
    "run_ranks",
    "shared_pool",
    "truncate",
]
