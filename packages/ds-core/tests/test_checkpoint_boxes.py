from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core.checkpoint.boxes import Box, cut_range, cut_reads, overlapping, row_strides
from ds_core.errors import CheckpointError

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=5).map(tuple)


@st.composite
def ranges(draw):
    shape = draw(shapes)
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return shape, start, draw(st.integers(start, numel))


@st.composite
def blocks(draw):
    shape = draw(shapes)
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    lengths = tuple(draw(st.integers(0, s - o)) for s, o in zip(shape, offsets, strict=True))
    return shape, Box(offsets, lengths)


def elements(box: Box, array: np.ndarray) -> np.ndarray:
    block = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.lengths, strict=True))
    return array[block]


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_pieces_are_the_range_in_order(case):
    shape, start, stop = case
    flat_index = np.arange(math.prod(shape)).reshape(shape)
    pieces = cut_range(shape, start, stop)
    covered = [int(i) for box, _ in pieces for i in elements(box, flat_index).reshape(-1)]
    assert covered == list(range(start, stop))
    assert [position for _, position in pieces] == [
        int(elements(box, flat_index).reshape(-1)[0]) - start for box, _ in pieces
    ]


@settings(max_examples=300, deadline=None)
@given(ranges())
def test_pieces_are_at_most_2d_minus_1_and_not_empty(case):
    shape, start, stop = case
    pieces = cut_range(shape, start, stop)
    assert len(pieces) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel > 0 and box.fits(shape) for box, _ in pieces)


def test_bound_is_reached():
    assert len(cut_range((3, 3, 3), 1, 26)) == 5


@pytest.mark.parametrize(
    ("shape", "start", "stop", "lengths"),
    [
        pytest.param((), 0, 1, [()], id="scalar"),
        pytest.param((), 0, 0, [], id="scalar-held-elsewhere"),
        pytest.param((0, 4), 0, 0, [], id="no-elements"),
        pytest.param((7,), 3, 3, [], id="empty-range"),
        pytest.param((7,), 2, 5, [(3,)], id="vector"),
        pytest.param((4, 5), 0, 20, [(4, 5)], id="whole-matrix"),
        pytest.param((4, 5), 5, 15, [(2, 5)], id="whole-rows"),
        pytest.param((4, 5), 3, 17, [(1, 2), (2, 5), (1, 2)], id="ragged-both-ends"),
        pytest.param((1, 1, 9), 2, 5, [(1, 1, 3)], id="leading-ones"),
    ],
)
def test_known_cuts(shape, start, stop, lengths):
    assert [box.lengths for box, _ in cut_range(shape, start, stop)] == lengths


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 2), (0, 21)])
def test_range_outside_the_shape_is_refused(start, stop):
    with pytest.raises(CheckpointError, match=r"does not lie inside a tensor of shape \[4, 5\]"):
        cut_range((4, 5), start, stop)


@settings(max_examples=300, deadline=None)
@given(blocks(), st.integers(0, 20), st.integers(1, 20))
def test_reads_fetch_exactly_the_wanted_block(case, max_gap, max_numel):
    shape, wanted = case
    stored = np.arange(math.prod(shape)).reshape(shape)
    target = np.full(wanted.lengths, -1)
    for read in cut_reads(shape, wanted, max_gap=max_gap, max_numel=max_numel):
        count = math.prod(read.shape)
        data = stored.reshape(-1)[read.start : read.start + count].reshape(read.shape)
        crop = elements(read.crop, data)
        if read.shape:
            slot = target[read.at][read.row : read.row + read.shape[0]]
            assert (slot == -1).all()
            slot[...] = crop
        else:
            target[...] = crop
    np.testing.assert_array_equal(target, elements(wanted, stored))


@settings(max_examples=200, deadline=None)
@given(blocks(), st.integers(1, 20))
def test_reads_stay_within_the_limit_or_one_row(case, max_numel):
    shape, wanted = case
    for read in cut_reads(shape, wanted, max_gap=0, max_numel=max_numel):
        assert math.prod(read.shape) <= max(max_numel, math.prod(read.shape[1:]))


def test_reads_skip_wide_gaps_and_bridge_narrow_ones():
    column = Box((0, 10), (3, 2))
    separate = list(cut_reads((3, 100), column, max_gap=50, max_numel=1000))
    bridged = list(cut_reads((3, 100), column, max_gap=98, max_numel=1000))
    assert [(read.start, read.shape) for read in separate] == [
        (10, (2,)),
        (110, (2,)),
        (210, (2,)),
    ]
    assert [(read.start, read.shape) for read in bridged] == [(0, (3, 100))]


def test_row_strides_are_row_major():
    assert row_strides((2, 3, 4)) == (12, 4, 1)
    assert row_strides(()) == ()


@given(shapes.filter(lambda shape: shape), st.data())
def test_overlaps_are_found_exactly_when_an_element_is_covered_twice(shape, data):
    counts, drawn = np.zeros(shape, dtype=int), []
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = tuple(data.draw(st.integers(0, size)) for size in shape)
        lengths = tuple(
            data.draw(st.integers(0, s - o)) for s, o in zip(shape, offsets, strict=True)
        )
        drawn.append(Box(offsets, lengths))
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))] += 1
    found = overlapping(drawn)
    assert (found is not None) == bool((counts > 1).any())


@given(ranges())
def test_the_pieces_of_a_range_do_not_overlap(drawn):
    assert overlapping([piece.box for piece in cut_range(*drawn)]) is None


def test_a_scalar_that_is_stored_twice_overlaps():
    assert overlapping([Box((), ()), Box((), ())]) is not None
