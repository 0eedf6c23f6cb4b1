from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time

import pytest
import torch

from ds_core.checkpoint import AsyncSaver, files, latest, load, save, verify
from ds_core.errors import CheckpointError
from ds_core.testing import Raised, run_ranks


class Crash(BaseException):
    """The process is dead from here on: nothing reaches the disk any more."""


class Disk:
    """Lets `budget` operations reach the disk; the next one, and all after it, raise Crash."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0

    def spend(self) -> None:
        self.used += 1
        if self.used > self.budget:
            raise Crash

    def wrap(self, function):
        def wrapped(*args, **kwargs):
            self.spend()
            return function(*args, **kwargs)

        return wrapped

    def open(self, path, mode, buffering):
        self.spend()
        return CrashingFile(self, path, mode)


class CrashingFile(io.FileIO):
    def __init__(self, disk: Disk, path, mode) -> None:
        super().__init__(path, mode)
        self.disk = disk

    def write(self, data):
        if self.disk.used >= self.disk.budget:
            super().write(data[: len(data) // 2])  # torn by the crash
        self.disk.spend()
        return super().write(data)


def state(fill: float):
    return {"w": torch.full((100,), fill), "v": torch.full((3, 3), fill), "fill": fill}


def crash_after(budget: int, monkeypatch, action) -> bool:
    """Run `action` on a disk that dies after `budget` operations; whether it was cut short."""
    disk = Disk(budget)
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, disk.wrap(getattr(os, name)))
        patch.setattr(files, "open", disk.open, raising=False)
        with contextlib.suppress(Crash, CheckpointError):
            action()
    return disk.used > budget


def save_from_a_thread(directory, tag, content):
    with AsyncSaver() as saver:
        saver.save(directory, tag, content).wait()


@pytest.mark.parametrize("saving", [save, save_from_a_thread], ids=["sync", "async"])
@pytest.mark.parametrize("tag", ["a", "b"], ids=["same-tag", "new-tag"])
def test_crash_at_any_operation_leaves_a_whole_checkpoint(tmp_path, monkeypatch, tag, saving):
    for budget in range(200):
        directory = tmp_path / str(budget)
        save(directory, "a", state(1.0))
        was_cut = crash_after(budget, monkeypatch, lambda d=directory: saving(d, tag, state(2.0)))
        loaded = load(directory, state=state(0.0))
        assert loaded["fill"] in ((1.0, 2.0) if was_cut else (2.0,))
        assert torch.equal(loaded["w"], state(loaded["fill"])["w"])
        assert torch.equal(loaded["v"], state(loaded["fill"])["v"])
        verify(directory)
        if not was_cut:
            break
    assert 10 < budget < 199


@pytest.mark.parametrize("second", range(0, 40, 3))
def test_second_crash_while_replacing_again(tmp_path, monkeypatch, second):
    for first in range(0, 40, 3):
        directory = tmp_path / str(first)
        save(directory, "a", state(1.0))
        crash_after(first, monkeypatch, lambda d=directory: save(d, "a", state(2.0)))
        crash_after(second, monkeypatch, lambda d=directory: save(d, "a", state(3.0)))
        verify(directory)
        save(directory, "a", state(4.0))
        assert load(directory, state=state(0.0))["fill"] == 4.0
        assert sorted(p.name for p in directory.iterdir() if p.name[0] != ".") == ["a", "latest"]


def save_until_killed(directory: str, rank_to_kill: int, delay_s: float) -> None:
    rank = torch.distributed.get_rank()
    fill = 0.0
    while True:
        fill += 1.0
        save(directory, f"t{int(fill) % 2}", {"w": torch.full((500_000,), fill), "fill": fill})
        if rank == rank_to_kill and fill == 3.0:
            suicide = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            threading.Timer(delay_s, suicide).start()


@pytest.mark.parametrize(("rank", "delay_s"), [(0, 0.003), (0, 0.017), (1, 0.009)])
def test_rank_killed_in_a_save_neither_hangs_nor_harms(tmp_path, rank, delay_s):
    outcomes = run_ranks(
        2, save_until_killed, str(tmp_path), rank, delay_s, deaths={rank: signal.SIGKILL}
    )
    survivor = outcomes[1 - rank]
    assert isinstance(survivor, Raised)
    assert "CheckpointError" in survivor.type
    verify(tmp_path)
    loaded = load(tmp_path, state={"w": torch.zeros(500_000)})
    assert loaded["fill"] >= 3.0
    assert torch.all(loaded["w"] == loaded["fill"])


def test_leftovers_of_a_killed_save_do_not_disturb_the_next(tmp_path):
    save(tmp_path, "a", state(1.0))
    (tmp_path / "a").rename(tmp_path / "a.old-1234abcd")
    assert latest(tmp_path) == "a"
    assert load(tmp_path, state=state(0.0))["fill"] == 1.0
    time.sleep(0.01)
    save(tmp_path, "a", state(2.0))
    assert load(tmp_path, state=state(0.0))["fill"] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "latest"]
