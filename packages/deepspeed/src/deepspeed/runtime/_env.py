"""Every environment variable that this part reads: LOCAL_RANK and LOCAL_WORLD_SIZE of launchers."""

from __future__ import annotations

import os


def local_rank() -> int:
    """This process's rank on its machine; 0 where no launcher says it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_nodes(world_size: int) -> int:
    """Machines that take part, where the launcher says how many ranks each has; else 1."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return max(1, world_size // local) if local > 0 else 1
