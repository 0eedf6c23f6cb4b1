"""How a unit is laid out in its flat buffers, and cut for the optimizer: integers and views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_core.flat import FlatLayout
from ds_zero.plan import ParamSpec, UnitSpec

#: Slots and shards start at multiples of this many bytes, so that vector units find them aligned.
ALIGN_BYTES = 64


@dataclass(frozen=True)
class OptimizerPiece:
    """The part of a unit's shard that one optimizer group updates.

    Attributes:
        group_index: which of the optimizer's parameter groups.
        weights: the optimizer's own parameter: a view of `master` or `shard`.
        start, stop: its range in the shard.
        name: the model's parameter that it is a part of, if it is a part of only one.
    """

    group_index: int
    weights: nn.Parameter
    start: int
    stop: int
    name: str | None = None


def unit_layout(spec: UnitSpec, dtype: torch.dtype, num_shards: int) -> FlatLayout:
    """Where the parameters of a unit lie in its flat buffer of `dtype`, cut into `num_shards`."""
    return FlatLayout.pack(
        [(s.name, tuple(s.param.shape)) for s in spec.params],
        num_shards=num_shards,
        align=max(1, ALIGN_BYTES // dtype.itemsize),
    )


def optimizer_ranges(
    specs: Sequence[ParamSpec], layout: FlatLayout, rank: int, limit: int | None
) -> list[tuple[int, int, int]]:
    """(group, start, stop) in a rank's shard: one per optimizer group whose slots reach into it.

    limit: elements of one; on disk more and smaller ones, so that one is read while another is
    updated.
    """
    ranges: list[tuple[int, int, int]] = []
    open_range: dict[int, int] = {}  # by group, which range takes its next part
    groups = {s.name: s.group_index for s in specs}
    for part in layout.pieces(rank):
        group = groups[part.slot.name]
        assert group is not None
        start, stop = part.offset, part.offset + part.stop - part.start
        index = open_range.get(group)
        if index is None or (limit is not None and stop - ranges[index][1] > limit):
            if index is not None:
                # Up to the next, so that a kernel meets the elements before the gap as it
                # would without a cut: its results do not depend on where states live.
                ranges[index] = (group, ranges[index][1], start)
            open_range[group] = len(ranges)
            ranges.append((group, start, stop))
        else:
            ranges[index] = (group, ranges[index][1], stop)
    return ranges
