"""Save and load a job's state by tag: atomic, verified, and independent of how it is sharded."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from ds_core.checkpoint import jsonable, tags
from ds_core.checkpoint.block_parts import verify_together
from ds_core.checkpoint.damage import damage, damaged, uncovered
from ds_core.checkpoint.index import INDEX_NAME, Index, KeyPath
from ds_core.checkpoint.planning import plan_save
from ds_core.checkpoint.publishing import Destination, agree_on_tag, write_and_publish
from ds_core.checkpoint.ranks import Ranks, describe
from ds_core.checkpoint.remote import Place, as_place
from ds_core.checkpoint.retention import being_read, checked_keep_last
from ds_core.checkpoint.state import FlatState, flatten, rebuild
from ds_core.checkpoint.storage import SafetensorsReader
from ds_core.errors import CheckpointError


def save(
    directory: str | os.PathLike[str],
    tag: str,
    state: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
    keep_latest_pointer: bool = True,
    planner: SavePlanner | None = None,
    keep_last: int | None = None,
) -> Place:
    """Write a checkpoint and return its directory, `directory/tag`.

    It appears when it is complete and on disk, and not before: a crash at any moment leaves all
    earlier checkpoints loadable, the one that it replaces (same tag) included.
    Collective: all ranks of `group` must call, with the same directory and tag.

    Args:
        directory: holds all checkpoints of a job, on a file system that all ranks share; created.
            Also a URL of fsspec such as `"s3://bucket/run"`, with the extra `ds-core[fsspec]`.
        tag: name of this checkpoint, such as `"step100"`.
        state: nested dictionaries of tensors (plain, `FlatShard` or `DTensor`) and values (numbers,
            strings, booleans, None, lists, dictionaries). Ranks may hold different keys. Of a
            plain tensor that several ranks hold one copy is written, of a value the one of the
            lowest rank that has it.
        group: the ranks that hold the state. Default: all.
        keep_latest_pointer: whether `directory/latest` is made to name this checkpoint.
        planner: decides which rank writes what, for tensors that need a decision of their own.
        keep_last: delete all checkpoints in `directory` but the newest of that number, the one that
            `latest` names, and any that is being read or written. Default: delete none.

    Raises:
        CheckpointError: on every rank, if any rank failed; names the ranks and the cause. What was
            written is removed, and all earlier checkpoints are as they were.
    """
    ranks = Ranks(group)
    place = as_place(directory)
    to = Destination(place, tag, keep_latest_pointer, checked_keep_last(keep_last))
    flat = ranks.each(to.what, lambda: checked_state(state))
    agree_on_tag(ranks, to)
    planned = plan_save(ranks, to.what, flat, planner)
    return write_and_publish(ranks, to, planned.items, lambda: planned.planner, planned.metadata)


def load(
    directory: str | os.PathLike[str],
    tag: str | None = None,
    *,
    state: Mapping[str, Any],
    group: dist.ProcessGroup | None = None,
    parts: Collection[str] | None = None,
    strict: bool = True,
    planner: LoadPlanner | None = None,
    verify: bool = False,
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
        verify: first read the whole checkpoint and compare it with its checksums, each rank some of
            its files, so that one that is damaged anywhere changes nothing. Without it, each rank
            verifies what it reads, as it reads it.

    Returns:
        A new dictionary like `state`: the same tensors, the checkpoint's values (also those that
        `state` does not name), tuples as lists.

    Raises:
        CheckpointError: on every rank: nothing to load (lists the tags that exist), the checkpoint
            is of another model (names keys and shapes), or a file is missing, truncated or
            damaged. In the last case the tensors may have been partly overwritten.
    """
    ranks = Ranks(group)
    place = as_place(directory)
    what = f"loading checkpoint {tag!r} from {place}" if tag else f"loading from {place}"
    path = ranks.first(what, lambda: find(place, tag))
    with contextlib.ExitStack() as locks:
        ranks.each(what, lambda: locks.enter_context(being_read(path)))
        return _load_from(ranks, what, path, state, parts, planner, strict=strict, verify=verify)


def _load_from(
    ranks: Ranks,
    what: str,
    path: Place,
    state: Mapping[str, Any],
    parts: Collection[str] | None,
    planner: LoadPlanner | None,
    *,
    strict: bool,
    verify: bool,
) -> dict[str, Any]:
    reader = SafetensorsReader(path, exact=True)
    flat = ranks.each(what, lambda: flatten(state).only(parts).checked())
    matches = ranks.gather(what, lambda: _match(reader.index, flat))
    _check_match(path, reader.index, matches, parts, strict=strict)
    if verify:
        _verify(ranks, what, path, reader.index)
    wanted: dict[str, Any] = {n: t for n, t in flat.tensors.items() if n in reader.index.tensors}
    with _dcp_errors(ranks, what):
        dcp.load(
            wanted,
            storage_reader=reader,
            planner=planner,
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )
    verify_together(ranks, what, path, reader.index, reader.parts)
    return rebuild(state, wanted, _values(reader.index, parts))


def _verify(ranks: Ranks, what: str, path: Place, index: Index) -> None:
    mine = sorted(index.files)[ranks.rank :: ranks.size]
    by_rank = ranks.gather(what, lambda: damage(path, index, mine)[0])
    if problems := uncovered(index) + [text for texts in by_rank for text in texts]:
        raise damaged(path, problems)


def read_state(directory: str | os.PathLike[str], tag: str | None = None) -> dict[str, Any]:
    """The values of a checkpoint that are not tensors, nested as they were saved.

    Collective: no. Raises CheckpointError as `load` does.
    """
    return rebuild({}, {}, _values(Index.read(find(directory, tag)), None))


def latest(directory: str | os.PathLike[str]) -> str:
    """The tag of the newest checkpoint, as the file `latest` names it.

    Raises CheckpointError if there is none; lists the tags that exist.
    """
    return tags.latest(as_place(directory))


def find(directory: str | os.PathLike[str], tag: str | None = None) -> Place:
    """The directory of the checkpoint with a tag, or of the newest. Raises as `load` does.

    Without a tag, `directory` may also be a checkpoint itself.
    """
    place = as_place(directory)
    if tag is None and (place / INDEX_NAME).is_file():
        return place
    return tags.find(place, tags.latest(place) if tag is None else tag)


def checked_state(state: Mapping[str, Any]) -> FlatState:
    """A nested state, flat. Raises CheckpointError for what cannot be saved."""
    flat = flatten(state).checked()
    flat.encoded_values()  # names a value that cannot be saved before anything is written
    return flat


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
    path: Place,
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
