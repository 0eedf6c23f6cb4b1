"""A collective from its call to its end: counted, checked, watched, and failed with a name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_core.comm import board
from ds_core.comm.failure import call_of, collective_failed
from ds_core.comm.group import Group
from ds_core.comm.ledger import Span
from ds_core.comm.sequence import NEWS_S
from ds_core.errors import CommError

Tensors = torch.Tensor | list[torch.Tensor] | None
Finish = Callable[[], None] | None


class Pending:
    """A collective under way; `wait()` completes it. Waiting twice is harmless."""

    __slots__ = (
        "_caller",
        "_detail",
        "_direct",
        "_finish",
        "_group",
        "_op",
        "_peers",
        "_position",
        "_tensors",
        "_works",
    )

    def __init__(
        self,
        op: str,
        group: Group,
        caller: str,
        works: Sequence[Any],
        finish: Finish = None,
        tensors: Tensors = None,
        detail: str = "",
        direct: bool = False,
        peers: Sequence[int] = (),
    ) -> None:
        self._op, self._group, self._caller = op, group, caller
        self._works: Sequence[Any] = works
        self._finish = finish
        self._tensors, self._detail, self._direct, self._peers = tensors, detail, direct, peers
        self._position = group.num_started

    def is_complete(self) -> bool:
        """Whether `wait` would return at once.

        Direct messages on gloo cannot tell before they are waited for, and count as incomplete.
        """
        return all(work.is_completed() for work in self._works)

    def wait(self) -> None:
        """Block until the result is in place (on a GPU: until the current stream will see it).

        Raises CommError naming operation, group, caller and the ranks that stopped answering, or
        that called something else.
        """
        works, self._works = self._works, ()
        try:
            for work in works:
                if self._direct:
                    wait_for_message(work, self._group)
                else:
                    wait_for_collective(work, self._group)
        except CommError:
            raise
        except RuntimeError as error:
            call = call_of(self._op, self._caller, self._tensors, self._detail)
            raise collective_failed(
                call, self._position, self._group, error, self._peers
            ) from error
        self._tensors = None
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class WatchedPending(Pending):
    """A pending collective whose completion is told to the ledger's listeners."""

    __slots__ = ("_done_ns", "_issued_ns", "_message_bytes", "_sent_bytes")

    def note_start(self, sent_bytes: int, message_bytes: int, issued_ns: int) -> None:
        """What the ledger's listeners will be told; asks the backend for the moment of its end."""
        self._sent_bytes, self._message_bytes = sent_bytes, message_bytes
        self._issued_ns, self._done_ns = issued_ns, 0
        if self._group.backend == "gloo" and not self._direct:
            for work in self._works:
                work.get_future().add_done_callback(self._note_done)

    def _note_done(self, future: Any) -> None:
        self._done_ns = time.perf_counter_ns()

    def wait(self) -> None:
        if not self._works:
            return
        waited_ns = time.perf_counter_ns()
        super().wait()
        group = self._group
        if group.ledger.synchronizes and group.backend not in ("gloo", "fake"):
            torch.accelerator.synchronize()
        span = Span(
            self._op,
            group.name,
            self._caller,
            group.size,
            self._sent_bytes,
            self._issued_ns,
            waited_ns,
            self._done_ns or time.perf_counter_ns(),
            self._message_bytes,
        )
        for listener in group.ledger.listeners:
            listener(span)


def run(
    op: str,
    group: Group,
    caller: str,
    start: Callable[[], tuple[Sequence[Any], Finish]],
    async_op: bool,
    *,
    tensors: Tensors = None,
    detail: str = "",
    sent_bytes: int = 0,
    message_bytes: int = 0,
    direct: bool = False,
    empty: bool = False,
    peers: Sequence[int] = (),
) -> Pending | None:
    """Start a collective, and complete it unless `async_op`.

    Args:
        start: hands it to the backend; returns what to wait for, and what to do after.
        tensors: of this rank; where a mismatch is told, and with the check, equal on all ranks.
        detail: what else is equal on all ranks.
        sent_bytes: payload that this rank sends.
        message_bytes: size of the message as benchmarks count it.
        direct: made of direct messages.
        empty: nothing is to be sent.
        peers: ranks of the group that take part beside this one, if not all do.
    """
    if group.size == 1:
        return Pending(op, group, caller, ()) if async_op else None
    group.num_started += 1
    if group.check is not None and not peers:
        group.check.admit(call_of(op, caller, tensors, detail))
    if empty:
        return Pending(op, group, caller, ()) if async_op else None
    ledger = group.ledger
    issued_ns = time.perf_counter_ns() if ledger.listeners else 0
    try:
        works, finish = start()
    except CommError:
        raise
    except RuntimeError as error:
        call = call_of(op, caller, tensors, detail)
        raise collective_failed(call, group.num_started, group, error, peers) from error
    ledger.record(op, group.name, caller, sent_bytes)
    if issued_ns:
        watched = WatchedPending(op, group, caller, works, finish, tensors, detail, direct, peers)
        watched.note_start(sent_bytes, message_bytes, issued_ns)
        pending: Pending = watched
    else:
        pending = Pending(op, group, caller, works, finish, tensors, detail, direct, peers)
    if async_op:
        return pending
    pending.wait()
    return None


def run_control(
    op: str, group: Group, caller: str, body: Callable[[dist.ProcessGroup], None], detail: str = ""
) -> None:
    """Run an exchange of control information to its end; it is not counted."""
    assert group.pg is not None
    group.num_started += 1
    call = call_of(op, caller, None, detail)
    if group.check is not None:
        group.check.admit(call)
    try:
        body(group.pg)
    except CommError:
        raise
    except RuntimeError as error:
        raise collective_failed(call, group.num_started, group, error) from error


def wait_for_message(work: Any, group: Group) -> None:
    """Wait for a direct message; one that does not come in time closes the connections."""
    # gloo would take the timeout that the group was made with, whatever was set since.
    if group.timeout is None or group.backend != "gloo":
        work.wait()
    else:
        work.wait(group.timeout)


def wait_for_collective(work: Any, group: Group) -> None:
    """Wait for the backend, or until another rank reports that it has given up.

    gloo passes data on from rank to rank: one that is no neighbour of a dead rank would otherwise
    wait until its neighbours are gone as well, and be taken for dead itself.
    """
    if group.backend != "gloo":
        work.wait()
        return
    while True:
        try:
            work.wait(timedelta(seconds=NEWS_S))
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # what it ended with, which may be success just after the time
                return
        if group.check is not None:
            group.check.look_for_others()
        mine = dist.get_rank()
        if board.someone_gave_up([rank for rank in group.ranks if rank != mine]):
            raise RuntimeError("another rank has given up")
