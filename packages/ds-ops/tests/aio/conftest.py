"""Engines that the tests of one run share."""

from collections.abc import Iterator

import pytest

from ds_ops.aio import AsyncIO


@pytest.fixture(scope="session", params=["io_uring", "threads"])
def engine(request: pytest.FixtureRequest) -> Iterator[AsyncIO]:
    """Each engine with small blocks and little depth, so that small files take many pieces."""
    with AsyncIO(request.param, queue_depth=4, block_bytes=8192, threads=4) as made:
        yield made
