"""Who holds how many bytes where: the words in which a run and its plan say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

#: A memory, or a disk. With a model on the CPU nothing is on a "device": all memory is the host's.
Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
#: What outlives a step.
KINDS = ("parameters", "gradients", "master", "optimizer")


@dataclass(frozen=True)
class Holding:
    """A buffer that outlives a step.

    Attributes:
        place: where it is between steps.
        kind: what it holds: parameters, gradients, master, optimizer; "buffers" for what is on
            its way between places.
        nbytes: its size.
        padding: bytes of it that belong to no parameter.
    """

    place: Place
    kind: str
    nbytes: int
    padding: int = 0


def by_place(holdings: Iterable[Holding]) -> dict[Place, dict[str, int]]:
    """Bytes by place and kind; "padding" is part of the others. Places that hold nothing go."""
    found: dict[Place, dict[str, int]] = {}
    for each in holdings:
        if each.nbytes == 0:
            continue
        kinds = found.setdefault(each.place, dict.fromkeys((*KINDS, "padding"), 0))
        kinds[each.kind] = kinds.get(each.kind, 0) + each.nbytes
        kinds["padding"] += each.padding
    return found


def in_memory(places: Mapping[Place, Mapping[str, int]]) -> dict[str, int]:
    """Bytes by kind of what is in memory, the device's or the host's."""
    total = dict.fromkeys((*KINDS, "padding"), 0)
    for place in ("device", "host"):
        for kind, size in places.get(place, {}).items():
            total[kind] = total.get(kind, 0) + size
    return total
