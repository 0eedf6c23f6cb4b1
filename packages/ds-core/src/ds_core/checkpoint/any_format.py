"""The weights of a checkpoint, whoever wrote it: ours, DeepSpeed's, torch's or Hugging Face's."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ds_core.checkpoint.importing import open_foreign
from ds_core.checkpoint.index import INDEX_NAME
from ds_core.checkpoint.lazy import MODEL, LazyStateDict, full_state_dict
from ds_core.checkpoint.remote import as_place
from ds_core.checkpoint.tags import LATEST_NAME
from ds_core.errors import CheckpointError


def is_ours(directory: str | os.PathLike[str], tag: str | None = None) -> bool:
    """Whether a folder of checkpoints, or of one, is in our format."""
    place = as_place(directory)
    if tag is None and (place / INDEX_NAME).is_file():
        return True
    if tag is None:
        pointer = place / LATEST_NAME
        if not pointer.is_file():
            return False
        tag = pointer.read_text(encoding="utf-8").strip()
    return (place / tag / INDEX_NAME).is_file()


def weights_of(
    source: str | os.PathLike[str],
    tag: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    exclude_frozen: bool = False,
) -> LazyStateDict:
    """The model of a checkpoint of any known format as whole tensors, each read when looked up.

    Of a sharded checkpoint weights come from the most precise copy that there is, such as the fp32
    master copy of a bf16 run. Nothing in the source is executed, and objects that only running code
    could read are left out. Collective: no.

    Args:
        source: a folder of checkpoints, one checkpoint, or a file of weights.
        tag: which one of a folder. Default: the one that `latest` names.
        dtype: what floating-point tensors are converted to. Default: as saved.
        exclude_frozen: leave out the parameters that were not trained.

    Raises CheckpointError if there is no checkpoint, it is damaged or of no known format.
    """
    if is_ours(source, tag):
        return full_state_dict(source, tag, dtype=dtype, exclude_frozen=exclude_frozen)
    found = open_foreign(Path(source), tag)
    if exclude_frozen and found.frozen is None:
        raise CheckpointError(
            f"{source} ({found.kind}) does not say which parameters were frozen; take all of them"
        )
    skipped = set(found.frozen or ()) if exclude_frozen else set()
    tensors = {
        str(tensor.path[-1]): tensor
        for tensor in found.state.tensors.values()
        if tensor.path[0] == MODEL and tensor.path[-1] not in skipped
    }
    return LazyStateDict(tensors, dtype=dtype, aliases=found.aliases)
