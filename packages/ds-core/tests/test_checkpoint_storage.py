from __future__ import annotations

import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from ds_core.checkpoint import Box, FlatShard, SafetensorsReader, SafetensorsWriter
from ds_core.checkpoint.box_reader import BoxReader
from ds_core.checkpoint.data_file import BLOCK_BYTES
from ds_core.errors import CheckpointError


@pytest.fixture(autouse=True)
def _single_process_is_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        yield


def dcp_save(state, path, **options):
    return dcp.save(state, storage_writer=SafetensorsWriter(path, **options))


def dcp_load(state, path):
    reader = SafetensorsReader(path)
    dcp.load(state, storage_reader=reader)
    return reader


def test_dcp_round_trip_of_tensors_and_values(tmp_path):
    state = {"model": {"w.a": torch.randn(3, 4)}, "step": 7, "lr": [0.1, 0.2], "name": "x"}
    dcp_save(state, tmp_path / "c")
    into = {"model": {"w.a": torch.zeros(3, 4)}, "step": 0, "lr": [], "name": ""}
    dcp_load(into, tmp_path / "c")
    assert torch.equal(into["model"]["w.a"], state["model"]["w.a"])
    assert (into["step"], into["lr"], into["name"]) == (7, [0.1, 0.2], "x")


def test_optimizer_state_of_plain_torch_round_trips(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    dcp_save({"optimizer": optimizer.state_dict()}, tmp_path / "c")
    expected = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    into = {"optimizer": optimizer.state_dict()}
    into["optimizer"]["state"][0]["exp_avg"].zero_()
    dcp_load(into, tmp_path / "c")
    assert torch.equal(into["optimizer"]["state"][0]["exp_avg"], expected)


def test_files_are_plain_safetensors(tmp_path):
    dcp_save({"w": torch.arange(4.0), "s": torch.tensor(1, dtype=torch.int16)}, tmp_path / "c")
    content = load_file(tmp_path / "c" / "rank_00000.safetensors")
    assert content["w|0"].tolist() == [0, 1, 2, 3]
    assert content["s|"].item() == 1
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "index.json",
        "rank_00000.safetensors",
    ]


def test_value_is_converted_to_the_dtype_of_its_target(tmp_path):
    dcp_save({"w": torch.tensor([1.0, 2.5])}, tmp_path / "c")
    into = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    dcp_load(into, tmp_path / "c")
    assert into["w"].tolist() == [1.0, 2.5]


def test_trained_parameter_is_filled_in_place(tmp_path):
    dcp_save({"w": torch.ones(2)}, tmp_path / "c")
    parameter = torch.nn.Parameter(torch.zeros(2))
    dcp_load({"w": parameter}, tmp_path / "c")
    assert parameter.tolist() == [1, 1]


def test_only_the_blocks_that_are_needed_are_read(tmp_path):
    rows = 16 * BLOCK_BYTES // 4 // 1024
    tensor = torch.arange(rows * 1024.0).reshape(rows, 1024)  # 16 blocks
    dcp_save({"w": tensor, "other": torch.zeros(10_000)}, tmp_path / "c")
    local = torch.zeros(1024 * 10)
    reader = dcp_load({"w": FlatShard(local, (rows, 1024), start=5 * 1024)}, tmp_path / "c")
    assert torch.equal(local, tensor.reshape(-1)[5 * 1024 : 15 * 1024])
    assert reader.bytes_read == BLOCK_BYTES
    whole = dcp_load({"w": torch.zeros(rows, 1024)}, tmp_path / "c")
    assert whole.bytes_read == 16 * BLOCK_BYTES


def test_narrow_columns_of_a_wide_tensor(tmp_path):
    tensor = torch.arange(3 * 200_000.0).reshape(3, 200_000)  # rows of about three blocks
    dcp_save({"w": tensor}, tmp_path / "c")
    reader = SafetensorsReader(tmp_path / "c")
    column = torch.zeros(3, 5)
    stored = reader.index.tensors["w"].boxes[0]
    with BoxReader(reader.path, reader.index) as boxes:
        boxes.copy(reader.index.tensors["w"], stored, Box((0, 70_000), (3, 5)), column)
        assert boxes.bytes_read == 3 * BLOCK_BYTES
    assert torch.equal(column, tensor[:, 70_000:70_005])


def test_loading_calls_no_unpickler_for_tensors(tmp_path, monkeypatch):
    dcp_save({"w": torch.ones(2)}, tmp_path / "c")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    into = {"w": torch.zeros(2)}
    dcp_load(into, tmp_path / "c")
    assert into["w"].tolist() == [1, 1]


def test_value_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(CheckpointException, match=r"cannot save model\.hook: .*function"):
        dcp_save({"model": {"hook": lambda: 0}}, tmp_path / "c")
    assert not (tmp_path / "c" / "index.json").exists()


def test_planner_that_only_knows_pickled_bytes_is_refused(tmp_path):
    class Opaque(dcp.DefaultSavePlanner):
        lookup_object = None

    writer = SafetensorsWriter(tmp_path / "c")
    with pytest.raises(CheckpointException, match="Opaque hands values over as pickled bytes"):
        dcp.save({"step": 1}, storage_writer=writer, planner=Opaque())


def test_unsupported_dtype_is_refused_before_writing(tmp_path):
    with pytest.raises(CheckpointException, match=r"cannot save w: safetensors has no"):
        dcp_save({"w": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


def test_incomplete_flat_shards_are_refused(tmp_path):
    with pytest.raises(CheckpointException, match=r"w: the boxes .* add up to 3 of its 4 elements"):
        dcp_save({"w": FlatShard(torch.zeros(3), (4,))}, tmp_path / "c")


def test_existing_checkpoint_is_replaced_only_if_asked(tmp_path):
    dcp_save({"w": torch.zeros(2)}, tmp_path / "c")
    (tmp_path / "c" / "rank_00007.safetensors").write_bytes(b"of a larger world")
    with pytest.raises(CheckpointException, match="already holds a checkpoint"):
        dcp_save({"w": torch.ones(2)}, tmp_path / "c")
    dcp_save({"w": torch.ones(2)}, tmp_path / "c", overwrite=True)
    into = {"w": torch.zeros(2)}
    dcp_load(into, tmp_path / "c")
    assert into["w"].tolist() == [1, 1]
    assert not (tmp_path / "c" / "rank_00007.safetensors").exists()


def test_checkpoint_id_chooses_the_directory(tmp_path):
    writer = SafetensorsWriter("unused")
    dcp.save({"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=tmp_path / "c")
    reader = SafetensorsReader("unused")
    into = {"w": torch.zeros(1)}
    dcp.load(into, storage_reader=reader, checkpoint_id=tmp_path / "c")
    assert into["w"].item() == 1
    assert SafetensorsReader.validate_checkpoint_id(tmp_path / "c")
    assert not SafetensorsReader.validate_checkpoint_id(tmp_path)
    assert not SafetensorsWriter.validate_checkpoint_id("s3://bucket/c")


def test_state_is_rebuilt_from_the_metadata_alone(tmp_path):
    state = {"model": {"blocks.0.w": torch.ones(2)}, "trainer": {"step": 3}}
    dcp_save(state, tmp_path / "c")
    into = _load_state_dict_from_keys(storage_reader=SafetensorsReader(tmp_path / "c"))
    assert into["model"]["blocks.0.w"].tolist() == [1, 1]
    assert into["trainer"] == {"step": 3}


def test_missing_index_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: cannot read index"):
        SafetensorsReader(tmp_path).read_metadata()
