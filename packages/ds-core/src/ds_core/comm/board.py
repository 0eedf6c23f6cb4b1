"""The notice board: what ranks tell each other through the rendezvous store when messages fail.

A store can hang (the process that holds it is stopped), so every question is asked from a thread
and has a deadline.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

#: How long the store may take to answer one question.
ANSWER_S = 3.0

T = TypeVar("T")


class StoreHangsError(Exception):
    """The rendezvous store has not answered within its deadline."""


@dataclass(frozen=True)
class Note:
    """What a rank says when it gives up.

    Attributes:
        lane: which sequence of collectives it was in.
        position: how many collectives it had begun in that lane.
        call: which collective it was in, in words.
        cause: what it saw.
    """

    lane: str
    position: int
    call: str
    cause: str


def ask(question: Callable[[Any], T], within_s: float = ANSWER_S) -> T:
    """What `question` returns for the default store.

    Raises StoreHangsError after `within_s` seconds, and whatever the store raises if it is gone.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    answers: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            answers.append(question(store))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ds-core-store")
    thread.start()
    thread.join(within_s)
    if errors:
        raise errors[0]
    if not answers:
        raise StoreHangsError(f"the rendezvous store has not answered for {within_s:g} s")
    return answers[0]


def someone_gave_up(ranks: Collection[int]) -> bool:
    """Whether one of these global ranks has left a note, or the store itself is gone."""
    try:
        return ask(lambda store: any(store.check([_key(rank)]) for rank in ranks))
    except StoreHangsError:
        return False  # slow or stopped: the backend's own timeout will tell
    except Exception:
        return True  # gone, and with it the rank that holds it


def leave_note(rank: int, note: Note) -> None:
    """Tell everybody that global rank `rank` gives up."""
    text = json.dumps(asdict(note))
    ask(lambda store: store.set(_key(rank), text))


def read_notes(ranks: Collection[int]) -> dict[int, Note]:
    """The notes that these global ranks have left so far."""

    def read(store: Any) -> dict[int, Note]:
        present = [rank for rank in ranks if store.check([_key(rank)])]
        return {rank: Note(**json.loads(store.get(_key(rank)))) for rank in present}

    return ask(read)


def await_notes(ranks: Collection[int], wait_s: float) -> dict[int, Note]:
    """The notes of these global ranks, waiting for those that have not come up to `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        notes = read_notes(ranks)
        if len(notes) == len(ranks) or time.monotonic() >= deadline:
            return notes
        time.sleep(0.05)


def tell_whereabouts(rank: int, text: str) -> None:
    """Have the others know what holds up global rank `rank`, should they miss it; "" takes it back.

    Nobody ends because of it: a rank that is late may still come.
    """
    ask(lambda store: store.set(_where_key(rank), text))


def whereabouts(ranks: Collection[int]) -> dict[int, str]:
    """What holds up these global ranks, of those that have said so."""

    def read(store: Any) -> dict[int, str]:
        present = [rank for rank in ranks if store.check([_where_key(rank)])]
        told = {rank: store.get(_where_key(rank)).decode() for rank in present}
        return {rank: text for rank, text in told.items() if text}

    return ask(read)


def _key(rank: int) -> str:
    return f"ds_core/alive/{rank}"


def _where_key(rank: int) -> str:
    return f"ds_core/where/{rank}"
