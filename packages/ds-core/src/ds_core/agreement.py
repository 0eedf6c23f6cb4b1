"""What all ranks must agree on: the model that they train, and the name of a checkpoint."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Literal

from ds_core import comm
from ds_core.errors import CheckpointError, ModelMismatchError

logger = logging.getLogger(__name__)

#: What happens when ranks save one checkpoint under different tags.
TagValidation = Literal["Ignore", "Warn", "Fail"]

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


def agree_on_tag(mine: str, policy: TagValidation, group: comm.Group) -> str:
    """The tag under which all ranks save: rank 0's.

    Args:
        mine: this rank's.
        policy: whether a rank that differs is ignored, told of in the log, or an error on all.
        group: the ranks that save together. Collective.

    Raises CheckpointError on every rank if tags differ and the policy is "Fail".
    """
    tags: list[str] = comm.all_gather_object(mine, group, caller="checkpoint tag")
    if len(set(tags)) > 1 and policy != "Ignore":
        told = ", ".join(f"rank {r}: {tag!r}" for r, tag in zip(group.ranks, tags, strict=True))
        if policy == "Fail":
            raise CheckpointError(
                f"save_checkpoint: ranks disagree on the tag ({told}); pass the same one, or set "
                f'checkpoint.tag_validation to "Warn" to save under that of rank 0'
            )
        if group.rank == 0:
            logger.warning("ranks disagree on the tag (%s): saving under %r", told, tags[0])
    return tags[0]
