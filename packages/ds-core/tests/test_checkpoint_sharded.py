from __future__ import annotations

import copy

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from ds_core.checkpoint import Box, FlatShard
from ds_core.errors import CheckpointError


def test_shard_stands_for_the_whole_tensor():
    shard = FlatShard(torch.zeros(6, dtype=torch.bfloat16), (3, 4), start=5)
    assert isinstance(shard, torch.Tensor)
    assert (shard.shape, shard.dtype, shard.numel()) == ((3, 4), torch.bfloat16, 12)
    assert repr(shard) == "FlatShard([5, 11) of [3, 4], dtype=torch.bfloat16)"


def test_write_items_name_the_boxes():
    items = FlatShard(torch.zeros(6), (3, 4), start=5).__create_write_items__("w", None)
    chunks = [(tuple(i.index.offset), tuple(i.tensor_data.chunk.sizes)) for i in items]
    assert chunks == [((1, 1), (1, 3)), ((2, 0), (1, 3))]
    assert all(item.tensor_data.size == (3, 4) for item in items)


def test_views_alias_the_live_buffer():
    buffer = torch.arange(20.0)
    shard = FlatShard(buffer[4:14], (4, 5), start=5)
    view = shard.__get_tensor_shard__(MetadataIndex("w", (1, 0)))
    assert view.shape == (2, 5)
    view.zero_()
    assert buffer[4:14].sum() == 0
    assert buffer[14] == 14


def test_box_that_is_not_held_is_refused():
    shard = FlatShard(torch.zeros(5), (4, 5), start=5)
    with pytest.raises(CheckpointError, match=r"w: this rank holds no box at"):
        shard.__get_tensor_shard__(MetadataIndex("w", (0, 0)))


def test_range_within_a_block_of_a_tensor_parallel_weight():
    right_half = Box((0, 3), (4, 3))
    shard = FlatShard(torch.zeros(4), (4, 6), start=1, within=right_half)
    assert [(p.box.offsets, p.box.lengths) for p in shard.pieces] == [
        ((0, 4), (1, 2)),
        ((1, 3), (1, 2)),
    ]


@pytest.mark.parametrize(
    ("shape", "numel", "num_items"),
    [
        pytest.param((), 1, 1, id="scalar"),
        pytest.param((), 0, 0, id="scalar-held-elsewhere"),
        pytest.param((3, 4), 0, 0, id="nothing-held"),
        pytest.param((0, 4), 0, 1, id="no-elements"),
    ],
)
def test_small_cases_write_what_they_must(shape, numel, num_items):
    items = FlatShard(torch.zeros(numel), shape).__create_write_items__("w", None)
    assert len(items) == num_items


def test_copies_hold_their_own_elements():
    buffer = torch.arange(6.0)
    shard = FlatShard(buffer, (2, 4), start=1)
    for twin in (shard.clone(), copy.deepcopy(shard)):
        assert type(twin) is FlatShard
        twin.local.zero_()
        assert twin.start == 1
    assert shard.to(torch.float64).local.dtype == torch.float64
    assert buffer.sum() == 15


def test_shard_of_a_parameter_needs_no_gradient():
    flat = torch.nn.Parameter(torch.ones(4))
    shard = FlatShard(flat[1:3], (4,), start=1)
    assert not shard.requires_grad
    assert not shard.local.requires_grad


def test_computing_is_refused():
    shard = FlatShard(torch.ones(4), (4,))
    with pytest.raises(CheckpointError, match=r"Compute on its \.local"):
        shard + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: FlatShard(torch.zeros(2, 2), (4,)), r"got shape \[2, 2\]", id="not-flat"
        ),
        pytest.param(lambda: FlatShard(torch.zeros(8)[::2], (4,)), "contiguous 1-D", id="strided"),
        pytest.param(
            lambda: FlatShard(torch.zeros(4), (2, 2), start=1), "does not lie inside", id="too-long"
        ),
        pytest.param(
            lambda: FlatShard(torch.zeros(1, device="meta"), (2,)), "meta tensor", id="meta"
        ),
        pytest.param(
            lambda: FlatShard(torch.zeros(1), (2,), within=Box((1,), (2,))),
            "does not fit",
            id="block-outside",
        ),
    ],
)
def test_impossible_shards_are_refused(make, message):
    with pytest.raises(CheckpointError, match=message):
        make()
