from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ds_core.checkpoint import (
    Box,
    FlatShard,
    SafetensorsReader,
    SafetensorsWriter,
    consolidate,
    load,
    save,
    verify,
)
from ds_core.testing import RankFailure, run_ranks

SHAPES = {
    "blocks.0.weight": (7, 5),
    "blocks.0.bias": (5,),
    "conv": (3, 2, 4, 5),
    "scale": (),
    "none": (0, 3),
    "wide": (2, 40_000),
}
DTYPES = {"conv": torch.bfloat16, "blocks.0.bias": torch.float16}


def full_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator).to(DTYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def flat_range(numel: int) -> tuple[int, int]:
    """This rank's part of `numel` elements; unaligned, and empty for some ranks if small."""
    rank, size = dist.get_rank(), dist.get_world_size()
    step = math.ceil(numel / size)
    return min(rank * step, numel), min((rank + 1) * step, numel)


def as_shards(tensors: dict[str, torch.Tensor]) -> dict[str, FlatShard]:
    shards = {}
    for name, tensor in tensors.items():
        start, stop = flat_range(tensor.numel())
        shards[name] = FlatShard(tensor.reshape(-1)[start:stop].clone(), tensor.shape, start)
    return shards


def save_shards(directory: str) -> None:
    rank = dist.get_rank()
    state = {"model": as_shards(full_tensors()), "step": rank, f"rng{rank}": [rank]}
    save(directory, "t", state)


def load_shards(directory: str) -> int:
    expected = as_shards(full_tensors())
    into = {name: torch.zeros_like(t) for name, t in full_tensors().items()}
    shards = as_shards(into)
    loaded = load(directory, "t", state={"model": shards, "step": -1})
    for name, shard in shards.items():
        assert loaded["model"][name] is shard
        assert torch.equal(shard.local, expected[name].local), name
    assert loaded["step"] == 0  # the lowest rank's
    assert loaded["rng2"] == [2]
    return sum(shard.local.nbytes for shard in shards.values())


def load_as_dtensors(directory: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"wide": Shard(1), "scale": Replicate()}
    state = {
        name: distribute_tensor(torch.zeros_like(t), mesh, [placements.get(name, Shard(0))])
        for name, t in full_tensors().items()
    }
    load(directory, "t", state={"model": state})
    for name, tensor in full_tensors().items():
        assert torch.equal(state[name].full_tensor(), tensor), name


def load_and_save_plain(directory: str) -> None:
    into = {name: torch.zeros_like(t) for name, t in full_tensors().items()}
    load(directory, "t", state={"model": into})
    assert all(torch.equal(into[name], t) for name, t in full_tensors().items())


@pytest.fixture(scope="module")
def saved_at_3(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved_at_3")
    run_ranks(3, save_shards, str(directory))
    return directory


def test_every_rank_writes_its_own_file(saved_at_3):
    names = sorted(path.name for path in (saved_at_3 / "t").iterdir())
    assert names == ["index.json", *(f"rank_{rank:05d}.safetensors" for rank in range(3))]
    elements = sum(t.nbytes for t in full_tensors().values())
    assert verify(saved_at_3)[1:] == (3, len(SHAPES), elements)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_flat_shards_load_at_another_world_size(saved_at_3, world_size):
    run_ranks(world_size, load_shards, str(saved_at_3))


def test_flat_shards_load_into_plain_tensors_without_a_process_group(saved_at_3):
    load_and_save_plain(str(saved_at_3))


@pytest.mark.parametrize("world_size", [2, 4])
def test_flat_shards_load_into_dtensors(saved_at_3, world_size):
    run_ranks(world_size, load_as_dtensors, str(saved_at_3))


def test_flat_shards_consolidate(saved_at_3, tmp_path):
    content = load_file(consolidate(saved_at_3, None, tmp_path / "m.safetensors"))
    assert all(torch.equal(content[name], t) for name, t in full_tensors().items())


def count_bytes_read(directory: str) -> int:
    start, stop = flat_range(80_000)
    reader = SafetensorsReader(Path(directory) / "t")
    shard = FlatShard(torch.zeros(stop - start), (2, 40_000), start)
    dcp.load({"model": {"wide": shard}}, storage_reader=reader)
    return reader.bytes_read


def test_rank_reads_only_the_boxes_that_it_needs(saved_at_3):
    """At 3 ranks the saved boxes are what each holds (all smaller than one checksummed block)."""
    third = math.ceil(80_000 / 3) * 4
    assert run_ranks(3, count_bytes_read, str(saved_at_3)) == [third, third, 320_000 - 2 * third]


def save_tensor_parallel(directory: str) -> None:
    """Columns split over 2 ranks, and each block's flattening over 2 more."""
    rank = dist.get_rank()
    block = Box((0, 3 * (rank // 2)), (5, 3))
    values = torch.arange(30.0).reshape(5, 6)[:, block.offsets[1] :][:, :3].reshape(-1)
    start, stop = ((0, 8), (8, 15))[rank % 2]
    save(directory, "t", {"w": FlatShard(values[start:stop], (5, 6), start, within=block)})


def test_ranges_of_tensor_parallel_blocks_make_up_the_tensor(tmp_path):
    run_ranks(4, save_tensor_parallel, str(tmp_path))
    loaded = load(tmp_path, state={"w": torch.zeros(5, 6)})
    assert torch.equal(loaded["w"], torch.arange(30.0).reshape(5, 6))


def save_replicated(directory: str) -> None:
    save(directory, "t", {"a": torch.ones(1000), "b": torch.ones(1000)})


def test_replicated_tensors_are_written_once_and_spread_over_ranks(tmp_path):
    run_ranks(2, save_replicated, str(tmp_path))
    sizes = [file.stat().st_size for file in sorted((tmp_path / "t").glob("*.safetensors"))]
    assert all(4000 < size < 4200 for size in sizes)
    assert len(sizes) == 2


def different_keys(directory: str) -> None:
    """As pipeline stages: every rank has a tensor of its own."""
    rank = dist.get_rank()
    save(directory, "t", {f"stage{rank}.w": torch.full((2,), float(rank))})
    into = {f"stage{rank}.w": torch.zeros(2)}
    load(directory, state=into)
    assert into[f"stage{rank}.w"].tolist() == [rank, rank]


def test_ranks_may_hold_different_keys(tmp_path):
    run_ranks(2, different_keys, str(tmp_path))


def subgroup_save(directory: str) -> None:
    group = dist.new_group([1, 2])
    if dist.get_rank() in (1, 2):
        save(directory, "t", {"w": torch.ones(2)}, group=group)
        load(directory, state={"w": torch.zeros(2)}, group=group)


def test_group_saves_and_loads_without_the_others(tmp_path):
    run_ranks(3, subgroup_save, str(tmp_path))
    assert load(tmp_path, state={"w": torch.zeros(2)})["w"].tolist() == [1, 1]


def fsdp_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_round_trip(directory: str) -> None:
    model = fsdp_model(seed=1)
    dcp.save({"model": model.state_dict()}, storage_writer=SafetensorsWriter(f"{directory}/dcp"))
    save(directory, "ours", {"model": model.state_dict()})
    for source in ("dcp", "ours"):
        other = fsdp_model(seed=2)
        state = {"model": other.state_dict()}
        dcp.load(state, storage_reader=SafetensorsReader(f"{directory}/{source}"))
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert isinstance(b, DTensor)
            assert torch.equal(a.to_local(), b.to_local())


def test_fsdp2_uses_the_storage_and_flat_shards_read_it(tmp_path):
    run_ranks(4, fsdp_round_trip, str(tmp_path))  # 4 > 3 rows: the last rank's shard is empty
    torch.manual_seed(1)
    expected = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).state_dict()
    buffer = torch.zeros(21)
    load(tmp_path, "ours", state={"model": {"1.weight": FlatShard(buffer, (3, 7))}}, strict=False)
    assert torch.equal(buffer, expected["1.weight"].reshape(-1))


def save_with_full_disk_on(directory: str, rank: int) -> None:
    save(directory, "good", {"w": as_shards({"w": torch.ones(100)})["w"]})
    full = OSError(errno.ENOSPC, "No space left on device")
    broken = mock.patch.object(os, "fsync", side_effect=full)
    with broken if dist.get_rank() == rank else contextlib.nullcontext():
        save(directory, "bad", {"w": as_shards({"w": torch.ones(100)})["w"]})


@pytest.mark.parametrize("rank", [0, 2])
def test_full_disk_of_one_rank_is_told_to_all(tmp_path, rank):
    with pytest.raises(RankFailure) as caught:
        run_ranks(3, save_with_full_disk_on, str(tmp_path), rank)
    for outcome in caught.value.outcomes:
        assert "CheckpointError" in outcome.type
        assert f"failed on rank {rank}: cannot write" in outcome.message
        assert "No space left on device" in outcome.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "latest"]
    assert load(tmp_path, state={"w": torch.zeros(100)})["w"].sum() == 100


def save_bad_value_on_rank_1(directory: str) -> None:
    save(directory, "t", {"w": torch.ones(1), "x": {1} if dist.get_rank() == 1 else 1})


def save_with_own_tags(directory: str) -> None:
    save(directory, f"t{dist.get_rank()}", {"w": torch.ones(1)})


def save_overlapping(directory: str) -> None:
    save(directory, "t", {"w": FlatShard(torch.ones(4), (6,), start=dist.get_rank())})


def load_other_model(directory: str) -> None:
    extra = {"new": torch.zeros(1)} if dist.get_rank() == 1 else {}
    load(directory, state={"model": as_shards(full_tensors()) | extra})


def load_missing(directory: str) -> None:
    load(directory, "nothing", state={})


@pytest.mark.parametrize(
    ("fn", "fragment"),
    [
        (save_bad_value_on_rank_1, "failed on rank 1: cannot save x: got a value of type builtins"),
        (save_with_own_tags, "ranks disagree on the tag (rank 0: 't0', rank 1: 't1')"),
        (save_overlapping, "Failed to validate global plan"),
    ],
    ids=["value", "tags", "overlap"],
)
def test_save_that_one_rank_spoils_fails_on_all(tmp_path, fn, fragment):
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, fn, str(tmp_path))
    assert all(fragment in outcome.message for outcome in caught.value.outcomes)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("fn", "fragment"),
    [
        (load_other_model, "the model has, but the checkpoint lacks: model.new"),
        (load_missing, "checkpoint 'nothing' does not exist"),
    ],
    ids=["other-model", "missing"],
)
def test_load_that_cannot_work_fails_on_all(saved_at_3, fn, fragment):
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, fn, str(saved_at_3))
    assert all(fragment in outcome.message for outcome in caught.value.outcomes)
    assert all("CheckpointError" in outcome.type for outcome in caught.value.outcomes)


def load_flat_w(directory: str) -> None:
    load(directory, state={"w": as_shards({"w": torch.zeros(200_000)})["w"]})


def test_damage_that_one_rank_meets_is_told_to_all(tmp_path):
    path = save(tmp_path, "t", {"w": torch.ones(200_000)})
    data = bytearray((path / "rank_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "rank_00000.safetensors").write_bytes(data)
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, load_flat_w, str(tmp_path))
    for outcome in caught.value.outcomes:
        assert "failed on rank 1:" in outcome.message
        assert "is damaged" in outcome.message
