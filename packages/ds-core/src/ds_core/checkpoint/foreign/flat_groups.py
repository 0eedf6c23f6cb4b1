"""Where ZeRO keeps a parameter: pieces of the flat partitions that each rank's file holds.

Integers only: nothing here reads a tensor. A piece `(rank, start, numel)` is elements
`[start, start + numel)` of the flat partition of a rank; a parameter is its pieces in rank order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A run of elements of one rank's flat partition."""

    rank: int
    start: int
    numel: int


Shapes = Mapping[str, Sequence[int]]


def mapped_pieces(shapes: Shapes, mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Piece]]:
    """Stages 1 and 2: each rank tells which part of which parameter it holds.

    Args:
        shapes: of the parameters of one group.
        mappings: per rank, name of a parameter to its address with `start` and `numel`.
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for rank, mapping in enumerate(mappings):
        for name, address in mapping.items():
            if name in pieces:
                pieces[name].append(Piece(rank, address.get("start"), address.get("numel")))
    return pieces


def consecutive_pieces(
    shapes: Shapes, partition_numel: Sequence[int], paddings: Sequence[int] | None
) -> dict[str, list[Piece]]:
    """Stages 1 and 2 of releases that tell no addresses: parameters lie one behind another.

    Args:
        shapes: of the parameters of one group, in order.
        partition_numel: elements of the group that each rank holds.
        paddings: elements that follow each parameter. Default: none.
    """
    pieces: dict[str, list[Piece]] = {}
    at = 0
    for position, (name, shape) in enumerate(shapes.items()):
        numel = math.prod(shape)
        pieces[name] = _cut(at, at + numel, partition_numel)
        at += numel + (paddings[position] if paddings else 0)
    return pieces


def _cut(start: int, stop: int, partition_numel: Sequence[int]) -> list[Piece]:
    found = []
    first = 0
    for rank, numel in enumerate(partition_numel):
        low, high = max(start, first), min(stop, first + numel)
        if low < high:
            found.append(Piece(rank, low - first, high - low))
        first += numel
    return found


def divided_pieces(shapes: Shapes, world_size: int) -> dict[str, list[Piece]]:
    """Stage 3: every parameter is divided evenly among all ranks, the last parts padded.

    Args:
        shapes: of the parameters of one group, in order.
    """
    pieces: dict[str, list[Piece]] = {}
    at = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // world_size)
        pieces[name] = [
            Piece(rank, at, held)
            for rank in range(world_size)
            if (held := max(0, min(part, numel - rank * part)))
        ]
        at += part
    return pieces


def uncovered(shape: Sequence[int], pieces: Sequence[Piece], partitions: Sequence[int]) -> str:
    """Why the pieces do not make up a parameter; empty if they do.

    Args:
        partitions: elements that each rank's partition has.
    """
    numel, held = math.prod(shape), sum(piece.numel for piece in pieces)
    if held != numel:
        return f"{held} of its {numel} elements are there"
    for rank, start, count in pieces:
        if start + count > partitions[rank]:
            return f"rank {rank} has {partitions[rank]} elements, {start + count} are needed"
    return ""
