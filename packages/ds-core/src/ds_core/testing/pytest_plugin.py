"""Fixtures of the test kit.

Switch them on with `pytest_plugins = ["ds_core.testing.pytest_plugin"]` in the topmost
`conftest.py`, or with `-p ds_core.testing.pytest_plugin` in pytest's `addopts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ds_core.testing.faults import poisoned_empty
from ds_core.testing.pool import run_ranks, shared_pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks`, on a pool of worker processes that lasts for the session."""
    yield run_ranks
    shared_pool().close()


@pytest.fixture
def world_size(request: pytest.FixtureRequest) -> int:
    """Number of ranks: 2, or what `@pytest.mark.parametrize("world_size", [1, 2, 4])` says."""
    return int(getattr(request, "param", 2))


@pytest.fixture
def poison_empty() -> Iterator[None]:
    """`torch.empty` and its kin return NaN for the whole test, in the test's own process."""
    with poisoned_empty():
        yield
