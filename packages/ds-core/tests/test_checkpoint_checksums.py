from __future__ import annotations

import io
import threading
import zlib

import pytest
import torch
import torch.distributed as dist

from ds_core.checkpoint import FlatShard, data_file, load, save, verify
from ds_core.checkpoint.data_file import BLOCK_BYTES, Entry, write_data_file
from ds_core.checkpoint.index import Index
from ds_core.errors import CheckpointError
from ds_core.testing import flip_byte, run_ranks


def state():
    return {"a": torch.arange(10.0), "big": torch.arange(200_000.0).reshape(400, 500)}


def zeros():
    return {name: torch.zeros_like(tensor) for name, tensor in state().items()}


def damage_one(path, name, byte=0):
    stored = Index.read(path).tensors[name].boxes[0]
    flip_byte(path / stored.file, stored.start + byte)
    return stored


@pytest.mark.parametrize("byte", [0, BLOCK_BYTES, 799_999], ids=["first", "second-block", "last"])
def test_flipped_bit_names_file_tensor_box_and_place(tmp_path, byte):
    path = save(tmp_path, "t", state())
    stored = damage_one(path, "big", byte)
    at = stored.start + byte // BLOCK_BYTES * BLOCK_BYTES
    for action in (lambda: verify(tmp_path), lambda: load(tmp_path, state=zeros())):
        with pytest.raises(CheckpointError) as caught:
            action()
        text = str(caught.value)
        assert "rank_00000.safetensors is damaged" in text
        assert "tensor 'big', box of [400, 500] at [0, 0]" in text
        assert f"from byte {at} of the file" in text


def test_verify_lists_everything_that_is_damaged(tmp_path):
    path = save(tmp_path, "t", state())
    damage_one(path, "a")
    damage_one(path, "big")
    with pytest.raises(CheckpointError, match=r"(?s)tensor 'a'.*tensor 'big'|'big'.*'a'"):
        verify(tmp_path)


def test_load_with_verify_changes_nothing_if_anything_is_damaged(tmp_path):
    path = save(tmp_path, "t", state())
    damage_one(path, "big", 799_999)
    plain, checked = zeros(), zeros()
    with pytest.raises(CheckpointError, match="tensor 'big'"):
        load(tmp_path, state=plain)
    with pytest.raises(CheckpointError, match="tensor 'big'"):
        load(tmp_path, state=checked, verify=True)
    assert all(not tensor.any() for tensor in checked.values())


def test_load_with_verify_reads_what_it_would_not_load(tmp_path):
    path = save(tmp_path, "t", state())
    damage_one(path, "big")
    assert load(tmp_path, state={"a": torch.zeros(10)}, parts=["a"])["a"][3] == 3
    with pytest.raises(CheckpointError, match="tensor 'big'"):
        load(tmp_path, state={"a": torch.zeros(10)}, parts=["a"], verify=True)


def test_load_with_verify_loads_what_is_whole(tmp_path):
    save(tmp_path, "t", state())
    into = load(tmp_path, state=zeros(), verify=True)
    assert torch.equal(into["big"], state()["big"])


def test_checksums_of_large_pieces_come_from_a_thread_and_are_the_same():
    threads = set()
    original = data_file.block_checksums

    def noting(piece):
        threads.add(threading.get_ident())
        return original(piece)

    data_file.block_checksums = noting
    try:
        tensor = torch.arange(3_000_000, dtype=torch.int32)
        file = io.BytesIO()
        entries = [Entry("big", torch.int32, (3_000_000,)), Entry("small", torch.int32, (5,))]
        stored = write_data_file(file, entries, lambda i: tensor if i == 0 else tensor[:5])
    finally:
        data_file.block_checksums = original
    content = file.getvalue()
    for entry in stored:
        data = content[entry.start : entry.start + entry.nbytes]
        blocks = range(0, len(data), BLOCK_BYTES)
        assert entry.crc32 == tuple(zlib.crc32(data[i : i + BLOCK_BYTES]) for i in blocks)
    assert len(threads) == 2
    assert threading.get_ident() in threads


def test_error_in_the_middle_of_a_file_ends_the_thread_that_sums():
    class Full(io.BytesIO):
        def write(self, data):
            if len(data) > 1000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write_data_file(Full(), [Entry("w", torch.float32, (10**6,))], lambda i: torch.zeros(10**6))
    assert threading.active_count() == before


def verify_on_load(directory: str) -> str:
    rank = dist.get_rank()
    shard = FlatShard(torch.zeros(50_000), (100_000,), rank * 50_000)
    try:
        load(directory, state={"w": shard, "v": torch.zeros(3)}, verify=True)
    except CheckpointError as error:
        return f"{error} / {float(shard.local.abs().sum())}"
    return "loaded"


def save_shards(directory: str) -> None:
    rank = dist.get_rank()
    shard = FlatShard(torch.ones(50_000), (100_000,), rank * 50_000)
    save(directory, "t", {"w": shard, "v": torch.ones(3)})


def test_ranks_verify_together_and_fail_together(tmp_path):
    run_ranks(2, save_shards, str(tmp_path))
    assert run_ranks(2, verify_on_load, str(tmp_path)) == ["loaded", "loaded"]
    stored = Index.read(tmp_path / "t").tensors["w"].boxes[1]
    flip_byte(tmp_path / "t" / stored.file, stored.start + 7)
    for text in run_ranks(2, verify_on_load, str(tmp_path)):
        assert "rank_00001.safetensors is damaged" in text
        assert "tensor 'w', box of [50000] at [50000]" in text
        assert text.endswith("/ 0.0")
