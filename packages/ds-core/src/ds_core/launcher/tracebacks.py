"""Tracebacks in the output of a process: where they begin and which belong together."""

from __future__ import annotations

import re

#: A traceback's first line. torch.distributed puts the rank before it.
TRACEBACK = re.compile(
    rb"^(\[rank\d+\]: ?)?( *\+ Exception Group )?Traceback \(most recent call last\):", re.MULTILINE
)

_LINKS = (
    b"During handling of the above exception",
    b"The above exception was the direct cause",
)


def last_traceback(text: bytes) -> bytes | None:
    """The last traceback in `text` to its end, with those that led to it; None without any."""
    starts = [match.start() for match in TRACEBACK.finditer(text)]
    if not starts:
        return None
    chosen = len(starts) - 1
    while chosen > 0 and _leads_over(text[starts[chosen - 1] : starts[chosen]]):
        chosen -= 1
    return text[starts[chosen] :]


def _leads_over(traceback: bytes) -> bool:
    """Whether a traceback ends with the words that lead over to the next one."""
    return any(link in traceback for link in _LINKS)
