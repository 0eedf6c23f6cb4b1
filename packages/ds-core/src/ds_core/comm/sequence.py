"""Checking that all ranks call the same collectives in the same order, before data moves.

What a group called next after its last two collectives is remembered once all ranks have agreed on
it. A call that is what memory foretells needs no message: whoever does something else has to ask
the others first, sends no data until they agree, and is found waiting. So a loop costs a comparison
per collective, and only what is new costs an exchange through the rendezvous store.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from ds_core.comm import board
from ds_core.comm.failure import Call, collective_failed, sequence_differs
from ds_core.comm.group import Group
from ds_core.errors import CommError

T = TypeVar("T")

#: How often a rank that waits asks whether others have reported a failure.
NEWS_S = 1.0

# How many of its last calls a rank can still name.
_RECENT = 256
# Memory of what follows what is dropped when it has so many entries: callers that never repeat.
_MOST_MOMENTS = 1 << 16


class _Moment:
    """A point in the sequence: a call, known by it and the one before, and what followed last."""

    __slots__ = ("call", "next")

    def __init__(self, call: Call | None) -> None:
        self.call = call
        self.next: _Moment | None = None


class SequenceCheck:
    """The check of one group.

    Args:
        group: whose collectives are checked.
        name: equal on all its ranks, unlike that of any other check.
    """

    def __init__(self, group: Group, name: str) -> None:
        self._group, self._name = group, name
        self._key = f"ds_core/check/{name}"
        self._moments: dict[tuple[Call | None, Call], _Moment] = {}
        self._here = _Moment(None)
        self._recent: deque[Call] = deque(maxlen=_RECENT)
        self._announced: deque[int] = deque(maxlen=_RECENT)
        self._verdicts: list[str] = []
        self.position = 0
        #: Exchanges that were needed so far.
        self.num_exchanges = 0

    def admit(self, call: Call) -> None:
        """Return once it is known that no rank of the group calls something else here.

        Raises CommError naming who calls what, or who does not come within the timeout.
        """
        self.position += 1
        self._recent.append(call)
        expected = self._here.next
        if expected is not None and expected.call == call:
            self._here = expected
            return
        self._agree(call)
        key = (self._here.call, call)
        if len(self._moments) >= _MOST_MOMENTS:
            self._moments.clear()
        moment = self._moments.get(key)
        if moment is None:
            moment = self._moments[key] = _Moment(call)
        self._here.next = moment
        self._here = moment

    def of_lane(self, lane: Group, number: int) -> SequenceCheck:
        """The check of the `number`-th lane of this check's group."""
        return SequenceCheck(lane, f"{self._name}.{number}")

    # ------------------------------------------------------------------ exchange

    def _agree(self, call: Call) -> None:
        group, position = self._group, self.position
        self.num_exchanges += 1
        self._announced.append(position)
        here = f"{self._key}/{position}"
        try:
            self._ask(lambda store: store.set(f"{here}/{group.rank}", call.told()))
            if group.rank == 0:
                keys = [f"{here}/{rank}" for rank in range(group.size)]
                self._await(keys, call)
                told = [value.decode() for value in self._ask(lambda store: store.multi_get(keys))]
                verdict = "" if len(set(told)) == 1 else json.dumps(told)
                self._ask(lambda store: self._publish(store, here, verdict or "same", keys))
            else:
                self._await([f"{here}/verdict"], call)
                answer = self._ask(lambda store: store.get(f"{here}/verdict")).decode()
                verdict = "" if answer == "same" else answer
        except CommError:
            raise
        except (RuntimeError, board.StoreHangsError) as error:
            raise collective_failed(call, position, group, error) from error
        if verdict:
            calls = dict(zip(group.ranks, json.loads(verdict), strict=True))
            raise sequence_differs(call, position, group, calls)

    def _ask(self, question: Callable[[Any], T]) -> T:
        """What `question` returns for the store, whose host may be the rank that has stopped.

        Raises StoreHangsError after the group's timeout.
        """
        timeout = self._group.timeout
        within_s = board.ANSWER_S if timeout is None else timeout.total_seconds()
        return board.ask(question, NEWS_S + within_s)

    def _publish(self, store: Any, here: str, verdict: str, keys: list[str]) -> None:
        """Say whether all agree. Whoever announces something new has read the verdict before."""
        store.set(f"{here}/verdict", verdict)
        for key in (*keys, *self._verdicts):
            store.delete_key(key)
        self._verdicts = [f"{here}/verdict"]

    def _await(self, keys: list[str], call: Call) -> None:
        """Return once the keys are there; raises as soon as it is known that they will not be."""
        waited_s, stuck = 0.0, f"{self._key}/stuck/{self._group.rank}"
        told = json.dumps([self.position, call.told()])
        timeout = self._group.timeout
        while True:
            try:
                self._ask(lambda store: store.wait(keys, timedelta(seconds=NEWS_S)))
                break
            except RuntimeError as error:
                if "connection" in str(error).lower():
                    raise
            waited_s += NEWS_S
            # Whoever went by memory does not look for this exchange unless it is told of it.
            self._ask(lambda store: store.set(stuck, told))
            self.look_for_others()
            if board.someone_gave_up(self._others()):
                self._explain(call)
            if timeout is not None and waited_s >= timeout.total_seconds():
                late = TimeoutError(f"waited {waited_s:g} s for all ranks to announce this call")
                raise collective_failed(call, self.position, self._group, late)
        if waited_s:
            self._ask(lambda store: store.delete_key(stuck))

    def _explain(self, call: Call) -> None:
        """Another rank has given up: because of this rank's call, or of something else."""
        notes = {}
        with suppress(Exception):
            notes = board.read_notes(self._others())
        calls = {
            rank: note.call
            for rank, note in notes.items()
            if note.lane == self._group.lane_name and note.position == self.position
        }
        if calls and any(other != call.told() for other in calls.values()):
            calls[dist.get_rank()] = call.told()
            raise sequence_differs(call, self.position, self._group, calls)
        error = RuntimeError("another rank has given up")
        raise collective_failed(call, self.position, self._group, error)

    def look_for_others(self) -> None:
        """Raise CommError if a rank waits at a call that this rank went past by memory."""
        group = self._group
        keys = {r: f"{self._key}/stuck/{i}" for i, r in enumerate(group.ranks) if i != group.rank}

        def read(store: Any) -> dict[int, tuple[int, str]]:
            present = [rank for rank, key in keys.items() if store.check([key])]
            return {rank: json.loads(store.get(keys[rank])) for rank in present}

        try:
            stuck = board.ask(read)
        except Exception:
            return  # a rank that goes on deletes its key meanwhile, and a lost store is told of
        oldest = self.position - len(self._recent) + 1
        for rank, (position, other) in stuck.items():
            if oldest <= position <= self.position and position not in self._announced:
                mine = self._recent[position - oldest]
                calls = {rank: other, dist.get_rank(): mine.told()}
                raise sequence_differs(mine, position, group, calls)

    def _others(self) -> list[int]:
        mine = dist.get_rank()
        return [rank for rank in self._group.ranks if rank != mine]
