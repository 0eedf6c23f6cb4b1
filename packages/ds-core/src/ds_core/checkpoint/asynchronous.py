"""Saving while training goes on: a copy to host memory now, files from a thread afterwards."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from ds_core.checkpoint import tags
from ds_core.checkpoint.planning import Planned, plan_save
from ds_core.checkpoint.publishing import Destination, agree_on_tag, write_and_publish
from ds_core.checkpoint.ranks import Ranks, describe
from ds_core.checkpoint.remote import Place, as_place
from ds_core.checkpoint.retention import checked_keep_last
from ds_core.checkpoint.sharded import FlatShard
from ds_core.checkpoint.snapshot import HostBuffers, Snapshot
from ds_core.checkpoint.state import FlatState
from ds_core.checkpoint.store import checked_state
from ds_core.comm.new_group import new_process_group
from ds_core.comm.process_groups import timeout_of
from ds_core.errors import CheckpointError

logger = logging.getLogger(__name__)

#: What ranks tell each other before a save: nothing new, plan again, or that it failed.
_SAME, _CHANGED, _FAILED = 0, 1, 2


class SaveFigures(NamedTuple):
    """What an asynchronous save cost this rank.

    Attributes:
        copied_bytes: of tensors that were copied to host memory.
        blocked_s: how long `save` took, waiting for the save before not included.
        copy_s: the part of it that was the copy.
        write_s: how long it took from then until the checkpoint had its tag; 0 while it is written.
    """

    copied_bytes: int
    blocked_s: float
    copy_s: float
    write_s: float = 0.0


class PendingSave:
    """A checkpoint that is being written; `AsyncSaver.save` returns one.

    Attributes:
        tag: its name.
        path: the directory that it will have.
        figures: what it has cost this rank so far.
    """

    def __init__(self, to: Destination, figures: SaveFigures) -> None:
        self.tag = to.tag
        self.path: Place = to.directory / to.tag
        self.figures = figures
        self._what = to.what
        self._reads_done = threading.Event()
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._was_told = False

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait(self, timeout_s: float | None = None) -> Place:
        """The directory, once the checkpoint is complete and on disk.

        Raises:
            CheckpointError: on every rank, if any failed; or if it has not ended within
                `timeout_s` seconds, in which case it goes on.
        """
        if not self._done.wait(timeout_s):
            raise CheckpointError(f"{self._what} has not ended within {timeout_s:g} s; it goes on")
        self._was_told = True
        if self._error is not None:
            raise CheckpointError(describe(self._error)) from self._error
        return self.path


class AsyncSaver:
    """Saves checkpoints while training goes on; as atomic as `save`, and loaded alike.

    `save` copies what this rank is to write into host memory and returns; a thread writes it, and
    the checkpoint appears when all ranks have written theirs. One save is in flight: the next one
    first waits for it, so host memory holds one copy of what this rank writes, and no more. The
    copy's buffers are kept for the next one, in page-locked memory where there is an accelerator.

    The ranks agree in a process group of their own (gloo), so that training's collectives are not
    disturbed. A rank that dies ends the save with an error on the others; one that is stopped does
    so after `timeout_s`, and a program that ends waits no longer than that.

    A program that ends waits for the save in flight. Errors of the thread are logged at once and
    raised by the next `save`, `wait` or `close`, on every rank; one that nobody asks for is shown
    when the program ends.

    Collective: all ranks of `group` make one, and call its methods alike.

    Args:
        group: the ranks that hold the state. Default: all.
        timeout_s: how long ranks wait for one another, which includes the time that the slowest
            takes to write. Default: the timeout of `group`.

    Example:
        >>> import tempfile, torch
        >>> from ds_core import checkpoint
        >>> folder, weight = tempfile.mkdtemp(), torch.zeros(3)
        >>> with checkpoint.AsyncSaver() as saver:
        ...     pending = saver.save(folder, "step1", {"weight": weight})
        ...     _ = weight.add_(1)  # what is saved is the copy
        >>> checkpoint.full_state_dict(folder, prefix="")["weight"]
        tensor([0., 0., 0.])
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout_s: float | None = None
    ) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise CheckpointError(f"timeout_s: got {timeout_s}, expected seconds above 0")
        self._own_group = _own_group(group, timeout_s)
        self._spans_world = self._own_group is not None and group in (None, dist.group.WORLD)
        self._ranks = Ranks(self._own_group)
        self._buffers = HostBuffers(pinned=torch.accelerator.is_available())
        self._pending: PendingSave | None = None
        self._plan: _Cached | None = None
        self._is_closed = False
        atexit.register(self.wait)  # raises, hence shows, an error that nobody has asked for

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def save(
        self,
        directory: str | os.PathLike[str],
        tag: str,
        state: Mapping[str, Any],
        *,
        keep_latest_pointer: bool = True,
        keep_last: int | None = None,
    ) -> PendingSave:
        """Copy the state, and write it as a checkpoint while the caller goes on.

        The state may be changed as soon as this returns, but for lazy shards (`FlatShard.lazy`):
        see `wait_for_reads`. Names, shapes and sharding are compared with those of the save before;
        where all are the same, what was planned then is used again.
        Collective.

        Args:
            directory, tag, state, keep_latest_pointer, keep_last: as for `save`.

        Raises:
            CheckpointError: on every rank, if the save before failed, this state cannot be saved,
                or ranks differ in tag. Directories are not compared: ranks may see one under two
                names.
        """
        if self._is_closed:
            raise CheckpointError("save: this AsyncSaver is closed; make another one")
        self.wait()
        begin = time.perf_counter()
        place = as_place(directory)
        to = Destination(place, tag, keep_latest_pointer, checked_keep_last(keep_last))
        planned = self._planned(to, state)
        copying = time.perf_counter()
        source, trouble = self._snapshot(planned)
        end = time.perf_counter()
        copied = 0 if source is None else source.nbytes
        pending = PendingSave(to, SaveFigures(copied, end - begin, end - copying))
        if source is not None and not source.has_lazy:
            pending._reads_done.set()
        self._pending = pending
        work = _Work(self._ranks, to, planned.items, planned.metadata, source, trouble)
        # Not a daemon: the interpreter waits for it before it ends.
        threading.Thread(target=_run, args=(work, pending), name="ds-core-checkpoint").start()
        return pending

    def wait(self) -> Place | None:
        """The directory of the last checkpoint, once it is complete; None if there is none.

        Raises CheckpointError if it failed and nobody has been told yet.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.done() and pending._was_told:
            return pending.path if pending._error is None else None
        return pending.wait()

    def wait_for_reads(self) -> None:
        """Return when the save in flight reads from no lazy shard any more.

        Whoever owns such shards calls it before overwriting them; in an engine the sharding does,
        as its `before_change`. Without lazy shards it returns at once.
        """
        if self._pending is not None:
            self._pending._reads_done.wait()

    def close(self) -> None:
        """Wait for the save in flight and give buffers and process group back. Collective.

        Raises CheckpointError as `wait` does.
        """
        try:
            self.wait()
        finally:
            if not self._is_closed and self._spans_world and dist.is_initialized():
                dist.destroy_process_group(self._own_group)
            self._is_closed = True
            atexit.unregister(self.wait)
            self._plan = None
            self._buffers = HostBuffers(pinned=False)

    def _planned(self, to: Destination, state: Mapping[str, Any]) -> Planned:
        """Who writes what: as for the save before, if no rank's state has changed its form."""
        flat: FlatState | None = None
        trouble: Exception | None = None
        signature = 0
        try:
            tags.checked_tag(to.tag)
            flat = checked_state(state)
            signature = _signature(flat)
        except Exception as error:
            trouble = error
        known = self._plan is not None and self._plan.signature == signature
        news = _FAILED if trouble is not None else _SAME if known else _CHANGED
        worst, agree = self._compare(news, to.tag)
        if worst == _FAILED:
            self._ranks.each(to.what, lambda: _raise(trouble))
        assert flat is not None
        if not agree:
            agree_on_tag(self._ranks, to)
        if worst == _CHANGED or self._plan is None:  # the latter is a change, too
            self._plan = _Cached(signature, plan_save(self._ranks, to.what, flat, None))
        planned = self._plan.planned
        planned.planner.state_dict = {**flat.tensors, **flat.values}  # type: ignore[attr-defined]
        return planned

    def _compare(self, news: int, name: str) -> tuple[int, bool]:
        """The largest `news` of all ranks, and whether all gave one name; in one small message."""
        digest = zlib.crc32(name.encode())
        told = torch.tensor([news, digest, -digest])
        if self._ranks.distributed:
            try:
                dist.all_reduce(told, dist.ReduceOp.MAX, group=self._own_group)
            except Exception as error:
                raise self._ranks.lost("beginning to save a checkpoint", error) from error
        worst, largest, smallest = told.tolist()
        return worst, largest == -smallest

    def _snapshot(self, planned: Planned) -> tuple[Snapshot | None, Exception | None]:
        """The copy; or why there is none, which the thread tells the other ranks."""
        try:
            return Snapshot(planned.items, planned.planner, self._buffers), None
        except Exception as error:
            return None, error
        finally:
            planned.planner.state_dict = {}  # type: ignore[attr-defined]  # keeps nothing alive


@dataclass
class _Cached:
    """What was planned, and for which form of this rank's state."""

    signature: int
    planned: Planned


@dataclass
class _Work:
    """What the thread needs to know."""

    ranks: Ranks
    to: Destination
    items: SavePlan
    metadata: Metadata | None
    source: Snapshot | None
    trouble: Exception | None

    def copied(self) -> Snapshot:
        """The copy; raises why there is none."""
        _raise(self.trouble)
        assert self.source is not None
        return self.source


def _run(work: _Work, pending: PendingSave) -> None:
    """The thread: write, publish, and say how it went."""
    begin = time.perf_counter()
    try:
        write_and_publish(
            work.ranks, work.to, work.items, work.copied, work.metadata, pending._reads_done.set
        )
    except BaseException as error:
        pending._error = error
        logger.error("%s", describe(error))
    finally:
        pending.figures = pending.figures._replace(write_s=time.perf_counter() - begin)
        pending._reads_done.set()
        pending._done.set()


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error


def _own_group(
    group: dist.ProcessGroup | None, timeout_s: float | None
) -> dist.ProcessGroup | None:
    """A group of the same ranks for messages between the writing threads."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    options: dict[str, Any] = {"backend": "gloo"}
    # torch gives a new group half an hour, whatever the one it is made from has.
    whole = dist.group.WORLD if group is None else group
    assert whole is not None
    options["timeout"] = timeout_of(whole) if timeout_s is None else timedelta(seconds=timeout_s)
    doing = "connecting the threads that write checkpoints"
    if group is None or group is dist.group.WORLD:
        return new_process_group(None, doing, **options)
    # Only members call. Such a group is named by its ranks, and a name must not be used again: the
    # rendezvous of a second one would find what the first left. So it is never destroyed.
    ranks = dist.get_process_group_ranks(group)
    return new_process_group(ranks, doing, use_local_synchronization=True, **options)


def _signature(flat: FlatState) -> int:
    """A number that tells the form of a state: names, shapes, dtypes, and who holds what."""
    parts = [_form(name, tensor) for name, tensor in flat.tensors.items()]
    return hash((tuple(parts), tuple(flat.paths.items())))


def _form(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    form = (name, type(tensor), tensor.dtype, tensor.shape)
    if isinstance(tensor, FlatShard):
        return (*form, tensor.start, tensor.held_numel, tensor.within, tensor.is_lazy)
    if isinstance(tensor, DTensor):
        return (*form, tensor.placements, tensor.device_mesh)
    return form
