"""Optimizer state that one run has and another does not: left out on loading, with a warning.

Such are gradients that wait for a later step: a run that schedules its steps otherwise has no place
for them. Who has some says so (`ds_core.seams.PassingState`), and the checkpoint notes it, so that
also a run that knows nothing of it can tell what it leaves out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ds_core.seams import PassingState, Sharding

if TYPE_CHECKING:
    from ds_core.checkpoint.remote import Place

logger = logging.getLogger(__name__)

#: Optimizer state by its key, such as "exp_avg", then by name of the parameter.
State = dict[str, dict[str, Any]]


def passing_keys(sharding: Sharding) -> dict[str, str]:
    """Keys of `sharding`'s optimizer state that others need not know; what is lost without each."""
    return dict(sharding.passing_state()) if isinstance(sharding, PassingState) else {}


def with_own_only(checkpoint: Place, optimizer_state: State, own: Iterable[str]) -> State:
    """`optimizer_state` without the keys among `own` that a checkpoint lacks: they start anew."""
    saved = {path[1] for path, _ in _saved(checkpoint)}
    missing = sorted(key for key in own if key in optimizer_state and key not in saved)
    if missing:
        logger.warning("%s has no %s: they start anew", checkpoint, ", ".join(missing))
    return {key: values for key, values in optimizer_state.items() if key not in missing}


def with_others_ignored(checkpoint: Place, optimizer_state: State) -> State:
    """`optimizer_state`, and targets that hold nothing for what has no place in this run."""
    from ds_core.checkpoint import FlatShard, read_state

    noted: Mapping[str, str] = read_state(checkpoint).get("about", {}).get("passing", {})
    ignored: State = {}
    for path, shape in _saved(checkpoint):
        if path[1] in noted and path[1] not in optimizer_state:
            nothing = FlatShard(torch.empty(0), shape) if shape else torch.empty(())
            ignored.setdefault(path[1], {})[path[2]] = nothing
    if ignored:
        lost = [noted[key] for key in sorted(ignored) if noted[key]]
        logger.warning(
            "%s: %s of its optimizer have no place in this run; %s",
            checkpoint,
            ", ".join(sorted(ignored)),
            f"dropped are {' and '.join(lost)}" if lost else "nothing is lost with them",
        )
    return {**optimizer_state, **ignored}


def _saved(checkpoint: Place) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    """(key path, shape) of each tensor of optimizer state in a checkpoint."""
    from ds_core.checkpoint.index import Index

    records = Index.read(checkpoint).tensors.values()
    return [
        (tuple(map(str, record.path)), tuple(record.shape))
        for record in records
        if record.path[0] == "optimizer" and len(record.path) == 3
    ]
