"""Process groups of torch, made so that an error says who did not come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from ds_core.comm.failure import who_failed
from ds_core.errors import CommError


def new_process_group(
    ranks: Sequence[int] | None, doing: str, **options: Any
) -> dist.ProcessGroup | None:
    """What `torch.distributed.new_group` makes; its ranks connect to one another. Collective.

    Args:
        ranks: global ones; None: all.
        doing: what the group is for, equal on all of them.
        options: as `new_group` takes them.

    Raises CommError if ranks do not come within the timeout, naming them.
    """
    try:
        return dist.new_group(None if ranks is None else list(ranks), **options)
    except RuntimeError as error:
        who = who_failed(None, doing, error, ranks=ranks)
        raise CommError(f"{doing} failed on rank {dist.get_rank()}: {who}") from error
