"""torch's process groups as groups of ds_core.comm, and what programs ask about them."""

from __future__ import annotations

import torch.distributed as dist

from ds_core.comm import Group, Ledger
from ds_core.comm.environment import wants_check
from ds_core.comm.sequence import SequenceCheck
from ds_core.errors import CommError

ProcessGroup = dist.ProcessGroup

#: One account for all collectives that programs call by these names.
LEDGER = Ledger()
_known: dict[str, Group] = {}


def require_world() -> ProcessGroup:
    """torch's default process group. Raises CommError if there is none."""
    if not dist.is_available() or dist.group.WORLD is None:
        raise CommError("there is no process group yet: call deepspeed.init_distributed() first")
    return dist.group.WORLD


def group_of(group: ProcessGroup | None) -> Group | None:
    """The ranks of a process group, None for all ranks; None if this rank is not one of them."""
    world = require_world()
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # type: ignore[comparison-overlap]
        return None
    pg = world if group is None else group
    name = pg.group_name
    found = _known.get(name)
    if found is None or found.pg is not pg:
        told = "world" if pg is world else f"group {name}"
        found = Group(told, dist.get_process_group_ranks(pg), pg, LEDGER)
        if wants_check() and found.size > 1:
            lane = f"deepspeed.comm/{found.lane_name}/{found.ranks[0]}"
            found.check = SequenceCheck(found, lane)
        _known[name] = found
    return found


def forget(group: ProcessGroup | None) -> None:
    """Let go of a process group that ends; None: of all."""
    if group is None:
        _known.clear()
    else:
        _known.pop(group.group_name, None)


def rank_in(group: Group, rank: int, operation: str) -> int:
    """The rank within `group` of a global one. Raises CommError if it is not in it."""
    if rank not in group.ranks:
        raise CommError(
            f"{operation}: rank {rank} is not in the group of ranks {list(group.ranks)}; src and "
            f"dst are global ranks"
        )
    return group.ranks.index(rank)


def get_rank(group: ProcessGroup | None = None) -> int:
    """This process's rank in a group, -1 if it is not in it; of all ranks by default."""
    require_world()
    return dist.get_rank(group)


def get_world_size(group: ProcessGroup | None = None) -> int:
    """Ranks in a group, -1 if this process is not in it; all by default."""
    require_world()
    return dist.get_world_size(group)


def get_world_group() -> ProcessGroup:
    """The process group of all ranks."""
    return require_world()


def get_global_rank(group: ProcessGroup | None = None, group_rank: int = 0) -> int:
    """The global rank of rank `group_rank` of a group."""
    return dist.get_global_rank(require_world() if group is None else group, group_rank)


def get_all_ranks_from_group(group: ProcessGroup | None = None) -> list[int]:
    """The global ranks of a group, in its order."""
    return list(dist.get_process_group_ranks(require_world() if group is None else group))
