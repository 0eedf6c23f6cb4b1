"""Save and load a job's state by tag: atomic, verified, and independent of how it is sharded."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner, WriteItemType

from ds_core.checkpoint import jsonable, tags
from ds_core.checkpoint.block_parts import verify_together
from ds_core.checkpoint.index import INDEX_NAME, Index, KeyPath
from ds_core.checkpoint.ranks import Ranks, describe
from ds_core.checkpoint.state import FlatState, flatten, rebuild
from ds_core.checkpoint.storage import SafetensorsReader, SafetensorsWriter
from ds_core.errors import CheckpointError


def save(
    directory: str | os.PathLike[str],
    tag: str,
    state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    keep_latest_pointer: bool = True,
    planner: SavePlanner | None = None,
) -> Path:
    """Write a checkpoint and return its directory, `directory/tag`.

    It appears when it is complete and on disk, and not before: a crash at any moment leaves all
    earlier checkpoints loadable, the one that it replaces (same tag) included.
    Collective: all ranks of `group` must call, with the same directory and tag.

    Args:
        directory: holds all checkpoints of a job, on a file system that all ranks share; created.
        tag: name of this checkpoint, such as `"step100"`.
        state: nested dictionaries of tensors (plain, `FlatShard` or `DTensor`) and values (numbers,
            strings, booleans, None, lists, dictionaries). Ranks may hold different keys. Of a
            plain tensor that several ranks hold one copy is written, of a value the one of the
            lowest rank that has it.
        group: the ranks that hold the state. Default: all.
        keep_latest_pointer: whether `directory/latest` is made to name this checkpoint.
        planner: decides which rank writes what, for tensors that need a decision of their own.

    Raises:
        CheckpointError: on every rank, if any rank failed; names the ranks and the cause. What was
            written is removed, and all earlier checkpoints are as they were.
    """
    ranks = Ranks(group)
    directory = Path(directory)
    what = f"saving checkpoint {tag!r} to {directory}"
    flat = ranks.each(what, lambda: _checked_state(state))
    _agree_on_tag(ranks, what, tag)
    temporary = ranks.first(what, lambda: tags.begin(directory, tag))
    try:
        with _dcp_errors(ranks, what):
            dcp.save(
                {**flat.tensors, **flat.values},
                storage_writer=SafetensorsWriter(temporary),
                planner=_Planner(flat.paths) if planner is None else planner,
                process_group=group,
                no_dist=not ranks.distributed,
            )
        target = ranks.first(what, lambda: tags.commit(temporary, directory, tag))
    except CheckpointError:
        if ranks.rank == 0:
            tags.discard(temporary)
        raise
    if keep_latest_pointer:
        ranks.first(
            f"pointing {tags.LATEST_NAME!r} to the complete checkpoint {target}",
            lambda: tags.point_latest(directory, tag),
        )
    return target


def load(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    state: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    parts: Collection[str] | None = None,
    strict: bool = True,
    planner: LoadPlanner | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` from a checkpoint and return the state with the values read.

    The world size and the sharding may differ from those of the save. A rank reads the index and
    the bytes that it holds, no others; all that is read is verified. Each tensor keeps its dtype
    and device; what is read is converted. Nothing is unpickled.
    Collective: all ranks of `group` must call.

    Args:
        directory: as for `save`.
        tag: which checkpoint. Default: the one that `directory/latest` names.
        state: as for `save`: its tensors are written in place, its values say
            what must be there, and are not changed.
        group: as for `save`.
        parts: top-level keys to load, such as `["model"]`; the checkpoint's others are ignored.
            Default: all.
        strict: whether a name of `state` that the checkpoint lacks, or a tensor of the checkpoint
            that no rank's state has, is an error. If False, it is left alone.
        planner: decides which rank reads what.

    Returns:
        A new dictionary like `state`: the same tensors, the checkpoint's values (also those that
        `state` does not name), tuples as lists.

    Raises:
        CheckpointError: on every rank: nothing to load (lists the tags that exist), the checkpoint
            is of another model (names keys and shapes), or a file is missing, truncated or
            damaged. In the last case the tensors may have been partly overwritten.
    """
    ranks = Ranks(group)
    directory = Path(directory)
    what = f"loading checkpoint {tag!r} from {directory}" if tag else f"loading from {directory}"
    path = ranks.first(what, lambda: find(directory, tag))
    reader = SafetensorsReader(path, exact=True)
    flat = ranks.each(what, lambda: flatten(state).only(parts).checked())
    matches = ranks.gather(what, lambda: _match(reader.index, flat))
    _check_match(path, reader.index, matches, parts, strict=strict)
    wanted: dict[str, Any] = {n: t for n, t in flat.tensors.items() if n in reader.index.tensors}
    with _dcp_errors(ranks, what):
        dcp.load(
            wanted,
            storage_reader=reader,
            planner=planner,
            process_group=group,
            no_dist=not ranks.distributed,
        )
    verify_together(ranks, what, path, reader.index, reader.parts)
    return rebuild(state, wanted, _values(reader.index, parts))


def read_state(directory: str | os.PathLike[str], tag: str | None = None) -> dict[str, Any]:
    """The values of a checkpoint that are not tensors, nested as they were saved.

    Collective: no. Raises CheckpointError as `load` does.
    """
    return rebuild({}, {}, _values(Index.read(find(directory, tag)), None))


def latest(directory: str | os.PathLike[str]) -> str:
    """The tag of the newest checkpoint, as the file `latest` names it.

    Raises CheckpointError if there is none; lists the tags that exist.
    """
    return tags.latest(Path(directory))


def find(directory: str | os.PathLike[str], tag: str | None = None) -> Path:
    """The directory of the checkpoint with a tag, or of the newest. Raises as `load` does.

    Without a tag, `directory` may also be a checkpoint itself.
    """
    directory = Path(directory)
    if tag is None and (directory / INDEX_NAME).is_file():
        return directory
    return tags.find(directory, tags.latest(directory) if tag is None else tag)


class _Planner(dcp.DefaultSavePlanner):
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


def _checked_state(state: Mapping[str, Any]) -> FlatState:
    flat = flatten(state).checked()
    flat.encoded_values()  # names a value that cannot be saved before anything is written
    return flat


def _agree_on_tag(ranks: Ranks, what: str, tag: str) -> None:
    by_rank = ranks.gather(what, lambda: tags.checked_tag(tag))
    if len(set(by_rank)) > 1:
        listed = ", ".join(f"rank {rank}: {name!r}" for rank, name in enumerate(by_rank))
        raise CheckpointError(f"{what}: ranks disagree on the tag ({listed}); pass the same one")


@contextlib.contextmanager
def _dcp_errors(ranks: Ranks, what: str) -> Iterator[None]:
    """Raise what DCP reports as a CheckpointError that names ranks and causes; hide its warning."""
    with warnings.catch_warnings():
        # Without a process group DCP says that it assumes one process. So do we, knowingly.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            causes = {rank: describe(cause) for rank, (cause, _) in error.failures.items()}
            raise ranks.failure(what, causes) from error
        except CheckpointError:
            raise
        except Exception as error:
            raise ranks.lost(what, error) from error


class _Match(NamedTuple):
    """How one rank's state compares with a checkpoint.

    Attributes:
        missing: names that the checkpoint lacks.
        differing: one text per tensor of another shape.
        has: for each tensor of the index, in its order, 1 if the state has it, else 0.
    """

    missing: list[str]
    differing: list[str]
    has: bytes


def _match(index: Index, flat: FlatState) -> _Match:
    paths = [record.path for record in index.state.values()]
    prefixes = {path[:end] for path in paths for end in range(1, len(path) + 1)}
    missing = [name for name in flat.tensors if name not in index.tensors]
    missing += [
        name
        for name, value in flat.values.items()
        # An empty dictionary asks for nothing; a value may stand for a whole dictionary.
        if flat.paths[name] not in prefixes and not (isinstance(value, Mapping) and not value)
    ]
    differing = [
        f"{name}: checkpoint {list(record.shape)}, model {list(tensor.shape)}"
        for name, tensor in flat.tensors.items()
        if (record := index.tensors.get(name)) and record.shape != tuple(tensor.shape)
    ]
    return _Match(missing, differing, bytes(name in flat.tensors for name in index.tensors))


def _check_match(
    path: Path,
    index: Index,
    matches: list[_Match],
    parts: Collection[str] | None,
    *,
    strict: bool,
) -> None:
    differing = dict.fromkeys(text for match in matches for text in match.differing)
    complaints = [f"shapes differ: {_listed(differing)}"] if differing else []
    if strict:
        missing = dict.fromkeys(name for match in matches for name in match.missing)
        unexpected = [
            name
            for i, (name, record) in enumerate(index.tensors.items())
            if _is_wanted(record.path, parts) and not any(match.has[i] for match in matches)
        ]
        if missing:
            complaints.append(f"the model has, but the checkpoint lacks: {_listed(missing)}")
        if unexpected:
            complaints.append(f"the checkpoint has, but the model lacks: {_listed(unexpected)}")
    if complaints:
        raise CheckpointError(
            f"{path} is a checkpoint of another model; {'; '.join(complaints)}. Build the model "
            "that was saved, or load only some `parts`, or what both have with strict=False"
        )


def _is_wanted(path: KeyPath, parts: Collection[str] | None) -> bool:
    return parts is None or path[0] in parts


def _values(index: Index, parts: Collection[str] | None) -> list[tuple[KeyPath, Any]]:
    return [
        (record.path, jsonable.decode(record.value))
        for record in index.state.values()
        if _is_wanted(record.path, parts)
    ]


def _listed(names: Collection[str], limit: int = 4) -> str:
    shown = ", ".join(list(names)[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
