from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model

from ds_core.checkpoint import consolidate, export_safetensors, full_state_dict, save
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


# --- Folders as Hugging Face's libraries read them ------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    """As an engine saves it: a tied head, a frozen layer, optimizer state."""
    state = {
        "model": {"embed": torch.randn(6, 4), "frozen": torch.randn(3), "out": torch.randn(2, 4)},
        "optimizer": {"exp_avg": {"embed": torch.ones(6, 4), "out": torch.zeros(2, 4)}},
        "groups": [{"lr": 0.1, "names": ["embed", "out"]}],
        "about": {"aliases": {"head": "embed"}, "frozen": ["frozen"], "buffers": []},
    }
    save(tmp_path / "saved", "a", state)
    return tmp_path / "saved", state["model"]


def test_small_weights_are_one_file_with_every_name(tied, tmp_path):
    directory, model = tied
    done = export_safetensors(directory, tmp_path / "out")
    assert done.files == ("model.safetensors",)
    content = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(content["head"], model["embed"])
    assert content.keys() == {*model, "head"}
    assert done[2:] == (4, sum(value.nbytes for value in content.values()))


def test_large_weights_are_shards_with_an_index(tied, tmp_path):
    directory, model = tied
    export_safetensors(directory, tmp_path / "out", max_shard_bytes=100, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (24 + 3 + 8 + 24)
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    for name, file in index["weight_map"].items():
        value = load_file(tmp_path / "out" / file)[name]
        assert torch.equal(value, model.get(name, model["embed"]).bfloat16())
    assert all(path.stat().st_size < 1000 for path in (tmp_path / "out").iterdir())


def test_an_alias_may_be_left_to_the_loader(tied, tmp_path):
    directory, model = tied
    export_safetensors(directory, tmp_path / "out", aliases=False)
    module = torch.nn.Module()
    for name, value in model.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros_like(value)))
    module.register_parameter("head", module.embed)
    load_model(module, tmp_path / "out" / "model.safetensors")
    assert torch.equal(module.head, model["embed"])


def test_frozen_weights_may_be_left_out(tied, tmp_path):
    directory, _ = tied
    export_safetensors(directory, tmp_path / "out", exclude_frozen=True)
    assert "frozen" not in load_file(tmp_path / "out" / "model.safetensors")


def test_which_weights_are_frozen_must_be_known(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(CheckpointError, match="does not say which parameters were frozen"):
        export_safetensors(directory, tmp_path / "out", exclude_frozen=True)


def test_the_optimizer_is_written_beside_the_weights(tied, tmp_path):
    directory, _ = tied
    export_safetensors(directory, tmp_path / "out", optimizer=True)
    content = load_file(tmp_path / "out" / "optimizer.safetensors")
    assert content.keys() == {"exp_avg.embed", "exp_avg.out"}
    groups = json.loads((tmp_path / "out" / "optimizer.json").read_text())["groups"]
    assert groups == [{"lr": 0.1, "names": ["embed", "out"]}]


def test_weights_that_are_there_are_replaced_only_when_asked(tied, tmp_path):
    directory, _ = tied
    out = tmp_path / "out"
    export_safetensors(directory, out, max_shard_bytes=100)
    (out / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"already has weights \(model-00001-of-00003"):
        export_safetensors(directory, out)
    export_safetensors(directory, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_a_shard_has_a_size(tied, tmp_path):
    with pytest.raises(CheckpointError, match="max_shard_bytes: got 0"):
        export_safetensors(tied[0], tmp_path / "out", max_shard_bytes=0)


# --- Lazily ---------------------------------------------------------------------------------------


def test_a_state_dict_reads_what_is_looked_up(tied):
    directory, model = tied
    weights = full_state_dict(directory, dtype=torch.float16)
    data_file = directory / "a" / "rank_00000.safetensors"
    data_file.rename(data_file.with_suffix(".gone"))
    assert (len(weights), weights.shape("head"), weights.dtype("out")) == (4, (6, 4), torch.half)
    assert "head" in weights
    with pytest.raises(CheckpointError, match="cannot open"):
        weights["out"]
    data_file.with_suffix(".gone").rename(data_file)
    assert torch.equal(weights["head"], model["embed"].half())


def test_a_state_dict_loads_into_a_plain_module(tied):
    module = torch.nn.Module()
    for name, value in {"embed": (6, 4), "frozen": (3,), "out": (2, 4)}.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(value)))
    module.register_parameter("head", module.embed)
    module.load_state_dict(full_state_dict(tied[0]))
    assert torch.equal(module.head, tied[1]["embed"])


PROBE = """
import sys
from pathlib import Path
from ds_core import checkpoint

def export_safetensors(ours, theirs, out):
    checkpoint.export_safetensors(ours, out / "hf", max_shard_bytes=10 << 20)

def export_dcp(ours, theirs, out):
    checkpoint.export_dcp(ours, out / "dcp")

def import_weights(ours, theirs, out):
    checkpoint.import_checkpoint(theirs, out / "ours")

def peak():  # not getrusage, which counts what the parent had before the exec
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

root = Path(sys.argv[1])
for act in (export_safetensors, export_dcp, import_weights):
    act(root / "small", root / "hf-small", root / "out-small")  # imports all that is needed
    before = peak()
    act(root / "large", root / "hf-large", root / "out-large")
    print(act.__name__, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_for_a_few_tensors_only(tmp_path):
    tensor_bytes, count = 4 << 20, 24
    large = {f"w{i}": torch.full((tensor_bytes // 4,), float(i)) for i in range(count)}
    for size, model in (("large", large), ("small", {"w": torch.ones(2)})):
        save(tmp_path / size, "a", {"model": model})
        export_safetensors(tmp_path / size, tmp_path / f"hf-{size}")
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    growth = {name: int(kib) * 1024 for name, kib in map(str.split, done.stdout.splitlines())}
    assert len(growth) == 3
    # Usually 4 at most; the allocator may keep what it was given back.
    assert max(growth.values()) < 10 * tensor_bytes, growth  # of 24
