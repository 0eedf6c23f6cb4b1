"""Integer geometry of flat ranges, boxes and contiguous reads; it knows no tensors.

A *box* is an axis-aligned block of a d-dimensional shape. A contiguous range of the shape's
row-major flattening is at most 2d-1 boxes (`cut_range`); the part of a stored box that somebody
wants is a few contiguous reads of it (`cut_reads`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ds_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a larger shape: where it starts and how long it is, per dimension."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for the box of a scalar."""
        return math.prod(self.lengths)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the box has as many dimensions as `shape` and lies inside it."""
        return len(self.offsets) == len(self.lengths) == len(shape) and all(
            offset >= 0 and length >= 0 and offset + length <= size
            for offset, length, size in zip(self.offsets, self.lengths, shape, strict=True)
        )

    def shifted(self, by: Sequence[int]) -> Box:
        """The same block with `by` added to its offsets."""
        offsets = tuple(offset + shift for offset, shift in zip(self.offsets, by, strict=True))
        return Box(offsets, self.lengths)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that is all of `shape`."""
        return cls((0,) * len(shape), tuple(shape))


class Piece(NamedTuple):
    """A box of a flat range: its elements are `range[position : position + box.numel]`."""

    box: Box
    position: int


def overlapping(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two of the boxes that share an element, or None if they are disjoint.

    Boxes of one shape. They are swept along their first dimension, so that boxes of different rows
    are not compared.
    """
    full = sorted((box for box in boxes if box.numel), key=lambda box: box.offsets)
    active: list[Box] = []
    for box in full:
        row = box.offsets[0] if box.offsets else 0
        active = [b for b in active if not b.offsets or b.offsets[0] + b.lengths[0] > row]
        for other in active:
            if _meet(box, other):
                return other, box
        active.append(box)
    return None


def _meet(one: Box, other: Box) -> bool:
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True)
    )


def row_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements between neighbours along each dimension of a row-major `shape`."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def cut_range(shape: Sequence[int], start: int, stop: int) -> list[Piece]:
    """The boxes of `shape` that together are elements `[start, stop)` of its flattening.

    Args:
        shape: sizes of a d-dimensional tensor; `()` is a scalar.
        start, stop: the range, in elements of the row-major flattening.

    Returns:
        At most 2d-1 pieces (1 for a scalar), in the order of the range, disjoint, covering it
        exactly. None for an empty range.

    Raises:
        CheckpointError: if the range does not lie inside the shape.
    """
    numel = math.prod(shape)
    if not 0 <= start <= stop <= numel:
        raise CheckpointError(
            f"range [{start}, {stop}) does not lie inside a tensor of shape {list(shape)}, "
            f"whose elements are [0, {numel})"
        )
    strides = row_strides(shape)
    pieces: list[Piece] = []
    at = start
    while at < stop:
        box = _largest_box(shape, strides, at, stop)
        pieces.append(Piece(box, at - start))
        at += box.numel
    return pieces


def _largest_box(shape: Sequence[int], strides: Sequence[int], at: int, stop: int) -> Box:
    """The box that starts at flat index `at` and reaches as far as one box can before `stop`.

    Rows of the outermost possible dimension: the range first climbs to coarser rows, takes them
    whole, and descends again, so each dimension but the first gives at most two boxes.
    """
    offsets = tuple(at // stride % size for stride, size in zip(strides, shape, strict=True))
    for dim, stride in enumerate(strides):
        if at % stride == 0 and stop - at >= stride:
            rows = min((stop - at) // stride, shape[dim] - offsets[dim])
            return Box(offsets, (1,) * dim + (rows,) + tuple(shape[dim + 1 :]))
    return Box((), ())


class Read(NamedTuple):
    """One contiguous read of a stored box, and where its elements belong.

    Attributes:
        start: first element to read, in the flattening of the stored box.
        shape: shape of what is read, row-major.
        crop: the block of `shape` that is wanted.
        at: leading indices into the wanted box where `crop` belongs.
        row: offset of `crop` along the dimension after `at`; 0 for a scalar.
    """

    start: int
    shape: tuple[int, ...]
    crop: Box
    at: tuple[int, ...]
    row: int


def cut_reads(shape: Sequence[int], wanted: Box, *, max_gap: int, max_numel: int) -> Iterator[Read]:
    """The contiguous reads that fetch `wanted` out of a stored row-major box of `shape`.

    Args:
        shape: lengths of the stored box.
        wanted: a block of it, with offsets relative to it.
        max_gap: elements that may be read in vain between two wanted runs, because reading on is
            cheaper than another read. Around a single run, none are.
        max_numel: elements of the largest read, unless a single row is larger.

    Returns:
        The reads, in storage order; their crops cover `wanted` exactly once. None if it is empty.
    """
    if wanted.numel == 0:
        return
    if not shape:
        yield Read(0, (), Box((), ()), (), 0)
        return
    strides = row_strides(shape)
    dim = len(shape) - 1
    while dim > 0 and (gap := (shape[dim] - wanted.lengths[dim]) * strides[dim]) <= max_gap:
        if gap and math.prod(wanted.lengths[:dim]) == 1:
            break  # a single run, with nothing to read on to
        dim -= 1
    trailing = tuple(shape[dim + 1 :])
    rows_per_read = max(1, max_numel // strides[dim])
    for index in itertools.product(*map(range, wanted.lengths[:dim])):
        row_start = sum(
            (offset + i) * stride
            for offset, i, stride in zip(wanted.offsets[:dim], index, strides[:dim], strict=True)
        )
        for row in range(0, wanted.lengths[dim], rows_per_read):
            rows = min(rows_per_read, wanted.lengths[dim] - row)
            yield Read(
                start=row_start + (wanted.offsets[dim] + row) * strides[dim],
                shape=(rows, *trailing),
                crop=Box((0, *wanted.offsets[dim + 1 :]), (rows, *wanted.lengths[dim + 1 :])),
                at=index,
                row=row,
            )
