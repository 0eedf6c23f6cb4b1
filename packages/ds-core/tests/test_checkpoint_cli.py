"""`ds checkpoint` as a user runs it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_core.checkpoint import save
from ds_core.cli import main
from ds_core.testing import flip_byte

DATA = Path(__file__).parent / "data" / "deepspeed"


@pytest.fixture
def ds(capsys):
    """Runs `ds checkpoint ...` in this process; returns (exit code, stdout, stderr)."""

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *map(str, words)])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture
def saved(tmp_path):
    state = {
        "model": {"embed": torch.randn(6, 4), "out": torch.randn(2, 4)},
        "optimizer": {"exp_avg": {"embed": torch.ones(6, 4)}},
        "groups": [{"lr": 0.1, "betas": [0.9, 0.99], "names": ["embed", "out"]}],
        "engine": {"global_step": 7},
        "client": {"note": "seven"},
        "about": {"aliases": {"head": "embed"}, "frozen": ["out"], "sharding": "ZeRO stage 2"},
    }
    save(tmp_path / "saved", "step7", state)
    return tmp_path / "saved"


def test_inspect_shows_what_is_there(ds, saved):
    code, out, _ = ds("inspect", saved)
    assert code == 0
    for words in (
        "step7 (latest)",
        "1 rank, ds-core",
        "ZeRO stage 2",
        "head = embed",
        "optimizer exp_avg  96 B   1 tensor",
        "model.embed  6x4    float32  96 B  1      1",
        "and 1 more: --tensors lists them",
        "lr 0.1, betas [0.9, 0.99]",
        "note  seven",
    ):
        assert words in out, out
    assert "optimizer.exp_avg.embed" in ds("inspect", saved / "step7", "--tensors")[1]


def test_inspect_as_json_has_every_tensor(ds, saved):
    found = json.loads(ds("inspect", saved, "--json")[1])
    assert (found["step"], found["writer"]["world_size"]) == (7, 1)
    assert found["tensors"]["optimizer.exp_avg.embed"] == {
        "name": "optimizer.exp_avg.embed",
        "kind": "optimizer exp_avg",
        "dtype": "float32",
        "shape": [6, 4],
        "num_bytes": 96,
        "num_boxes": 1,
        "files": ["rank_00000.safetensors"],
    }


def test_verify_says_what_was_checked(ds, saved):
    code, out, _ = ds("verify", saved)
    assert code == 0
    assert "is whole: 3 tensors, each stored once, in 1 files; 224 B match" in out


def test_verify_names_the_damage_and_exits_with_1(ds, saved):
    flip_byte(saved / "step7" / "rank_00000.safetensors", -9)
    code, _, err = ds("verify", saved)
    assert code == 1
    assert "rank_00000.safetensors is damaged: the bytes of '" in err
    (saved / "step7" / "rank_00000.safetensors").unlink()
    assert "cannot open" in ds("verify", saved)[2]


def test_a_file_is_no_folder_of_checkpoints(ds, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    code, _, err = ds("inspect", tmp_path / "model.pt")
    assert code == 2
    assert "model.pt is a file, not a folder of checkpoints" in err


def test_what_the_file_system_refuses_is_one_message(ds, saved, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = ds("export", saved, tmp_path / "file")
    assert code == 2
    assert err.startswith("ds: [Errno ")
    assert err.endswith("/file'\n")
    assert err.count("\n") == 1


def test_old_weights_stay_when_there_is_nothing_to_replace_them_with(ds, tmp_path):
    save(tmp_path / "bare", "only", {"model": {"w": torch.ones(2)}})
    ds("export", tmp_path / "bare", tmp_path / "out")
    words = ("export", tmp_path / "bare", tmp_path / "out")
    code, _, err = ds(*words, "--overwrite", "--optimizer")
    assert code == 2
    assert "holds no optimizer state" in err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_verify_of_nothing_exits_with_2(ds, tmp_path):
    code, _, err = ds("verify", tmp_path / "nowhere")
    assert (code, "does not exist" in err) == (2, True)


def test_export_writes_safetensors(ds, saved, tmp_path):
    out = tmp_path / "out"
    code, told, _ = ds("export", saved, out, "--dtype", "bf16", "--max-shard-size", "60B")
    assert code == 0
    assert told.startswith("wrote 3 tensors, 112 B, to")
    assert len(list(out.glob("model-*-of-*.safetensors"))) == 3
    code, _, err = ds("export", saved, out)
    assert (code, "already has weights" in err) == (2, True)
    code, _, _ = ds("export", saved, out, "--overwrite", "--exclude-frozen", "--drop-aliases")
    assert list(load_file(out / "model.safetensors")) == ["embed"]


def test_export_writes_dcp(ds, saved, tmp_path):
    words = ("export", saved, tmp_path / "out", "--format", "dcp", "--optimizer")
    code, told, _ = ds(*words)
    assert (code, told.startswith("wrote 4 tensors")) == (0, True)
    assert (tmp_path / "out" / ".metadata").exists()


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("1000", 1000), ("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("2k", 2000)],
)
def test_sizes_are_read_as_people_write_them(size, num_bytes):
    from ds_core.cli.checkpoint_tables import bytes_of

    assert bytes_of(size) == num_bytes


def test_a_size_that_is_none_is_refused(ds, saved, tmp_path):
    code, _, err = ds("export", saved, tmp_path / "out", "--max-shard-size", "huge")
    assert (code, "got 'huge', expected a number and a unit" in err) == (2, True)


@pytest.fixture
def theirs(tmp_path):
    with tarfile.open(DATA / "stage3-bf16-w2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "stage3-bf16-w2"


def test_import_accounts_for_every_tensor(ds, theirs, tmp_path):
    code, out, _ = ds("import", theirs, tmp_path / "ours")
    assert code == 0
    for words in (
        "DeepSpeed 0.19.8, ZeRO stage 3, 2 ranks",
        "23 tensors, each of them once",
        "head.weight  embed.weight",
        "ds_config  settings of DeepSpeed, not state",
        "Nothing is missing, and nothing is left over.",
    ):
        assert words in out
    assert ds("verify", tmp_path / "ours")[0] == 0


def test_import_as_json_has_the_same_facts(ds, theirs, tmp_path):
    words = ("import", theirs, tmp_path / "ours", "--weights-only", "--tag", "three", "--json")
    found = json.loads(ds(*words)[1])
    assert found["num_bytes"] == {"parameters": 336, "buffers": 20}
    assert found["missing"] == []


def test_import_lists_what_is_missing_and_goes_on_when_told_to(ds, theirs, tmp_path):
    (theirs / "universal" / "zero" / "gain" / "fp32.pt").unlink()
    source = theirs / "universal"
    code, _, err = ds("import", source, tmp_path / "ours")
    assert (code, "missing: gain: zero/gain/fp32.pt is not there" in err) == (2, True)
    code, out, _ = ds("import", source, tmp_path / "ours", "--no-strict")
    assert (code, "Missing\ngain: zero/gain/fp32.pt is not there" in out) == (0, True)


def test_a_folder_without_weights_is_refused(ds, tmp_path):
    code, _, err = ds("import", tmp_path, tmp_path / "ours", "--format", "weights")
    assert (code, "holds no weights: expected .safetensors" in err) == (2, True)


def test_an_alias_has_two_names(ds, theirs, tmp_path):
    code, _, err = ds("import", theirs, tmp_path / "ours", "--alias", "head.weight")
    assert (code, "--alias: got 'head.weight', expected NAME=OTHER" in err) == (2, True)


def test_the_folder_one_is_in_gives_the_tag_its_name(ds, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(theirs / "universal")
    code, out, _ = ds("import", ".", tmp_path / "ours")
    assert code == 0
    assert f"{tmp_path / 'ours' / 'universal'}: " in out
