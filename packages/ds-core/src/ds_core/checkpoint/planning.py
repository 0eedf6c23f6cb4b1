"""Who writes what: one run of DCP's planners over all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from ds_core.checkpoint.index import KeyPath
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.state import FlatState
from ds_core.checkpoint.storage import check_dtypes


@dataclass
class Planned:
    """What this rank writes.

    Attributes:
        items: its boxes and values.
        planner: hands out the tensors of the state that was planned.
        metadata: of all ranks, on rank 0; None on the others.
    """

    items: SavePlan
    planner: SavePlanner
    metadata: Metadata | None


def plan_save(ranks: Ranks, what: str, flat: FlatState, planner: SavePlanner | None) -> Planned:
    """Decide which rank writes which box. Collective; raises CheckpointError on every rank.

    Args:
        what: what is being done, for errors.
        flat: this rank's state.
        planner: one that derives from `DefaultSavePlanner`. Default: `StatePlanner`.
    """
    chosen = StatePlanner(flat.paths) if planner is None else planner
    decided: list[Metadata] = []

    def mine() -> SavePlan:
        chosen.set_up_planner({**flat.tensors, **flat.values}, None, ranks.rank == 0)
        return check_dtypes(chosen.create_local_plan())

    def everybodys(plans: list[SavePlan]) -> list[SavePlan]:
        plans, metadata = chosen.create_global_plan(plans)
        decided.append(metadata)
        return plans

    items = ranks.through_first(what, mine, everybodys)
    items = ranks.each(what, lambda: chosen.finish_plan(items))
    return Planned(items, chosen, decided[0] if decided else None)


class StatePlanner(dcp.DefaultSavePlanner):
    """DCP's planner, with the paths of the state's names, and values taken from the lowest rank.

    Left to itself it writes a value from whichever rank has the least to write.
    """

    def __init__(self, paths: Mapping[str, KeyPath]) -> None:
        super().__init__()
        self._paths = dict(paths)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        self.state_dict = state_dict  # flat already; values stay whole
        self.mappings = self._paths

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        seen: set[str] = set()
        plans = []
        for plan in all_plans:
            values = {i.index.fqn for i in plan.items if i.type == WriteItemType.BYTE_IO}
            items = [item for item in plan.items if item.index.fqn not in values & seen]
            plans.append(replace(plan, items=items))
            seen |= values
        return super().create_global_plan(plans)
