"""The geometry of flat buffers, on integers alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_core.flat import FlatLayout, Slot

SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=8)


def pack(shapes, **options):
    return FlatLayout.pack(((f"p{i}", shape) for i, shape in enumerate(shapes)), **options)


def test_slots_start_at_multiples_of_align():
    layout = pack([(3,), (2, 2), ()], num_shards=2, align=4)
    assert layout.slots == (Slot("p0", (3,), 0), Slot("p1", (2, 2), 4), Slot("p2", (), 8))
    assert (layout.numel, layout.shard_numel, layout.padding) == (16, 8, 8)
    assert layout.gaps() == [(3, 4), (9, 16)]


def test_pieces_are_cut_at_shard_boundaries():
    layout = pack([(3,), (5,)], num_shards=2)
    first, second = layout.pieces(0), layout.pieces(1)
    assert [(p.slot.name, p.start, p.stop, p.offset) for p in first] == [
        ("p0", 0, 3, 0),
        ("p1", 0, 1, 3),
    ]
    assert [(p.slot.name, p.start, p.stop, p.offset) for p in second] == [("p1", 1, 5, 0)]


@given(shapes=SHAPES, num_shards=st.integers(1, 5), align=st.sampled_from([1, 2, 16]))
def test_pieces_cover_every_slot_once(shapes, num_shards, align):
    layout = pack(shapes, num_shards=num_shards, align=align)
    assert layout.numel == layout.shard_numel * num_shards
    assert layout.shard_numel % align == 0
    covered = {slot.name: [] for slot in layout.slots}
    for shard in range(num_shards):
        for piece in layout.pieces(shard):
            assert 0 <= piece.offset <= layout.shard_numel - (piece.stop - piece.start)
            there = shard * layout.shard_numel + piece.offset
            assert there == piece.slot.offset + piece.start
            covered[piece.slot.name] += range(piece.start, piece.stop)
    for slot in layout.slots:
        assert covered[slot.name] == list(range(slot.numel))


@given(shapes=SHAPES, num_shards=st.integers(1, 5), align=st.sampled_from([1, 4]))
def test_gaps_are_what_no_slot_covers(shapes, num_shards, align):
    layout = pack(shapes, num_shards=num_shards, align=align)
    in_slots = {i for slot in layout.slots for i in range(slot.offset, slot.end)}
    in_gaps = {i for start, stop in layout.gaps() for i in range(start, stop)}
    assert in_slots | in_gaps == set(range(layout.numel))
    assert not in_slots & in_gaps
    assert len(in_gaps) == layout.padding


@pytest.mark.parametrize("num_shards", [1, 4])
def test_nothing_takes_no_room(num_shards):
    layout = pack([], num_shards=num_shards, align=16)
    assert layout.numel == 0
    assert layout.pieces(0) == []
