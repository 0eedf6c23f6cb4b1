"""What a rank of a test run ended with: plain data, shared by the pool and its workers."""

from __future__ import annotations

import math
import signal
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_core.errors import DsError


@dataclass(frozen=True)
class Returned:
    """The rank returned `value`."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """The rank raised: `type` is the exception's qualified class name, `message` its `str`.

    `raised_at` is the time on the monotonic clock, which all processes of a machine share.
    """

    type: str
    message: str
    traceback: str = field(default="", compare=False)
    raised_at: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Died:
    """The rank's process ended: by signal `signum`, or (if that is None) with `exit_code`."""

    signum: int | None
    exit_code: int | None = None
    output: str = field(default="", compare=False)


@dataclass(frozen=True)
class Hung:
    """The rank did not answer within `seconds`; `where` is the dump of its Python threads."""

    seconds: float
    where: str = field(default="", compare=False)


Outcome = Returned | Raised | Died | Hung


class RankFailure(DsError, RuntimeError):  # noqa: N818 - a verdict on a run
    """A function run in every rank of a test world failed in at least one of them.

    `outcomes` holds one `Returned`, `Raised`, `Died` or `Hung` per rank, in rank order.
    """

    def __init__(self, headline: str, outcomes: Sequence[Outcome]) -> None:
        super().__init__("\n".join([headline, *_details(outcomes)]))
        self.outcomes = tuple(outcomes)


def summarize(outcome: Outcome) -> str:
    """One line that says how a rank ended."""
    match outcome:
        case Returned():
            return "returned"
        case Raised(type=name, message=message):
            first_line = textwrap.shorten(message.strip().split("\n", 1)[0], 200)
            return f"raised {name}: {first_line}" if first_line else f"raised {name}"
        case Died(signum=int() as signum):
            return f"was killed by {signal_name(signum)}"
        case Died(exit_code=exit_code):
            return f"exited with code {exit_code}"
        case Hung(seconds=seconds):
            return f"did not finish within {seconds:g} s"


def failed_at(outcome: Outcome) -> float:
    """A sort key that puts the cause of a failed run before what followed from it."""
    match outcome:
        case Died():
            return 0.0
        case Raised(raised_at=raised_at):
            return raised_at
        case _:
            return math.inf


def signal_name(signum: int) -> str:
    """The symbolic name of a signal number (`SIGKILL`), or `signal 64` for one without a name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _details(outcomes: Sequence[Outcome]) -> list[str]:
    """The long texts (tracebacks, thread dumps, last output); equal ones are shown once."""
    ranks_by_text: dict[str, list[int]] = {}
    for rank, outcome in sorted(enumerate(outcomes), key=lambda item: failed_at(item[1])):
        text = _detail(outcome)
        if text:
            ranks_by_text.setdefault(text, []).append(rank)
    return [
        f"--- rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}:\n{text}"
        for text, ranks in ranks_by_text.items()
    ]


def _detail(outcome: Outcome) -> str:
    match outcome:
        case Returned():
            return ""
        case Raised(traceback=text):
            return text
        case Died(output=output):
            return f"last output before it {summarize(outcome)}:\n{output or '(none)'}"
        case Hung(where=where):
            return f"{summarize(outcome)}; its threads:\n{where or '(no thread dump)'}"
