from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ds_core.checkpoint import consolidate, save
from ds_core.errors import CheckpointError


@pytest.fixture
def saved(tmp_path):
    state = {
        "model": {
            "embed.weight": torch.randn(7, 3),
            "scale": torch.tensor(2.0),
            "half": torch.randn(5).bfloat16(),
            "ids": torch.arange(3),
            "none": torch.empty(0, 2),
        },
        "optimizer": {"exp_avg": {"embed.weight": torch.ones(7, 3)}},
    }
    save(tmp_path, "a", state)
    return tmp_path, state["model"]


def test_file_holds_the_model_under_its_own_names(saved):
    directory, model = saved
    out = consolidate(directory, "a", directory / "sub" / "model.safetensors")
    content = load_file(out)
    assert content.keys() == model.keys()
    assert all(torch.equal(content[name], tensor) for name, tensor in model.items())
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dtype_converts_floating_point_only(saved):
    directory, model = saved
    out = consolidate(directory, None, directory / "x.safetensors", dtype=torch.float16)
    content = load_file(out)
    assert torch.equal(content["embed.weight"], model["embed.weight"].half())
    assert content["ids"].dtype == torch.int64


def test_empty_prefix_exports_all_under_full_names(saved):
    directory, _ = saved
    content = load_file(consolidate(directory, "a", directory / "x.safetensors", prefix=""))
    assert "optimizer.exp_avg.embed.weight" in content
    assert "model.scale" in content


def test_unknown_prefix_lists_those_there_are(saved):
    directory, _ = saved
    with pytest.raises(CheckpointError, match=r"starts with 'net\.'; prefixes are model\., optim"):
        consolidate(directory, "a", directory / "x.safetensors", prefix="net.")


def test_damaged_checkpoint_leaves_the_old_file(saved):
    directory, _ = saved
    out = consolidate(directory, "a", directory / "x.safetensors")
    before = out.read_bytes()
    data_file = directory / "a" / "rank_00000.safetensors"
    data = bytearray(data_file.read_bytes())
    data[-1] ^= 1
    data_file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        consolidate(directory, "a", out, prefix="")
    assert out.read_bytes() == before
    assert sorted(p.name for p in directory.iterdir()) == ["a", "latest", "x.safetensors"]
