"""Checkpoints on file systems of fsspec: in memory, local ones by URL, and an object store."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from ds_core import checkpoint
from ds_core.checkpoint import AsyncSaver, FlatShard, latest, load, save, tags, verify
from ds_core.checkpoint.ranks import Ranks
from ds_core.checkpoint.remote import RemotePath, as_place
from ds_core.cli import main as run_cli
from ds_core.errors import CheckpointError
from ds_core.testing import run_ranks


class KeysStore(MemoryFileSystem):
    """As object stores are: files under keys. There are no folders, and making one does nothing."""

    protocol = "keys"

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("keys://", "memory://"))

    def makedirs(self, path, exist_ok=False):
        pass

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def _open(self, path, mode="rb", **kwargs):
        if mode != "wb":
            return super()._open(path, mode, **kwargs)
        file = MemoryFile(self, path, kwargs.get("data"))  # memory's own wants the folder first
        file.commit()
        return file


@pytest.fixture
def empty_stores():
    def clear():
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]

    clear()
    yield
    clear()


@pytest.fixture(params=["memory", "keys"])
def url(request, empty_stores):
    fsspec.register_implementation("keys", KeysStore, clobber=True)
    yield f"{request.param}://bucket/run"
    assert request.param == "memory" or MemoryFileSystem.pseudo_dirs == [""]


def state(fill=1.0):
    return {"w": torch.full((300,), float(fill)), "v": torch.full((3, 5), fill), "fill": fill}


def filled(url, tag=None):
    got = load(url, tag, state=state(0.0))
    assert torch.all(got["w"] == got["fill"])
    assert torch.all(got["v"] == got["fill"])
    return got["fill"]


def names(url):
    fs, path = fsspec.core.url_to_fs(url)
    return sorted(name.removeprefix(f"{path}/") for name in fs.find(path))


def test_save_load_latest_and_verify(url):
    path = save(url, "a", state(1.0))
    assert str(path) == f"{url}/a"
    assert latest(url) == "a"
    assert filled(url) == filled(path) == 1.0
    assert verify(url).num_tensors == 2
    assert checkpoint.inspect(url).latest == "a"
    assert checkpoint.full_state_dict(url, prefix="")["v"].shape == (3, 5)
    assert checkpoint.read_state(url) == {"fill": 1.0}


def test_asynchronous_save(url):
    with AsyncSaver() as saver:
        live = state(1.0)
        pending = saver.save(url, "a", live)
        live["w"].zero_()
    assert filled(pending.path) == 1.0


def test_replaced_checkpoint_leaves_no_old_files(url):
    save(url, "a", state(1.0))
    before = names(url)
    save(url, "a", state(2.0))
    assert filled(url) == 2.0
    assert len(names(url)) == len(before) == 3
    assert set(names(url)) != set(before)  # the data are in a file of another name


def test_retention(url):
    for i in range(4):
        save(url, f"s{i}", state(i), keep_last=2)
    assert tags.tags(as_place(url)) == ["s2", "s3"]
    assert {name.split("/")[0] for name in names(url)} == {"latest", "s2", "s3"}


def test_missing_things_are_named(url):
    with pytest.raises(CheckpointError, match=f"{url} does not exist"):
        load(url, state=state())
    save(url, "a", state())
    with pytest.raises(CheckpointError, match=r"'b' does not exist .* its checkpoints are a"):
        load(url, "b", state=state())
    fsspec.filesystem("memory").rm_file("/bucket/run/a/index.json")  # both keep files there
    with pytest.raises(CheckpointError, match="'a' is not complete: it is still being written"):
        load(url, "a", state=state())


def test_damage_is_named(url):
    save(url, "a", state())
    memory = fsspec.filesystem("memory")
    (data,) = [name for name in memory.find("/bucket/run/a") if name.endswith(".safetensors")]
    content = bytearray(memory.cat_file(data))
    content[-1] ^= 1
    memory.pipe_file(data, bytes(content))
    with pytest.raises(CheckpointError, match=rf"{url}/a/rank_00000.*tensor '[wv]'"):
        verify(url)
    memory.pipe_file(data, bytes(content[:-10]))
    with pytest.raises(CheckpointError, match="is truncated"):
        load(url, state=state())


def test_lazy_shards(url):
    shelf = {}
    save(url, "a", {"x": FlatShard.lazy(6, torch.float32, (2, 3), read=lambda: torch.ones(6))})
    target = FlatShard.lazy(
        3, torch.float32, (2, 3), 3, read=list, write=lambda t: shelf.update(x=t)
    )
    load(url, state={"x": target})
    assert shelf["x"].tolist() == [1, 1, 1]


def test_command_line(url, capsys):
    save(url, "a", state())
    for command in ("inspect", "verify"):
        with contextlib.suppress(SystemExit):
            run_cli(["checkpoint", command, url])
    out = capsys.readouterr().out
    assert "is whole: 2 tensors" in out
    assert f"{url}/a" in out


def test_export_of_a_remote_checkpoint(url, tmp_path):
    save(url, "a", {"model": {"w": torch.ones(4)}, "about": {"buffers": []}})
    done = checkpoint.export_safetensors(url, tmp_path / "out")
    assert done.num_tensors == 1


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_url_of_a_local_folder_is_the_folder(tmp_path, scheme):
    path = save(f"{scheme}://{tmp_path}/run", "a", state())
    assert path == tmp_path / "run" / "a"
    assert filled(f"{scheme}://{tmp_path}/run") == 1.0


def test_url_that_became_a_path_is_refused():
    with pytest.raises(CheckpointError, match=r"pass it as a string, such as 's3://bucket/run'"):
        save(Path("s3://bucket/run"), "a", state())


def test_unknown_protocol_and_missing_packages_say_what_to_do(monkeypatch):
    with pytest.raises(CheckpointError, match="cannot open this URL: Protocol not known: nowhere"):
        save("nowhere://bucket", "a", state())
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(CheckpointError, match=r"pip install 'ds-core\[fsspec\]'"):
        save("s3://bucket", "a", state())


@pytest.fixture
def lost_at_the_end(monkeypatch):
    """Rank 0 loses the others when it tells them that the checkpoint has its tag."""
    tell = Ranks._from_first

    def lost(ranks, everybodys):
        failures, decision = everybodys[0]
        if not failures and isinstance(decision, Path | RemotePath):
            monkeypatch.undo()
            raise RuntimeError("Connection closed by peer")
        return tell(ranks, everybodys)

    return lambda: monkeypatch.setattr(Ranks, "_from_first", lost)


@pytest.mark.parametrize("tag", ["a", "b"], ids=["same-tag", "new-tag"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_what_is_published_is_not_deleted_when_contact_is_lost(
    url, lost_at_the_end, tag, asynchronous
):
    save(url, "a", state(1.0))
    with contextlib.closing(AsyncSaver()) as saver:
        lost_at_the_end()
        attempt = (lambda *args: saver.save(*args).wait()) if asynchronous else save
        with pytest.raises(CheckpointError, match=r"closed by peer.*is complete and stays"):
            attempt(url, tag, state(2.0))
    assert filled(url, tag) == 2.0
    verify(f"{url}/{tag}")
    assert len([name for name in names(url) if name.startswith(f"{tag}/")]) == 2
    save(url, tag, state(3.0))
    assert filled(url, tag) == 3.0


def test_an_index_whose_request_failed_but_came_through_keeps_its_data(url, monkeypatch):
    save(url, "a", state(1.0))
    put = RemotePath.put

    def put_and_fail(path, content):
        put(path, content)
        raise TimeoutError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "put", put_and_fail)
        with pytest.raises(CheckpointError, match=r"no answer.*is complete and stays"):
            save(url, "a", state(2.0))
    assert filled(url) == 2.0
    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "put", lambda *_: 1 / 0)
        with pytest.raises(CheckpointError, match="ZeroDivisionError") as told:
            save(url, "a", state(3.0))
    assert "stays" not in str(told.value)
    assert filled(url) == 2.0
    assert len([name for name in names(url) if name.startswith("a/")]) == 3  # till the next save
    save(url, "a", state(4.0))
    assert filled(url) == 4.0
    assert len([name for name in names(url) if name.startswith("a/")]) == 2


def test_a_local_checkpoint_stays_when_contact_is_lost_behind_it(tmp_path, lost_at_the_end):
    save(tmp_path, "a", state(1.0))
    lost_at_the_end()
    with pytest.raises(CheckpointError, match=r"closed by peer.*is complete and stays"):
        save(tmp_path, "a", state(2.0))
    assert filled(tmp_path) == 2.0


class Crash(BaseException):
    """Nothing is written any more."""


class FailingStore(MemoryFileSystem):
    """An object store whose connection breaks after some requests that change it."""

    protocol = "failing"
    budget = 10**9

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://"))

    def spend(self):
        if FailingStore.budget <= 0:
            raise Crash
        FailingStore.budget -= 1

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self.spend()
        super().pipe_file(path, value, mode, **kwargs)

    def open(self, path, mode="rb", **kwargs):
        if mode == "wb" and "data" not in kwargs:
            self.spend()
        return super().open(path, mode, **kwargs)

    def rm_file(self, path):
        self.spend()
        self._rm(path)

    def mkdir(self, *args, **kwargs):
        self.spend()
        super().mkdir(*args, **kwargs)


@pytest.mark.parametrize("tag", ["a", "b"], ids=["same-tag", "new-tag"])
@pytest.mark.usefixtures("empty_stores")
def test_crash_at_any_request_leaves_a_whole_checkpoint(tag):
    fsspec.register_implementation("failing", FailingStore, clobber=True)
    for budget in range(50):
        FailingStore.budget = 10**9
        run = f"failing://run{budget}"
        save(run, "a", state(1.0))
        FailingStore.budget = budget
        with contextlib.suppress(Crash, CheckpointError):
            save(run, tag, state(2.0))
        was_cut = FailingStore.budget <= 0
        FailingStore.budget = 10**9
        assert filled(run) in ((1.0, 2.0) if was_cut else (2.0,))
        verify(run)
        save(run, tag, state(3.0))
        assert filled(run) == 3.0
        assert len([n for n in names(run) if n.startswith(f"{tag}/")]) == 2
        if not was_cut:
            break
    assert 2 < budget < 49


class SharedStore(LocalFileSystem):
    """A store that several processes see, with URLs of its own and no rename."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).replace("shared://", "file://"))

    def mv(self, *args, **kwargs):
        raise AssertionError("renamed")


def use_shared_store(directory: str, asynchronous: bool):
    fsspec.register_implementation("shared", SharedStore, clobber=True)
    rank, url = dist.get_rank(), f"shared://{directory}/run"
    shard = FlatShard(torch.arange(rank * 12.0, rank * 12 + 12), (4, 6), rank * 12)
    for tag in ("a", "b", "b"):
        if asynchronous:
            with AsyncSaver() as saver:
                path = saver.save(url, tag, {"w": shard}, keep_last=1).path
        else:
            path = save(url, tag, {"w": shard}, keep_last=1)
    assert isinstance(path, RemotePath)
    got = load(url, state={"w": torch.zeros(4, 6)}, verify=True)
    return got["w"].reshape(-1).tolist(), tags.tags(as_place(url))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_ranks_save_to_one_store(tmp_path, asynchronous):
    for content, known in run_ranks(2, use_shared_store, str(tmp_path), asynchronous):
        assert content == list(range(24))
        assert known == ["b"]
    assert len(list((tmp_path / "run" / "b").iterdir())) == 3
