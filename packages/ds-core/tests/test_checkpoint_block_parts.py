"""Ranks read the bytes that they hold, and verify the blocks between them together."""

from __future__ import annotations

import itertools
import zlib

import pytest
import torch

from ds_core.checkpoint import FlatShard, load, save
from ds_core.checkpoint.block_parts import joined_checksum
from ds_core.checkpoint.box_reader import BlockPart, BoxReader
from ds_core.checkpoint.data_file import BLOCK_BYTES
from ds_core.checkpoint.index import Index
from ds_core.testing import RankFailure, flip_byte, run_ranks

NUMEL = 3 * BLOCK_BYTES // 4 + 1001


def part(data, low, high):
    return BlockPart("file", 0, 0, low, high, zlib.crc32(data[low:high]))


def test_the_checksum_of_a_block_follows_from_its_parts():
    data = torch.arange(1000, dtype=torch.uint8).numpy().tobytes()
    cuts = [0, 1, 7, 7 + 256, 999, 1000]
    parts = [part(data, low, high) for low, high in itertools.pairwise(cuts)]
    assert joined_checksum(parts, 1000) == zlib.crc32(data)
    assert joined_checksum(parts[:-1], 1000) is None  # the end is missing
    assert joined_checksum(parts[1:], 1000) is None
    assert joined_checksum([*parts[:2], part(data, 5, 1000)], 1000) is None  # an overlap


def shard_of(tensor, rank, ranks, overlap=0):
    size = -(-tensor.numel() // ranks)
    start, stop = min(rank * size, tensor.numel()), min((rank + 1) * size, tensor.numel())
    start = max(0, start - overlap)
    return FlatShard(torch.zeros(stop - start), tuple(tensor.shape), start)


def load_share(folder, ranks_of_cut, overlap=0, tensors=("w",)):
    """Bytes read of data files, and whether the values are right."""
    rank = torch.distributed.get_rank()
    read = 0
    original = BoxReader.read

    def counted(self, record, stored, low, high):
        nonlocal read
        read += high - low
        return original(self, record, stored, low, high)

    BoxReader.read = counted
    try:
        whole = torch.arange(float(NUMEL))
        state = {name: shard_of(whole, rank, ranks_of_cut, overlap) for name in tensors}
        load(folder, state=state)
    finally:
        BoxReader.read = original
    own = sum(shard.local.numel() * 4 for shard in state.values())
    right = all(
        torch.equal(shard.local, whole[shard.start : shard.start + shard.local.numel()])
        for shard in state.values()
    )
    return read - own, right


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, "t", {"w": torch.arange(float(NUMEL))}).parent


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_reads_its_bytes_and_no_others(saved, ranks):
    assert run_ranks(ranks, load_share, str(saved), ranks) == [(0, True)] * ranks


def test_a_block_that_is_not_loaded_whole_is_read_whole_by_one_rank(saved):
    # Two ranks load the first two of three thirds: the block with the second cut has a part that
    # nobody wants.
    (none, right), (some, also) = run_ranks(2, load_share, str(saved), 3)
    assert (none, right, also) == (0, True, True)
    assert some == BLOCK_BYTES


def test_a_tensor_without_elements_begins_where_another_does(tmp_path):
    # The widest elements come first in a file, the index has the order of the state.
    empty = torch.zeros(0, 3, dtype=torch.float64)
    save(tmp_path, "t", {"w": torch.arange(float(NUMEL)), "none": empty})
    starts = [record.boxes[0].start for record in Index.read(tmp_path / "t").tensors.values()]
    assert starts[0] == starts[1]
    assert run_ranks(2, load_beside_nothing, str(tmp_path)) == [True, True]


def load_beside_nothing(folder):
    """Whether a share is right that is loaded together with a tensor of no elements."""
    whole = torch.arange(float(NUMEL))
    share = shard_of(whole, torch.distributed.get_rank(), 2)
    nothing = FlatShard(torch.zeros(0, dtype=torch.float64), (0, 3))
    load(folder, state={"w": share, "none": nothing})
    return torch.equal(share.local, whole[share.start :][: share.held_numel])


def test_overlapping_shares_are_verified_too(saved):
    found = run_ranks(2, load_share, str(saved), 2, overlap=10)
    assert [right for _, right in found] == [True, True]
    assert sorted(extra for extra, _ in found) == [0, BLOCK_BYTES]


@pytest.mark.parametrize("at", [0, NUMEL * 2 - 4, NUMEL * 2 + 4, NUMEL * 4 - 1])
@pytest.mark.parametrize("overlap", [0, 10])
def test_a_damaged_byte_is_found_wherever_it_is(saved, at, overlap):
    index = Index.read(saved / "t")
    [stored] = index.tensors["w"].boxes
    flip_byte(saved / "t" / stored.file, stored.start + at)
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_share, str(saved), 2, overlap)
    for outcome in caught.value.outcomes:
        assert "is damaged: the bytes of 'w|0'" in outcome.message


def load_with_one_bad_read(folder):
    """Rank 1's memory spoils a byte of what it read; the file is right."""
    original = BoxReader.read

    def spoiled(self, record, stored, low, high):
        if self._exact and torch.distributed.get_rank() == 1:
            from ds_core.checkpoint import box_reader

            exactly = box_reader.read_exactly

            def bad(*arguments):
                data = exactly(*arguments)
                data[3] ^= 1
                return data

            box_reader.read_exactly = bad
            try:
                return original(self, record, stored, low, high)
            finally:
                box_reader.read_exactly = exactly
        return original(self, record, stored, low, high)

    BoxReader.read = spoiled
    try:
        # Both hold the same part of the last block, so that one's is right and the other's is not.
        load(folder, state={"w": FlatShard(torch.zeros(100), (NUMEL,), NUMEL - 200)})
    finally:
        BoxReader.read = original


def test_a_bad_read_of_one_rank_is_not_excused_by_a_good_one_of_another(saved):
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_with_one_bad_read, str(saved))
    assert all("is damaged" in outcome.message for outcome in caught.value.outcomes)
