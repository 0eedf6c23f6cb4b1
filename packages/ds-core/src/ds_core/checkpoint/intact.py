"""Which checkpoint to go on from, when the newest may be damaged."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

from ds_core.checkpoint import tags
from ds_core.checkpoint.audit import verify
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.remote import Place, as_place
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)


def newest_intact(
    directory: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None
) -> str:
    """The tag of the newest complete checkpoint of which every byte is as it was saved.

    A damaged one is passed over with a warning that says what is wrong with it. Rank 0 reads, the
    newest first and whole; in a good case that is one checkpoint.
    Collective: all ranks of `group` must call.

    Raises:
        CheckpointError: on every rank: there is none; lists what is wrong with each.
    """
    ranks, folder = Ranks(group), as_place(directory)
    return ranks.first(f"looking for an intact checkpoint in {folder}", lambda: _newest(folder))


def _newest(directory: Place) -> str:
    problems = []
    for tag in reversed(tags.tags(directory)):
        try:
            verify(directory, tag)
        except CheckpointError as error:
            logger.warning("checkpoint %r is passed over: %s", tag, error)
            problems.append(str(error))
            continue
        return tag
    told = "; ".join(problems) or "it holds no complete checkpoint"
    raise CheckpointError(f"no checkpoint of {directory} can be gone on from: {told}")
