"""One rank of a world of any size, in this process, without any peer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ds_core.errors import CommError


@contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """Be `rank` of `world_size` ranks whose collectives return at once and move nothing.

    For counting bytes and memory of clusters that no test machine has: shapes, group sizes and
    allocations are those of the real world, the *values* that collectives yield are not. Device
    meshes and subgroups can be made inside. On exit the process is as before.

    Args:
        world_size: number of ranks to pretend, at least 1.
        rank: which of them this process is, default 0.

    Raises:
        ValueError: rank is not in 0 .. world_size - 1.
        CommError: a process group is already initialised in this process.

    Example:
        >>> with fake_world(4096):
        ...     dist.get_world_size()
        4096
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"fake_world: rank: got {rank}, expected 0 to {world_size - 1}")
    if dist.is_initialized():
        raise CommError(
            f"fake_world: this process is already rank {dist.get_rank()} of "
            f"{dist.get_world_size()}; call torch.distributed.destroy_process_group() first"
        )
    # Importing the module is what registers the "fake" backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
