"""A disk that fails in the middle: an error that names the file on every rank, never corruption."""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from zero_loops import adamw, sharded, sharded_steps
from zero_models import CASES, Stack

import ds_zero
from ds_core import plugins, tensor_files
from ds_core.errors import DsError
from ds_core.testing import file_size_limit, run_ranks
from ds_zero.offload import Offload, disk_speed, homes

ENGINES = ["threads", "installed"] if plugins.registered("tensor_files") else ["threads"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Each way of reading and writing files."""
    return str(request.param)


def opened(engine: str) -> pytest.MonkeyPatch:
    """Use an engine in this rank until `undo`."""
    patch = pytest.MonkeyPatch()
    if engine == "threads":
        patch.setattr(homes, "open_tensor_files", tensor_files.ThreadedFiles)
    return patch


def swap_files() -> list[str]:
    """Paths, through this process, of its swap files, which have no name of their own."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        try:
            if "ds_zero_" in os.readlink(path):
                found.append(path)
        except OSError:
            continue
    return found


def cut(_: str) -> None:
    """Take the second half of every swap file."""
    for path in swap_files():
        os.truncate(path, os.path.getsize(path) // 2 // 4096 * 4096)


def empty(_: str) -> None:
    for path in swap_files():
        os.truncate(path, 0)


FAULTS = {"cut": cut, "emptied": empty}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("what", ["optimizer", "parameters"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_cut_is_an_error_on_every_rank(
    tmp_path, engine: str, fault: str, what: str, world_size: int
):
    for text in run_ranks(world_size, train_on_bad_disk, engine, fault, what, str(tmp_path)):
        assert "ds_zero_" in text
        assert ".swap" in text
        assert any(word in text for word in ("ends at byte", "found only"))


def train_on_bad_disk(engine: str, fault: str, what: str, folder: str) -> str:
    patch = opened(engine)
    try:
        case = CASES["stack"]
        offload = Offload(**{what: "nvme"}, folder=folder, piece_numel=200)
        model, optimizer = sharded(case, 3, offload=offload)
        sharded_steps(model, optimizer, case, 1)
        if optimizer._homes.swap is not None:
            optimizer._homes.swap.settle()
        for home in optimizer._homes._disk_shards:
            home.close()
        FAULTS[fault](folder)
        with pytest.raises(OSError, match=r"\.swap") as caught:
            sharded_steps(model, optimizer, case, 1, first=1)
        assert isinstance(caught.value, DsError)
        return str(caught.value)
    finally:
        patch.undo()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_disk_that_takes_no_more_is_an_error(tmp_path, engine: str, world_size: int):
    for text in run_ranks(world_size, write_beyond_the_limit, engine, str(tmp_path)):
        assert ".swap" in text
        assert "of" in text


def write_beyond_the_limit(engine: str, folder: str) -> str:
    patch = opened(engine)
    try:
        case = CASES["stack"]
        offload = Offload(optimizer="nvme", folder=folder, piece_numel=200)
        model, optimizer = sharded(case, 2, offload=offload)
        sharded_steps(model, optimizer, case, 1)
        optimizer._homes.swap.settle()
        # A limit under the size of the file: it is read, and cannot be written any more.
        with file_size_limit(4096), pytest.raises(OSError, match=r"\.swap") as caught:
            sharded_steps(model, optimizer, case, 3)
        return str(caught.value)
    finally:
        patch.undo()


def test_one_rank_with_a_bad_disk_ends_the_other_too(tmp_path, engine: str):
    with pytest.raises(Exception, match=r"rank 0 raised .*swap"):
        run_ranks(2, only_one_fails, engine, str(tmp_path))


def only_one_fails(engine: str, folder: str) -> None:
    opened(engine)
    case = CASES["stack"]
    offload = Offload(optimizer="nvme", folder=folder, piece_numel=200)
    model, optimizer = sharded(case, 2, offload=offload)
    optimizer._homes.swap.settle()
    if dist.get_rank() == 0:
        empty(folder)
    sharded_steps(model, optimizer, case, 2)


# ---------------------------------------------------------------------- before training


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 1 MiB, not among pytest's own folders, which it could not clean up."""
    place = Path(tempfile.mkdtemp(prefix="small_disk_"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if mounted.returncode:
        place.rmdir()
        pytest.skip("this process may not mount a tmpfs")
    yield place
    # Lazily: a rank that has failed may still have its file open.
    subprocess.run(["umount", "-l", str(place)], check=True)
    place.rmdir()


def test_a_disk_too_small_for_all_ranks_is_refused_before_training(small_disk):
    for text in run_ranks(2, shard_on, str(small_disk), 90):
        assert f"the disk of '{small_disk}'" in text
        assert "give another folder" in text
        assert "= needed" in text


def test_a_full_disk_is_an_error_where_nobody_checked(small_disk, engine: str):
    for text in run_ranks(1, shard_on, str(small_disk), 400, False, engine):
        assert "swap" in text
        assert "No space left" in text or "ENOSPC" in text


def shard_on(folder: str, width: int, check: bool = True, engine: str = "threads") -> str:
    patch = opened(engine)
    try:
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(20)))
        optimizer = adamw(model.parameters())
        offload = Offload(optimizer="nvme", folder=folder)
        with pytest.raises((ds_zero.ShardError, OSError)) as caught:
            ds_zero.shard(model, optimizer, 1, offload=offload, check_memory=check)
        return str(caught.value)
    finally:
        patch.undo()


def test_speed_and_page_cache_are_told(tmp_path):
    (text,) = run_ranks(1, told_of_the_disk, str(tmp_path))
    assert "transfers go through the page cache" in text
    assert "pip install ds-ops" in text
    assert "writes " in text
    assert "reads " in text
    assert "speed not measured: the swap file has only" in text
    assert os.listdir(tmp_path) == []


def told_of_the_disk(folder: str) -> str:
    patch = opened("threads")
    patch.setattr(disk_speed, "PROBE_BYTES", 1 << 20)
    patch.setattr(disk_speed, "_CHUNK_BYTES", 1 << 18)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("ds_zero.offload")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        offload = Offload(optimizer="nvme", folder=folder)
        for model in (torch.nn.Linear(400, 400), Stack()):
            ds_zero.shard(model, adamw(model.parameters()), 1, offload=offload).close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        patch.undo()
    return "\n".join(records)


def test_a_disk_that_returns_something_else_is_refused(tmp_path):
    run_ranks(1, lying_disk, str(tmp_path))


def lying_disk(folder: str) -> None:
    patch = opened("threads")
    patch.setattr(disk_speed, "PROBE_BYTES", 1 << 20)
    patch.setattr(disk_speed, "_CHUNK_BYTES", 1 << 18)
    honest = tensor_files._ThreadedFile._read

    def lying(self, view, offset):
        count = honest(self, view, offset)
        view[7] ^= 1
        return count

    patch.setattr(tensor_files._ThreadedFile, "_read", lying)
    try:
        model = torch.nn.Linear(400, 400)
        offload = Offload(optimizer="nvme", folder=folder)
        with pytest.raises(ds_zero.ShardError, match="is not what was written; check the disk"):
            ds_zero.shard(model, adamw(model.parameters()), 1, offload=offload)
    finally:
        patch.undo()
