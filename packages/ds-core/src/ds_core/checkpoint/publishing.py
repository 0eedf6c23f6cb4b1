"""Writing a planned checkpoint and giving it its tag: the same steps for every kind of save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from ds_core.checkpoint import tags
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.remote import Place
from ds_core.checkpoint.retention import prune
from ds_core.checkpoint.storage import SafetensorsWriter, data_file_name
from ds_core.errors import CheckpointError


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes, and what becomes of the others.

    Attributes:
        directory: holds the checkpoints of a job.
        tag: name of this one.
        keep_latest_pointer: whether `latest` is made to name it.
        keep_last: how many checkpoints to keep; None: all.
    """

    directory: Place
    tag: str
    keep_latest_pointer: bool = True
    keep_last: int | None = None

    @property
    def what(self) -> str:
        """What is being done, for errors."""
        return f"saving checkpoint {self.tag!r} to {self.directory}"


def agree_on_tag(ranks: Ranks, destination: Destination) -> None:
    """Raise CheckpointError on every rank if a tag is no name, or ranks have different ones."""
    by_rank = ranks.gather(destination.what, lambda: tags.checked_tag(destination.tag))
    if len(set(by_rank)) > 1:
        listed = ", ".join(f"rank {rank}: {name!r}" for rank, name in enumerate(by_rank))
        raise CheckpointError(
            f"{destination.what}: ranks disagree on the tag ({listed}); pass the same one"
        )


def write_and_publish(
    ranks: Ranks,
    destination: Destination,
    items: SavePlan,
    source: Callable[[], SavePlanner],
    metadata: Metadata | None,
    when_read: Callable[[], object] = lambda: None,
) -> Place:
    """Write this rank's part; when all have, the checkpoint gets its tag. Returns its directory.

    Collective. Raises CheckpointError on every rank if any fails. Nothing of it is left then,
    unless contact was lost after it had got its tag: it stays, and the error of rank 0 says so.

    Args:
        items: what this rank writes.
        source: returns what hands out the tensors and values of the items, or raises why there is
            none, which every rank is told then.
        metadata: of all ranks, on rank 0.
        when_read: called when this rank's part is written, and no source is read any more.
    """
    what, directory, tag = destination.what, destination.directory, destination.tag
    draft = ranks.first(what, lambda: tags.begin(directory, tag))
    writer = SafetensorsWriter(draft.path)

    def write() -> list[WriteResult]:
        name = data_file_name(ranks.rank, draft.suffix)
        results = writer.write_data(replace(items, storage_data=name), source()).value()
        when_read()
        return results

    def publish(results: list[list[WriteResult]]) -> list[Place]:
        assert metadata is not None
        writer.finish(metadata, results)
        return [tags.commit(draft, directory, tag)] * ranks.size

    try:
        target = ranks.through_first(what, write, publish)
    except CheckpointError as error:
        if ranks.rank == 0 and draft.discard():
            raise CheckpointError(
                f"{error}; the checkpoint {directory / tag} itself is complete and stays, but "
                f"{tags.LATEST_NAME!r} may name another"
            ) from error
        raise
    ranks.first(
        f"pointing {tags.LATEST_NAME!r} to the complete checkpoint {target}",
        lambda: _look_after(destination),
    )
    return target


def _look_after(destination: Destination) -> None:
    """What follows once the checkpoint has its tag."""
    if destination.keep_latest_pointer:
        tags.point_latest(destination.directory, destination.tag)
    if destination.keep_last is not None:
        prune(destination.directory, destination.keep_last)
