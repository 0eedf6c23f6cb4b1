from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ds_core.checkpoint import AsyncSaver, latest, load, save, tags, verify
from ds_core.checkpoint.retention import being_read, prune
from ds_core.errors import CheckpointError


def state(fill=1.0):
    return {"w": torch.full((10,), float(fill))}


def fill_folder(directory, count, **options):
    for i in range(count):
        path = save(directory, f"s{i}", state(i), **options)
        os.utime(path / "index.json", (1000 + i, 1000 + i))  # a clock may be coarse


def kept(directory):
    return tags.tags(Path(directory))


def test_newest_are_kept(tmp_path):
    fill_folder(tmp_path, 5)
    save(tmp_path, "s5", state(5), keep_last=2)
    assert kept(tmp_path) == ["s4", "s5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "s4", "s5"]
    assert load(tmp_path, state=state())["w"][0] == 5


def test_async_saver_keeps_the_newest(tmp_path):
    fill_folder(tmp_path, 3)
    with AsyncSaver() as saver:
        saver.save(tmp_path, "s3", state(3), keep_last=1)
    assert kept(tmp_path) == ["s3"]


def test_nothing_is_deleted_unless_asked(tmp_path):
    fill_folder(tmp_path, 4)
    assert len(kept(tmp_path)) == 4


@pytest.mark.parametrize("keep_last", [0, -1, True])
def test_number_that_keeps_none_is_refused(tmp_path, keep_last):
    with pytest.raises(CheckpointError, match=r"keep_last: got .* expected at least 1"):
        save(tmp_path, "a", state(), keep_last=keep_last)
    assert not list(tmp_path.iterdir())


def test_the_one_that_latest_names_is_kept(tmp_path):
    fill_folder(tmp_path, 4)
    tags.point_latest(tmp_path, "s1")
    save(tmp_path, "s4", state(4), keep_last=1, keep_latest_pointer=False)
    assert kept(tmp_path) == ["s1", "s4"]
    assert latest(tmp_path) == "s1"


def test_the_one_that_is_written_anew_is_kept(tmp_path):
    fill_folder(tmp_path, 3)
    (tmp_path / "s0.tmp-12345678").mkdir()
    assert prune(tmp_path, 1) == ["s1"]
    assert kept(tmp_path) == ["s0", "s2"]
    assert (tmp_path / "s0.tmp-12345678").is_dir()


def test_the_one_that_is_read_is_kept_until_it_has_been(tmp_path):
    fill_folder(tmp_path, 3)
    with being_read(tmp_path / "s0"):
        assert prune(tmp_path, 1) == ["s1"]
        load(tmp_path, "s0", state=state())
    assert prune(tmp_path, 1) == ["s0"]


READER = """
import sys, pathlib
from ds_core.checkpoint.retention import being_read
with being_read(pathlib.Path(sys.argv[1])):
    print("reading", flush=True)
    sys.stdin.readline()
"""


def test_reader_in_another_process_protects_until_it_dies(tmp_path):
    fill_folder(tmp_path, 3)
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, tmp_path / "s0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout.readline() == b"reading\n"
    assert prune(tmp_path, 1) == ["s1"]
    reader.kill()
    reader.communicate()
    assert prune(tmp_path, 1) == ["s0"]


@pytest.mark.parametrize("user", ["load", "verify"])
def test_load_and_verify_hold_the_checkpoint(tmp_path, monkeypatch, user):
    from ds_core.checkpoint import box_reader

    fill_folder(tmp_path, 2)
    deleted = []
    read = box_reader.read_exactly

    def prune_and_read(*args):
        worker = threading.Thread(target=lambda: deleted.extend(prune(tmp_path, 1)))
        worker.start()
        worker.join()
        return read(*args)

    monkeypatch.setattr(box_reader, "read_exactly", prune_and_read)
    if user == "load":
        load(tmp_path, "s0", state=state())
    else:
        verify(tmp_path, "s0")
    assert deleted == []
    assert prune(tmp_path, 1) == ["s0"]


def test_reader_who_comes_too_late_is_told(tmp_path, monkeypatch):
    fill_folder(tmp_path, 2)
    samestat = os.path.samestat
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with pytest.raises(CheckpointError, match="was deleted or replaced when it was about"):
        load(tmp_path, "s0", state=state())
    monkeypatch.setattr(os.path, "samestat", samestat)
    load(tmp_path, "s0", state=state())


def test_deletion_that_dies_half_way_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    fill_folder(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(tags, "discard", lambda path: None)  # dead after the rename
        prune(tmp_path, 1)
    assert kept(tmp_path) == ["s2"]
    assert len(list(tmp_path.glob("*.del-*"))) == 2
    prune(tmp_path, 1)
    assert not list(tmp_path.glob("*.del-*"))


def test_save_succeeds_where_old_ones_cannot_be_deleted(tmp_path, monkeypatch, caplog):
    fill_folder(tmp_path, 2)

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ds_core.checkpoint.retention.rename", refuse)
    save(tmp_path, "s2", state(2), keep_last=1)
    assert "cannot delete old checkpoints" in caplog.text
    assert latest(tmp_path) == "s2"


def test_foreign_folders_stay(tmp_path):
    fill_folder(tmp_path, 2)
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    prune(tmp_path, 1)
    assert (tmp_path / "plots").is_dir()
    assert (tmp_path / "notes.txt").exists()


def test_tag_that_looks_like_a_deleted_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"without '\.tmp-', '\.old-' or '\.del-'"):
        save(tmp_path, "a.del-1", state())
