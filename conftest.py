"""The fixtures of the test kit (`ranks`, `world_size`, `poison_empty`) for all tests here."""

from collections.abc import Iterator

import pytest

pytest_plugins = ["ds_core.testing.pytest_plugin"]


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """End what a test started in this process, or the next one would find itself in its world."""
    yield
    from ds_core import comm

    comm.shutdown()
