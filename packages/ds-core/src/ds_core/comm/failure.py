"""What is said of a collective that cannot complete: which one, where, because of whom."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from ds_core.comm import board
from ds_core.comm.board import Note
from ds_core.comm.process_groups import backend_of
from ds_core.errors import CommError

if TYPE_CHECKING:
    from ds_core.comm.group import Group

#: How long the ranks that saw a collective fail wait for the others to say that they live.
ROLL_CALL_S = 3.0

# A tag that no exchange and no caller uses.
_NO_TAG = (1 << 31) - 1


class Call(NamedTuple):
    """What all ranks of a group must agree on when they call a collective.

    Attributes:
        op: the operation.
        caller: what it is for.
        shape: of this rank's tensor, or None where it may differ or there is none.
        dtype: of that tensor.
        detail: what else must be equal, such as the reduction or the source.
    """

    op: str
    caller: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    detail: str = ""

    def told(self) -> str:
        """In words: "all_reduce of layer.3, [10] float32 (sum)"."""
        told = f"{self.op} of {self.caller or 'the caller'}"
        if self.shape is not None or self.dtype is not None:
            shape = "" if self.shape is None else f" {list(self.shape)}"
            told += f",{shape} {str(self.dtype).removeprefix('torch.')}"
        return told + (f" ({self.detail})" if self.detail else "")


def call_of(
    op: str, caller: str, tensors: torch.Tensor | list[torch.Tensor] | None, detail: str
) -> Call:
    """The call of an operation on one tensor, several, or none."""
    if isinstance(tensors, list):
        sizes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        detail = f"{detail}{', ' if detail else ''}{len(tensors)} tensors of {sizes}"
        return Call(op, caller, None, tensors[0].dtype if tensors else None, detail)
    if tensors is None:
        return Call(op, caller, None, None, detail)
    return Call(op, caller, tensors.shape, tensors.dtype, detail)


def collective_failed(
    call: Call, position: int, group: Group, error: Exception, peers: Sequence[int] = ()
) -> CommError:
    """The error to raise after the backend's; asks who else lives, and what they were doing.

    Every rank that sees the failure leaves a note, closes its connections of this group so that
    nobody waits for it in vain, and waits up to `ROLL_CALL_S` for the notes of the others; of
    `peers` alone, if only these ranks of the group took part.
    """
    cause = _plain(str(error)) or type(error).__name__
    mine = Note(group.lane_name, position, call.told(), cause)
    who = _roll_call(group.pg, mine, [group.ranks[peer] for peer in peers] or group.ranks)
    return _error(call, group, f"{who} ({cause})")


def who_failed(
    pg: dist.ProcessGroup | None,
    doing: str,
    error: Exception,
    *,
    ranks: Sequence[int] | None = None,
) -> str:
    """Who is missing, in words, when an exchange of torch itself fails: one of a checkpoint.

    pg: the group of the exchange; None: all ranks. `doing` is equal on all of them.
    ranks: the global ranks that took part; None: all of `pg`.
    """
    ranks = dist.get_process_group_ranks(pg) if ranks is None else ranks
    whole = pg or dist.group.WORLD
    assert whole is not None
    cause = _plain(str(error)) or type(error).__name__
    note = Note(f"{whole.group_name}/{doing}", 0, doing, cause)
    return f"{_roll_call(whole, note, ranks)} ({cause})"


def sequence_differs(
    call: Call, position: int, group: Group, calls: Mapping[int, str]
) -> CommError:
    """The error to raise when ranks are found to be in different calls.

    calls: by global rank, in words, of those that are known.
    """
    cause = differences(position, calls)
    mine = Note(group.lane_name, position, calls[dist.get_rank()], cause)
    with suppress(Exception):
        board.leave_note(dist.get_rank(), mine)
    _hang_up(group.pg)
    return _error(call, group, cause)


def differences(position: int, calls: Mapping[int, str]) -> str:
    """Who calls what, equal ranks together."""
    by_call: dict[str, list[int]] = {}
    for rank, call in sorted(calls.items()):
        by_call.setdefault(call, []).append(rank)
    who = "; ".join(f"rank {_listed(ranks)}: {call}" for call, ranks in by_call.items())
    return f"the ranks differ at call {position} of the group: {who}"


def _error(call: Call, group: Group, what: str) -> CommError:
    return CommError(
        f"{call.op} of {call.caller or 'the caller'} in group {group.name!r} (ranks "
        f"{list(group.ranks)}) failed on rank {group.ranks[group.rank]}: {what}"
    )


def _roll_call(pg: dist.ProcessGroup | None, mine: Note, ranks: Sequence[int]) -> str:
    others = [rank for rank in ranks if rank != dist.get_rank()]
    try:
        board.leave_note(dist.get_rank(), mine)
        _hang_up(pg)
        notes = board.await_notes(others, ROLL_CALL_S)
        silent = [rank for rank in others if rank not in notes]
        known = board.whereabouts(silent)
    except Exception:
        # The store is gone or hangs, and with it the process that holds it.
        holder = [0] if dist.get_rank() != 0 else others
        return (
            f"rank {_listed(holder)} stopped answering, and so did the rendezvous store; if it "
            f"ended with an error of its own, that says why"
        )
    if silent:
        return _missing(silent, known)
    notes[dist.get_rank()] = mine
    return _compared(mine, notes)


def _missing(silent: list[int], known: Mapping[int, str]) -> str:
    """Who did not answer the roll call, and what is known of it."""
    told = [f"rank {rank} stopped answering: {text}" for rank, text in sorted(known.items())]
    rest = [rank for rank in silent if rank not in known]
    if rest:
        told.append(
            f"rank {_listed(rest)} stopped answering: it has ended, is stopped, or never came to "
            f"this call"
        )
    return "; ".join(told)


def _compared(mine: Note, notes: Mapping[int, Note]) -> str:
    """What the notes of a group whose ranks are all alive say."""
    here = {rank: note for rank, note in notes.items() if note.lane == mine.lane}
    positions = {note.position for note in here.values()}
    if len(here) < len(notes):
        elsewhere = "; ".join(
            f"rank {rank}: {note.call}" for rank, note in sorted(notes.items()) if rank not in here
        )
        return f"every rank is alive, and some failed in other groups: {elsewhere}"
    if len(positions) > 1:
        told = {rank: f"call {note.position}, {note.call}" for rank, note in here.items()}
    else:
        told = {rank: note.call for rank, note in here.items()}
    if len(set(told.values())) > 1:
        return differences(min(positions), told)
    saw = "; ".join(
        f"rank {rank} saw: {note.cause}" for rank, note in sorted(here.items()) if note is not mine
    )
    return f"every rank is alive and in the same call; {saw}"


def _hang_up(pg: dist.ProcessGroup | None) -> None:
    """Close this rank's connections of a gloo group, so that its peers fail now and not later."""
    if pg is None or backend_of(pg) != "gloo" or pg.size() == 1:
        return
    # gloo closes all connections of a group when one message is not there in time.
    with suppress(RuntimeError):
        work: Any = pg.recv([torch.empty(1)], (pg.rank() + 1) % pg.size(), _NO_TAG)
        work.wait(timedelta(milliseconds=1))


def _listed(ranks: list[int]) -> str:
    """ "0, 1" of a few ranks, "0-6, 9" of many."""
    if len(ranks) < 4:
        return ", ".join(map(str, ranks))
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _plain(message: str) -> str:
    """What the backend said, without its source location and its advice."""
    first = message.strip().partition("\n")[0]
    first = re.sub(r"^\[\S*\.(cc|cpp|h):\d+\]\s*", "", first)
    return first.partition(" This is typically caused by")[0].rstrip(". ")
