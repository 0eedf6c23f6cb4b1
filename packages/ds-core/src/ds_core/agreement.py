"""Whether all ranks hold the same model, asked before anything of it is sent."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ds_core import comm
from ds_core.errors import ModelMismatchError

#: Name, shape, dtype and what becomes of one parameter.
Entry = tuple[str, list[int], str, str]


def check_same_model(mine: Sequence[Entry], group: comm.Group) -> None:
    """Raise ModelMismatchError on every rank, naming the first parameter that differs.

    Args:
        mine: this rank's parameters, in order.
        group: the ranks that share the model. Collective.
    """
    if group.size == 1:
        return
    digest = hashlib.sha256(repr(list(mine)).encode()).hexdigest()
    if len(set(comm.all_gather_object(digest, group, caller="model check"))) == 1:
        return
    everybody: list[Sequence[Entry]] = comm.all_gather_object(mine, group, caller="model check")
    for place in range(max(map(len, everybody))):
        seen = [ours[place] if place < len(ours) else None for ours in everybody]
        if any(entry != seen[0] for entry in seen):
            told = "; ".join(
                f"rank {rank}: {_describe(entry)}"
                for rank, entry in zip(group.ranks, seen, strict=True)
            )
            name = next(entry[0] for entry in seen if entry is not None)
            raise ModelMismatchError(
                f"the ranks hold different models, the first difference is at {name!r}: {told}; "
                f"build the same model on every rank"
            )


def _describe(entry: Entry | None) -> str:
    if entry is None:
        return "no further parameter"
    name, shape, dtype, kind = entry
    return f"{name} {shape} {dtype.removeprefix('torch.')}, {kind}"
