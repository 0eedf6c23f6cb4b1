from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch

from ds_core.checkpoint import (
    Box,
    FlatShard,
    SafetensorsReader,
    find,
    latest,
    load,
    read_state,
    save,
    verify,
)
from ds_core.checkpoint.index import Index
from ds_core.errors import CheckpointError


def model_state(fill: float = 1.0):
    return {
        "model": {
            "blocks.0.attn.qkv.weight": torch.full((6, 4), fill),
            "scale": torch.tensor(fill),
            "unused": torch.empty(0, 3),
            "half": torch.full((5,), fill, dtype=torch.bfloat16),
        },
        "step": int(fill),
    }


def edit_index(path, change):
    document = json.loads((path / "index.json").read_text())
    change(document["index"])
    text = json.dumps(document["index"], sort_keys=True, separators=(",", ":"))
    document["crc32"] = zlib.crc32(text.encode())
    (path / "index.json").write_text(json.dumps(document))


def test_round_trip_is_bit_identical(tmp_path):
    state = model_state(3.0)
    state["model"]["noise"] = torch.randn(1000)
    path = save(tmp_path / "new" / "dir", "step3", state)
    into = model_state(0.0)
    into["model"]["noise"] = torch.zeros(1000)
    loaded = load(tmp_path / "new" / "dir", state=into)
    assert path == tmp_path / "new" / "dir" / "step3"
    assert loaded["step"] == 3
    for name, tensor in state["model"].items():
        assert loaded["model"][name] is into["model"][name]
        assert torch.equal(loaded["model"][name], tensor)


def test_state_given_to_load_keeps_its_own_values(tmp_path):
    save(tmp_path, "a", {"step": 5, "w": torch.ones(1)})
    into = {"step": 0, "w": torch.zeros(1)}
    assert load(tmp_path, state=into)["step"] == 5
    assert into["step"] == 0


def test_index_shows_legible_names(tmp_path):
    path = save(tmp_path, "a", model_state())
    index = json.loads((path / "index.json").read_text())["index"]
    record = index["tensors"]["model.blocks.0.attn.qkv.weight"]
    assert record["path"] == ["model", "blocks.0.attn.qkv.weight"]
    assert record["boxes"][0]["entry"] == "model.blocks.0.attn.qkv.weight|0,0"
    assert index["state"] == {"step": {"path": ["step"], "value": 1}}


def test_values_that_the_state_does_not_name_come_back(tmp_path):
    client = {"best": float("inf"), "milestones": {30: 1}, "empty": {}, "dots.in.key": [1, (2,)]}
    save(tmp_path, "a", {"w": torch.ones(1), "client": client})
    expected = {**client, "dots.in.key": [1, [2]]}
    assert load(tmp_path, state={"w": torch.zeros(1)})["client"] == expected
    assert load(tmp_path, state={"w": torch.zeros(1), "client": None})["client"] == expected
    assert load(tmp_path, state={"w": torch.zeros(1), "client": {}})["client"] == expected
    assert read_state(tmp_path, "a") == {"client": expected}


def test_lists_and_integer_keys_with_tensors_are_kept(tmp_path):
    def state(fill):
        return {"state": {0: {"exp_avg": torch.full((2,), fill), "step": fill}}, "l": [[fill]]}

    save(tmp_path, "a", state(2.0))
    loaded = load(tmp_path, state=state(0.0))
    assert loaded["state"][0]["exp_avg"].tolist() == [2, 2]
    assert loaded["state"][0]["step"] == 2.0
    assert loaded["l"] == [[2.0]]


def test_flat_shards_load_into_a_live_buffer_of_another_dtype(tmp_path):
    save(tmp_path, "a", {"w": torch.arange(20.0).reshape(4, 5), "s": torch.tensor(7.0)})
    buffer = torch.zeros(12, dtype=torch.float16)
    shards = {"w": FlatShard(buffer[:11], (4, 5), start=3), "s": FlatShard(buffer[11:], ())}
    load(tmp_path, state=shards)
    assert buffer.tolist() == [*range(3, 14), 7]


def test_parts_of_the_checkpoint_can_be_left_out(tmp_path):
    save(tmp_path, "a", {"model": {"w": torch.ones(1)}, "optimizer": {"m": torch.ones(1)}, "n": 1})
    loaded = load(tmp_path, state={"model": {"w": torch.zeros(1)}}, parts=["model"])
    assert loaded == {"model": {"w": torch.ones(1)}}


def test_meta_tensors_are_refused_where_they_count(tmp_path):
    save(tmp_path, "a", {"model": {"w": torch.ones(1)}, "optimizer": {"m": torch.ones(1)}})
    meta = {"model": {"w": torch.zeros(1)}, "optimizer": {"m": torch.zeros(1, device="meta")}}
    for attempt in (lambda: save(tmp_path, "b", meta), lambda: load(tmp_path, state=meta)):
        with pytest.raises(CheckpointError, match=r"optimizer\.m is on the meta device"):
            attempt()
    assert load(tmp_path, state=meta, parts=["model"])["model"]["w"].item() == 1


def test_latest_names_the_newest_unless_told_otherwise(tmp_path):
    save(tmp_path, "a", model_state(1.0))
    save(tmp_path, "b", model_state(2.0), keep_latest_pointer=False)
    assert latest(tmp_path) == "a"
    save(tmp_path, "c", model_state(3.0))
    assert latest(tmp_path) == "c"
    assert find(tmp_path, "b").name == "b"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "latest"]


def test_overwriting_a_tag_replaces_it(tmp_path):
    save(tmp_path, "a", model_state(1.0))
    save(tmp_path, "a", {"w": torch.ones(2)})
    assert load(tmp_path, state={"w": torch.zeros(2)})["w"].tolist() == [1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]


def test_leftovers_of_a_dead_save_are_removed(tmp_path):
    (tmp_path / "a.tmp-0123").mkdir()
    (tmp_path / "a.tmp-0123" / "rank_00000.safetensors").write_bytes(b"half")
    save(tmp_path, "a", model_state())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]


def test_something_else_under_the_tag_is_not_deleted(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious.txt").write_text("data")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this format"):
        save(tmp_path, "a", model_state())
    assert (tmp_path / "a" / "precious.txt").read_text() == "data"


@pytest.mark.parametrize("tag", ["", "a/b", "..", ".hidden", "latest", "x.tmp-1", "x.old-1", "a\n"])
def test_impossible_tags_are_refused(tmp_path, tag):
    with pytest.raises(CheckpointError, match="tag: got"):
        save(tmp_path, tag, model_state())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        pytest.param([1], "state: got list, expected a dictionary", id="list"),
        pytest.param({"a": {"f": {1, 2}}}, r"cannot save a\.f: got .*builtins\.set", id="set"),
        pytest.param({"a.b": 1, "a": {"b": 2}}, r"have the name 'a\.b'", id="same-name"),
        pytest.param(
            {"a": {None: torch.ones(1)}}, r"state\['a'\]: got a key of type NoneType", id="None-key"
        ),
    ],
)
def test_state_that_cannot_be_saved_is_refused_before_writing(tmp_path, state, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "c", "a", state)
    assert not (tmp_path / "c").exists()


def test_missing_directory_latest_and_tag_are_told_apart(tmp_path):
    into = model_state()
    with pytest.raises(CheckpointError, match="does not exist; check the path"):
        load(tmp_path / "nowhere", state=into)
    with pytest.raises(CheckpointError, match=r"no file 'latest'.*no complete checkpoint"):
        load(tmp_path, state=into)
    save(tmp_path, "step10", into, keep_latest_pointer=False)
    save(tmp_path, "step20", into, keep_latest_pointer=False)
    with pytest.raises(CheckpointError, match=r"no file 'latest'.*are step10, step20"):
        latest(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'step30' does not exist .* its checkpoints are step10, step20"
    ):
        load(tmp_path, "step30", state=into)
    (tmp_path / "step40").mkdir()
    with pytest.raises(CheckpointError, match="'step40' is not complete"):
        load(tmp_path, "step40", state=into)


@pytest.mark.parametrize("content", [b"", b"../../etc", b"\xff\xfe"])
def test_damaged_latest_is_named(tmp_path, content):
    save(tmp_path, "a", model_state())
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"latest.*its checkpoints are a"):
        load(tmp_path, state=model_state())


def test_checkpoint_of_another_model_names_keys_both_ways(tmp_path):
    save(tmp_path, "a", {"m": {f"old{i}": torch.ones(1) for i in range(6)} | {"w": torch.ones(2)}})
    into = {"m": {"new": torch.zeros(1), "w": torch.zeros(3)}, "step": 0}
    with pytest.raises(CheckpointError, match="checkpoint of another model") as caught:
        load(tmp_path, state=into)
    message = str(caught.value)
    assert "shapes differ: m.w: checkpoint [2], model [3]" in message
    assert "the model has, but the checkpoint lacks: m.new, step" in message
    assert (
        "the checkpoint has, but the model lacks: m.old0, m.old1, m.old2, m.old3 and 2 more"
        in message
    )


def test_not_strict_loads_what_both_have(tmp_path):
    save(tmp_path, "a", {"both": torch.ones(1), "old": torch.ones(1)})
    into = {"both": torch.zeros(1), "new": torch.zeros(1), "step": 4}
    loaded = load(tmp_path, state=into, strict=False)
    assert (loaded["both"].item(), loaded["new"].item(), loaded["step"]) == (1, 0, 4)
    with pytest.raises(CheckpointError, match="shapes differ"):
        load(tmp_path, state={"both": torch.zeros(2)}, strict=False)


def test_truncated_file_is_named(tmp_path):
    path = save(tmp_path, "a", model_state())
    file = path / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is truncated"):
        load(tmp_path, state=model_state())
    with pytest.raises(CheckpointError, match="is truncated"):
        verify(tmp_path)


def test_missing_file_is_named(tmp_path):
    path = save(tmp_path, "a", model_state())
    (path / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot open .*rank_00000\.safetensors"):
        load(tmp_path, state=model_state())


@pytest.mark.parametrize("part", ["first-byte", "last-byte"])
def test_flipped_bit_is_found_by_any_load_and_by_verify(tmp_path, part):
    path = save(tmp_path, "a", {"w": torch.zeros(100_000)})
    file = path / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    at = -1 if part == "last-byte" else len(data) - 400_000
    data[at] ^= 1
    file.write_bytes(data)
    start = 99_990 if part == "last-byte" else 0
    with pytest.raises(CheckpointError, match=r"damaged: the bytes of 'w\|0' do not match"):
        load(tmp_path, state={"w": FlatShard(torch.zeros(10), (100_000,), start=start)})
    with pytest.raises(CheckpointError, match=r"a is damaged:\n- .*'w\|0'"):
        verify(tmp_path)


def test_verify_compares_headers_and_counts(tmp_path):
    path = save(tmp_path, "a", {"w": torch.zeros(4), "v": torch.zeros(4)})
    assert verify(tmp_path, "a") == (path, 1, 2, 32)
    data = (path / "rank_00000.safetensors").read_bytes()
    (path / "rank_00000.safetensors").write_bytes(data.replace(b'"w|0"', b'"x|0"'))
    with pytest.raises(CheckpointError, match=r"entry 'w\|0' is None in the file's header"):
        verify(tmp_path)


def test_verify_finds_elements_that_are_stored_twice_while_others_are_not(tmp_path):
    path = save(tmp_path, "a", {"w": torch.zeros(4), "v": torch.zeros(4)})
    index = Index.read(path)
    (whole,) = index.tensors["w"].boxes
    half = whole.crc32[:1]
    index.tensors["w"].boxes = [
        replace(whole, box=Box((0,), (2,)), crc32=half),
        replace(whole, box=Box((1,), (2,)), crc32=half),
    ]
    index.check_coverage()  # counts elements only
    (path / "index.json").write_bytes(index.to_bytes())
    with pytest.raises(
        CheckpointError, match=r"- w: its boxes at \[0\]\+\[2\] and \[1\]\+\[2\] ov"
    ):
        verify(tmp_path)


def test_find_takes_a_checkpoint_itself(tmp_path):
    path = save(tmp_path, "a", model_state())
    save(tmp_path, "b", model_state())
    assert find(path) == path
    assert load(path, state=model_state())
    assert verify(path).path == path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda i: i.update(version=2), "got .* version 2", id="newer"),
        pytest.param(lambda i: i.update(block_bytes=1), "malformed.*block_bytes", id="blocks"),
        pytest.param(lambda i: i.pop("tensors"), "malformed", id="no-tensors"),
        pytest.param(
            lambda i: i["files"].update({"../../x": {"bytes": 1}}), "not a plain file", id="escape"
        ),
        pytest.param(
            lambda i: i["tensors"]["scale"]["boxes"][0].update(offsets=[9]),
            "does not fit",
            id="box-outside",
        ),
        pytest.param(
            lambda i: i["tensors"]["scale"]["boxes"][0].update(crc32=[]), "0 checksums", id="no-crc"
        ),
        pytest.param(
            lambda i: i["tensors"]["scale"]["boxes"][0].update(file="y"), "not listed", id="file"
        ),
        pytest.param(lambda i: i["tensors"]["scale"].update(dtype="F1"), "dtype", id="dtype"),
    ],
)
def test_index_that_makes_no_sense_is_refused(tmp_path, change, message):
    path = save(tmp_path, "a", {"scale": torch.ones(3)})
    edit_index(path, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, state={"scale": torch.zeros(3)})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"crc32": 1, "index": {}}'])
def test_damaged_index_is_refused(tmp_path, text):
    path = save(tmp_path, "a", model_state())
    (path / "index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        load(tmp_path, state=model_state())


def test_flipped_digit_of_a_value_is_found(tmp_path):
    path = save(tmp_path, "a", {"lr": 0.125})
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(text.replace("0.125", "0.325"))
    with pytest.raises(CheckpointError, match="checksum does not match"):
        read_state(tmp_path)


def test_full_disk_leaves_earlier_checkpoints_and_no_rest(tmp_path, monkeypatch):
    save(tmp_path, "a", model_state(1.0))

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"saving checkpoint 'b' .*No space left"):
            save(tmp_path, "b", model_state(2.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]
    assert load(tmp_path, state=model_state(0.0))["step"] == 1


def test_importing_ds_core_does_not_import_checkpointing():
    code = "import ds_core, sys; print('torch.distributed.checkpoint' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_checkpoint_that_is_still_being_written_is_named(tmp_path):
    save(tmp_path, "a", {"w": torch.ones(2)})
    (tmp_path / "b.tmp-12345678").mkdir()
    with pytest.raises(CheckpointError, match=r"'b' is not complete: it is still being written"):
        load(tmp_path, "b", state={"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="or is still going on, has none"):
        SafetensorsReader(tmp_path / "b.tmp-12345678").read_metadata()
