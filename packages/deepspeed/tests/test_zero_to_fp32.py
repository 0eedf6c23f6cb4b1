"""Whole weights of checkpoints: ours, and real ones of the original."""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deepspeed
import ds_core
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
from deepspeed.utils import zero_to_fp32 as z
from ds_core import comm
from ds_core.checkpoint import weights_of
from ds_core.errors import CheckpointError

DATA = Path(__file__).parents[2] / "ds-core" / "tests" / "data" / "deepspeed"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(3))
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.frozen(self.embed(ids))).float().logsumexp(-1).mean()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
    }
    engine = ds_core.initialize(Tied(), config)
    engine.backward(engine(torch.arange(4)))
    engine.step()
    engine.save_checkpoint(folder, "global_step1", client_state={"epoch": 3})
    weights = {name: value.clone() for name, value in engine.state_dict().items()}
    engine.close()
    comm.shutdown()
    return folder, weights


@pytest.fixture(scope="module", params=["stage2-bf16-w2", "stage3-bf16-w2", "stage0-fp32-w1"])
def theirs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    with tarfile.open(DATA / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    latest = next(folder.rglob("latest"))
    return latest.parent


def test_ours_are_whole_and_fp32(ours):
    folder, weights = ours
    found = z.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert set(found) == set(weights)
    assert {found[name].dtype for name in found} == {torch.float32, torch.int64}
    assert found["head.weight"] is found["embed.weight"]
    for name, value in weights.items():
        # The engine's own are rounded to bf16 where it computes in it.
        assert torch.equal(found[name].to(value.dtype), value), name
    trained = z.get_fp32_state_dict_from_zero_checkpoint(str(folder), "global_step1", True)
    assert set(weights) - set(trained) == {"frozen.weight", "frozen.bias"}


def test_theirs_are_the_same_as_after_an_import(theirs, tmp_path):
    found = z.get_fp32_state_dict_from_zero_checkpoint(str(theirs))
    ds_core.checkpoint.import_checkpoint(theirs, tmp_path, drop_objects=True)
    expected = weights_of(tmp_path, dtype=torch.float32)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_lazy_state_reads_when_asked(theirs):
    lazy = z.get_fp32_state_dict_from_zero_checkpoint(str(theirs), lazy_mode=True)
    whole = z.get_fp32_state_dict_from_zero_checkpoint(str(theirs))
    assert sorted(lazy) == sorted(whole)
    for name, tensor in lazy.items():
        assert torch.equal(tensor.contiguous(), whole[name])


def test_files_for_torch_and_for_hugging_face(ours, tmp_path):
    folder, weights = ours
    z.convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(tmp_path))
    z.convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(tmp_path))  # again: replaced
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(loaded) == set(weights)
    assert loaded["head.weight"].data_ptr() == loaded["embed.weight"].data_ptr()
    z.convert_zero_checkpoint_to_state_dict(
        str(folder), str(tmp_path), "bf16", max_shard_size=None, safe_serialization=True
    )
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["embed.weight"].dtype == torch.bfloat16
    assert stored["offset"].dtype == torch.int64


def test_small_files_have_an_index(ours, tmp_path):
    folder, weights = ours
    z.main([str(folder), str(tmp_path), "--max_shard_size", "100"])
    index = json.loads((tmp_path / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    for name, file in index["weight_map"].items():
        assert name in torch.load(tmp_path / file, weights_only=True)


def test_a_model_takes_the_weights(ours):
    folder, weights = ours
    model = z.load_state_dict_from_zero_checkpoint(Tied().double(), str(folder))
    assert torch.equal(model.embed.weight.to(torch.bfloat16), weights["embed.weight"].bfloat16())


def as_lightning_does(folder):
    tag = (folder / "latest").read_text().strip()
    optimizer = torch.load(z.get_optim_files(str(folder / tag))[0], weights_only=False)
    stage = optimizer["optimizer_state_dict"]["zero_stage"]
    file = z.get_model_state_file(str(folder / tag), stage)
    return stage, torch.load(file, weights_only=False)


def test_what_lightning_looks_for_is_there(ours):
    stage, state = as_lightning_does(ours[0])
    assert (stage, state["epoch"], state["global_steps"]) == (2, 3, 1)


def test_files_of_the_originals_checkpoints(theirs):
    tag = theirs / (theirs / "latest").read_text().strip()
    files = z.get_model_state_files(str(tag))
    assert all(Path(file).is_file() for file in files)
    if list(tag.glob("*_optim_states.pt")):
        names = [Path(file).name for file in z.get_optim_files(str(tag))]
        assert "_rank_0_" in names[0]
        assert "_rank_1_" in names[1]
        stage = (
            3 if "zero_pp_rank_0_mp_rank_00_model_states.pt" in {Path(f).name for f in files} else 2
        )
        assert Path(z.get_model_state_file(str(tag), stage)).parent == tag


@pytest.mark.parametrize("call", [z.get_optim_files, z.get_model_state_files])
def test_what_is_not_there_is_a_file_not_found(tmp_path, call):
    with pytest.raises(FileNotFoundError, match="has no file"):
        call(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        call(str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="no file mp_rank_00"):
        z.get_model_state_file(str(tmp_path), 1)


def test_a_dtype_that_does_not_exist(ours, tmp_path):
    with pytest.raises(CheckpointError, match="dtype: got 'int3', expected one of"):
        z.convert_zero_checkpoint_to_state_dict(str(ours[0]), str(tmp_path), "int3")


def test_universal_is_what_ours_are(ours, tmp_path, capsys):
    out = tmp_path / "out"
    ds_to_universal.main(["--input_folder", str(ours[0]), "--output_folder", str(out)])
    assert "loads at any number of ranks" in capsys.readouterr().out
    assert not out.exists()


def test_universal_imports_those_of_the_original(theirs, tmp_path, capsys):
    given = argparse.Namespace(input_folder=str(theirs), output_folder=str(tmp_path), strict=False)
    ds_to_universal.main(given)
    assert "was imported to" in capsys.readouterr().out
    assert len(weights_of(tmp_path)) > 0


def test_clones_have_storages_of_their_own():
    flat = torch.arange(100.0)
    state = {"a": flat[:2], "b": [flat[2:4], (flat[4:5], "x")], "c": 3}
    copy = clone_tensors_for_torch_save(state)
    assert copy["a"].untyped_storage().nbytes() == 8
    assert torch.equal(copy["b"][0], flat[2:4])
    assert copy["b"][1][1] == "x"
    assert copy["c"] == 3
    assert deepspeed.checkpoint.get_model_ckpt_name_for_rank("f", "00").endswith(
        "mp_rank_00_model_states.pt"
    )
