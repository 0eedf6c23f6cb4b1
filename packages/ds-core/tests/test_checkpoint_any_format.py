"""Weights of anybody's checkpoint, and files of torch."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ds_core import checkpoint
from ds_core.checkpoint import export_torch, weights_of
from ds_core.checkpoint.any_format import is_ours
from ds_core.checkpoint.lazy import LazyStateDict, in_memory
from ds_core.errors import CheckpointError

DATA = Path(__file__).parent / "data" / "deepspeed"


def test_ours_with_and_without_a_tag(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, f"step{step}", {"model": {"w": torch.full((2,), float(step))}})
    assert weights_of(tmp_path)["w"].tolist() == [2.0, 2.0]
    assert weights_of(tmp_path, "step1", dtype=torch.float64)["w"].dtype == torch.float64
    assert is_ours(tmp_path)
    assert is_ours(tmp_path / "step1")
    assert not is_ours(tmp_path, "step3")
    assert not is_ours(tmp_path.parent)


def test_deepspeeds_without_what_was_not_trained(tmp_path):
    with tarfile.open(DATA / "stage3-bf16-w2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(tmp_path.rglob("latest")).parent
    every = weights_of(folder)
    trained = weights_of(folder, exclude_frozen=True)
    assert set(every) - set(trained) == {"frozen.weight", "frozen.bias"}
    assert every["embed.weight"].dtype == torch.float32
    assert torch.equal(every["head.weight"], every["embed.weight"])


def test_hugging_faces_do_not_say_what_was_frozen(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weights_of(tmp_path)["w"].tolist() == [1.0, 1.0]
    with pytest.raises(CheckpointError, match="does not say which parameters were frozen"):
        weights_of(tmp_path, exclude_frozen=True)


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="of no format that can be imported"):
        weights_of(tmp_path)


def lazy():
    flat = torch.arange(10.0)
    tensors = {"a": flat[:4], "b": flat[4:6]}
    found = {name: in_memory(("model", name), tensor) for name, tensor in tensors.items()}
    return LazyStateDict(found, aliases={"c": "b"})


def test_torchs_file_holds_a_tied_weight_once_and_no_more_than_the_weights(tmp_path):
    done = export_torch(lazy(), tmp_path)
    assert done.files == ("pytorch_model.bin",)
    loaded = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert loaded["c"].data_ptr() == loaded["b"].data_ptr()
    assert loaded["a"].untyped_storage().nbytes() == 16
    with pytest.raises(CheckpointError, match="already has weights"):
        export_torch(lazy(), tmp_path)
    export_torch(lazy(), tmp_path, max_shard_bytes=16, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ]


def test_a_file_holds_at_least_a_byte(tmp_path):
    with pytest.raises(CheckpointError, match="max_shard_bytes: got 0"):
        export_torch(lazy(), tmp_path, max_shard_bytes=0)
