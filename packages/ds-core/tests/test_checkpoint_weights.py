"""Weights of others: safetensors and torch state dicts, whole or in parts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

import ds_core
from ds_core import comm
from ds_core.checkpoint import full_state_dict, import_checkpoint, load
from ds_core.errors import CheckpointError
from ds_core.testing import truncate

WEIGHTS = {"a.weight": torch.randn(3, 2), "b": torch.randn(4).bfloat16(), "none": torch.empty(0)}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


def hugging_face(folder):
    folder.mkdir()
    parts = {"model-00001-of-00002.safetensors": ["a.weight"]}
    parts["model-00002-of-00002.safetensors"] = ["b", "none"]
    for file, names in parts.items():
        save_file({name: WEIGHTS[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def one_safetensors(folder):
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors")
    return folder / "model.safetensors"


def torch_file(folder):
    folder.mkdir()
    torch.save(WEIGHTS, folder / "weights.pt")
    return folder / "weights.pt"


def lightning(folder):
    folder.mkdir()
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, folder / "last.ckpt")
    return folder


def torch_parts(folder):
    folder.mkdir()
    for number, (name, value) in enumerate(WEIGHTS.items()):
        torch.save({name: value}, folder / f"pytorch_model-{number}.bin")
    return folder


def old_torch_format(folder):
    folder.mkdir()
    torch.save(WEIGHTS, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder


SOURCES = [hugging_face, one_safetensors, torch_file, lightning, torch_parts, old_torch_format]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_weights_come_in_unchanged(tmp_path, make):
    report = import_checkpoint(make(tmp_path / "theirs"), tmp_path / "ours")
    found = dict(full_state_dict(report.path))
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert load(tmp_path / "ours", state={"model": {"b": torch.zeros(4)}}, strict=False)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_tied_weights_are_stored_once(tmp_path, kind):
    model = Tied()
    if kind == "torch":
        torch.save(model.state_dict(), tmp_path / "theirs.pt")
        report = import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours", model=Tied())
        assert report.aliases == {"head.weight": "embed.weight"}
    else:
        save_model(model, tmp_path / "theirs.safetensors")
        report = import_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "ours", model=Tied())
        assert len(report.aliases) == 1
    assert report.num_tensors == 1
    assert torch.equal(full_state_dict(report.path)["head.weight"], model.head.weight)


def test_an_alias_that_the_source_does_not_tell_of_can_be_named(tmp_path):
    weights = {"embed.weight": torch.ones(4, 2), "head.weight": torch.ones(4, 2)}
    save_file(weights, tmp_path / "theirs.safetensors")
    alias = {"head.weight": "embed.weight"}
    report = import_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "ours", aliases=alias)
    assert (report.num_tensors, report.aliases) == (1, alias)
    save_file({**weights, "head.weight": torch.zeros(4, 2)}, tmp_path / "theirs.safetensors")
    with pytest.raises(CheckpointError, match=r"'head\.weight' and 'embed\.weight' are not eq"):
        import_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "b", aliases=alias)
    with pytest.raises(CheckpointError, match="'x' is not a weight of safetensors"):
        import_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "b", aliases={"y": "x"})


def test_an_engine_begins_from_imported_weights(tmp_path):
    torch.manual_seed(1)
    pretrained = nn.Linear(3, 1)
    save_file(pretrained.state_dict(), tmp_path / "theirs.safetensors")
    import_checkpoint(tmp_path / "theirs.safetensors", tmp_path / "ours")
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}, "progress": False}
    engine = ds_core.initialize(nn.Linear(3, 1), config)
    engine.load_checkpoint(tmp_path / "ours", load_module_only=True)
    assert torch.equal(engine.state_dict()["weight"], pretrained.weight)


# --- What is refused ------------------------------------------------------------------------------


def test_a_part_that_is_missing_or_left_over_is_named(tmp_path):
    folder = hugging_face(tmp_path / "theirs")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("b")
    index["weight_map"]["c"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"missing: c: named in the.*\n.*unexpected: b: not"):
        import_checkpoint(folder, tmp_path / "ours")
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot read .*{file}"):
        import_checkpoint(folder, tmp_path / "ours")


def test_an_index_that_leads_elsewhere_is_refused(tmp_path):
    folder = hugging_face(tmp_path / "theirs")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret"}}')
    with pytest.raises(CheckpointError, match=r"'\.\./secret' is not a plain file name"):
        import_checkpoint(folder, tmp_path / "ours")


@pytest.mark.parametrize("make", [one_safetensors, torch_file], ids=["safetensors", "torch"])
@pytest.mark.parametrize("size", [5, 150])
def test_a_truncated_file_is_named(tmp_path, make, size):
    path = make(tmp_path / "theirs")
    truncate(path, size)
    with pytest.raises(CheckpointError, match=path.name):
        import_checkpoint(path, tmp_path / "ours")
    assert not (tmp_path / "ours" / "latest").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is of no format that can be imported"),
        (lambda path: path.write_text("hello"), "is of no format that can be imported"),
    ],
    ids=["nothing", "empty-folder", "text"],
)
def test_what_is_no_checkpoint_is_said_so(tmp_path, make, message):
    make(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_our_own_checkpoints_need_no_import(tmp_path):
    path = import_checkpoint(torch_file(tmp_path / "theirs"), tmp_path / "ours").path
    with pytest.raises(CheckpointError, match="is a checkpoint of ds-core already"):
        import_checkpoint(path, tmp_path / "again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a state dict"),
        ({"a": torch.ones(1), "b": 3}, "unexpected: b: a int, not a tensor"),
        ({"a": 3}, "unexpected: a: a int"),
    ],
    ids=["list", "number", "no-weights"],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "theirs.pt")
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "theirs.pt", tmp_path / "ours")


def test_weights_without_optimizer_state_say_how_to_load_them(tmp_path):
    model = torch.nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    import_checkpoint(tmp_path / "model.pt", tmp_path / "ours")
    config = {"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = ds_core.initialize(torch.nn.Linear(3, 2), config)

    with pytest.raises(CheckpointError, match="load_module_only=True"):
        engine.load_checkpoint(tmp_path / "ours")
    engine.load_checkpoint(tmp_path / "ours", load_module_only=True)

    assert torch.equal(engine.module.weight, model.weight)
    engine.close()


class NotTensors:
    pass


def test_objects_that_are_dropped_do_not_fail_the_import(tmp_path):
    torch.save({"weight": torch.ones(2), "note": NotTensors()}, tmp_path / "model.pt")

    report = import_checkpoint(tmp_path / "model.pt", tmp_path / "ours", drop_objects=True)

    assert "note" in report.ignored
