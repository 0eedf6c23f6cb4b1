"""Where ZeRO keeps a parameter: integers against a flat vector that is really cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_core.checkpoint.foreign.flat_groups import (
    Piece,
    consecutive_pieces,
    divided_pieces,
    uncovered,
)

shapes_of = st.lists(
    st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5
).map(lambda shapes: {f"p{i}": shape for i, shape in enumerate(shapes)})


def values(shapes):
    return {n: torch.arange(math.prod(s)) + 100 * i for i, (n, s) in enumerate(shapes.items())}


def joined(pieces, partitions):
    parts = [partitions[rank][start : start + count] for rank, start, count in pieces]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


@given(shapes_of, st.integers(1, 4), st.integers(0, 2))
def test_parameters_one_behind_another_are_found(shapes, world_size, padding):
    whole = values(shapes)
    filler = torch.full((padding,), -1)
    flat = torch.cat([part for value in whole.values() for part in (value, filler)])
    size = -(-len(flat) // world_size)
    partitions = [flat[rank * size : (rank + 1) * size] for rank in range(world_size)]
    sizes = [len(partition) for partition in partitions]
    found = consecutive_pieces(shapes, sizes, [padding] * len(shapes))
    for name, value in whole.items():
        assert torch.equal(joined(found[name], partitions), value)
        assert uncovered(shapes[name], found[name], sizes) == ""


@given(shapes_of, st.integers(1, 4))
def test_parameters_divided_among_ranks_are_found(shapes, world_size):
    whole = values(shapes)
    partitions = [[] for _ in range(world_size)]
    for value in whole.values():
        part = -(-len(value) // world_size)
        padded = torch.cat([value, torch.full((part * world_size - len(value),), -1)])
        for rank in range(world_size):
            partitions[rank].append(padded[rank * part : (rank + 1) * part])
    flat = [torch.cat(parts) for parts in partitions]
    found = divided_pieces(shapes, world_size)
    for name, value in whole.items():
        assert torch.equal(joined(found[name], flat), value)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([Piece(0, 0, 3)], "3 of its 4 elements are there"),
        ([Piece(0, 0, 2), Piece(1, 9, 2)], "rank 1 has 10 elements, 11 are needed"),
    ],
    ids=["short", "beyond"],
)
def test_what_is_missing_is_told(pieces, told):
    assert uncovered((2, 2), pieces, [10, 10]) == told
