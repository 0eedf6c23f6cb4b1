"""Errors of AsyncFile: each says where, why and what to do, and none is lost."""

from __future__ import annotations

import errno
import gc
import logging
import os
import pickle
import resource

import pytest
import torch

from ds_core.errors import DsError, OpError
from ds_ops.aio import AsyncFile, AsyncFileError, AsyncIO, FastFileWriter, Token
from ds_ops.aio import engine as engine_module


def written(path, size: int) -> torch.Tensor:
    tensor = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    path.write_bytes(bytes(tensor.numpy()))
    return tensor


def test_missing_file_and_folder(engine, tmp_path):
    for place in (tmp_path / "none.bin", tmp_path / "none" / "x.bin"):
        with pytest.raises(AsyncFileError, match="check the path") as caught:
            AsyncFile(place, "r", engine=engine)
        assert caught.value.errno == errno.ENOENT
        assert caught.value.path == caught.value.filename == str(place)
        assert isinstance(caught.value, DsError)
        assert isinstance(caught.value, OSError)
    with pytest.raises(AsyncFileError, match="path of a file"):
        AsyncFile(tmp_path, "rw", engine=engine)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write what is read-only")
def test_read_only_file(engine, tmp_path):
    written(tmp_path / "file.bin", 10)
    (tmp_path / "file.bin").chmod(0o444)
    with pytest.raises(AsyncFileError, match="permissions") as caught:
        AsyncFile(tmp_path / "file.bin", "rw", engine=engine)
    assert caught.value.errno == errno.EACCES


@pytest.mark.parametrize("size", [100, 4096, 20_000, 70_001])
def test_read_past_the_end_tells_how_much_there_was(engine, tmp_path, size):
    expected = written(tmp_path / "file.bin", size)
    target = torch.zeros(100_000, dtype=torch.uint8)
    with AsyncFile(tmp_path / "file.bin", engine=engine) as file:
        token = file.read(target, 10)
        with pytest.raises(
            AsyncFileError, match=f"of 100000 bytes found only {size - 10}"
        ) as caught:
            token.wait()
        assert (caught.value.errno, caught.value.offset) == (errno.ENODATA, 10)
        assert torch.equal(target[: size - 10], expected[10:])
        with pytest.raises(AsyncFileError, match="found only 0 at offset 999999"):
            file.read_sync(target, 999_999)


def test_full_disk(engine):
    with AsyncFile("/dev/full", "rw", engine=engine) as file:
        with pytest.raises(AsyncFileError, match=r"ENOSPC.*MiB free") as caught:
            file.write_sync(torch.ones(10_000), 4096)
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.offset is not None


def test_limit_on_the_size_of_files(engine, tmp_path):
    limit = 60_001
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
            with pytest.raises(AsyncFileError, match="ulimit -f") as caught:
                file.write_sync(torch.ones(100_000, dtype=torch.uint8))
            with pytest.raises(AsyncFileError, match="preallocate to 99999 bytes failed"):
                file.preallocate(99_999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert 0 < (tmp_path / "file.bin").stat().st_size <= limit


def test_writer_meets_a_full_disk():
    with pytest.raises(AsyncFileError, match="ENOSPC"), FastFileWriter("/dev/full") as writer:
        writer.write(bytes(100_000))


def test_no_direct_transfers_is_visible(engine):
    with AsyncFile("/proc/self/status", "r", engine=engine) as file:
        target = torch.zeros(5, dtype=torch.uint8)
        file.read_sync(target)
        assert not file.direct
        assert "O_DIRECT" in (file.why_buffered or "") or "no direct" in (file.why_buffered or "")
    assert bytes(target.numpy()) == b"Name:"


def test_transfer_that_is_refused_goes_through_the_page_cache(engine, tmp_path, caplog):
    tensor = written(tmp_path / "file.bin", 100_000)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        if not file.direct:
            pytest.skip(f"no direct transfers here: {file.why_buffered}")
        # As a file system that asks for more than it says: transfers at odd bytes are refused.
        file._opened.alignment, file._opened.memory_alignment = 1, 1
        target = torch.zeros(90_000, dtype=torch.uint8)
        file.read_sync(target, 1001)
        assert not file.direct
        assert "refused" in (file.why_buffered or "")
        file.write_sync(target, 3)
    assert torch.equal(target, tensor[1001:91_001])
    assert "page cache" in caplog.text
    assert (tmp_path / "file.bin").read_bytes()[3:90_003] == bytes(target.numpy())


def test_closed_file_and_engine(tmp_path):
    written(tmp_path / "file.bin", 10)
    engine = AsyncIO("threads", threads=1)
    file, other = (AsyncFile(tmp_path / "file.bin", engine=engine) for _ in range(2))
    file.close()
    file.close()
    with pytest.raises(AsyncFileError, match="closed"):
        file.read(torch.zeros(1))
    with pytest.raises(AsyncFileError, match="closed"):
        file.size()
    engine.close()
    with pytest.raises(OpError, match="closed; make another"):
        other.read(torch.zeros(1))
    other.close()


def test_engine_that_is_closed_settles_its_files(tmp_path):
    written(tmp_path / "file.bin", 4096)
    engine = AsyncIO(block_bytes=4096)
    file = AsyncFile(tmp_path / "file.bin", engine=engine)
    good, bad = file.read(torch.zeros(1024)), file.read(torch.zeros(1025))
    engine.close()
    assert good.wait() == 4096
    with pytest.raises(AsyncFileError, match="found only 4096"):
        bad.wait()
    file.close()


def test_error_that_nobody_waited_for_is_raised_by_close(engine, tmp_path):
    written(tmp_path / "file.bin", 10)
    file = AsyncFile(tmp_path / "file.bin", engine=engine)
    file.read(torch.zeros(100), 1)
    file.read(torch.zeros(200), 2)
    with pytest.raises(AsyncFileError, match="read of 400 bytes") as caught:
        file.wait_all()
    assert "read of 800 bytes" in caught.value.__notes__[0]
    file.wait_all()  # told once
    file.read(torch.zeros(100))
    with pytest.raises(AsyncFileError, match="found only 10"):
        file.close()
    assert file.closed


def test_error_of_the_block_is_not_hidden_by_one_of_a_request(engine, tmp_path):
    written(tmp_path / "file.bin", 10)
    file = AsyncFile(tmp_path / "file.bin", engine=engine)

    def block() -> None:
        with file:
            file.read(torch.zeros(100))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        block()
    assert file.closed


def test_file_that_is_dropped_finishes_and_logs(engine, tmp_path, caplog):
    written(tmp_path / "file.bin", 10)
    file = AsyncFile(tmp_path / "file.bin", "rw", engine=engine)
    file.write(torch.full((300_000,), 7, dtype=torch.uint8), 10)
    file.read(torch.zeros(100_000), 250_000)
    with caplog.at_level(logging.ERROR):
        del file
        gc.collect()
    assert "lost an error" in caplog.text
    assert (tmp_path / "file.bin").read_bytes()[10:] == b"\x07" * 300_000


def test_file_removed_while_it_is_open(engine, tmp_path):
    written(tmp_path / "file.bin", 100)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        (tmp_path / "file.bin").unlink()
        file.write_sync(torch.full((50_000,), 5, dtype=torch.uint8), 100)
        target = torch.zeros(50_000, dtype=torch.uint8)
        file.read_sync(target, 100)
    assert torch.equal(target, torch.full_like(target, 5))


class _Never:
    def wait(self, seconds: float) -> bool:
        return False

    def finish(self) -> None:
        raise AssertionError


def test_wait_with_a_timeout():
    token = Token(_Never(), "read of 8 bytes", "some/file", 8)
    with pytest.raises(AsyncFileError, match=r"under way after 0.01 s; wait again") as caught:
        token.wait(0.01)
    assert caught.value.errno == errno.ETIMEDOUT
    assert not token.done()


def test_error_survives_pickle():
    error = AsyncFileError(errno.EIO, "a/b", "read of 8 bytes failed", offset=12)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.errno, again.path, again.offset) == (str(error), 5, "a/b", 12)
    assert "see dmesg" in str(error)


@pytest.mark.parametrize(
    ("tensor", "offset", "message"),
    [
        (torch.zeros(4, 4).t(), 0, "not contiguous"),
        (torch.zeros(4, device="meta"), 0, "meta"),
        (torch.zeros(4).to_sparse(), 0, "sparse"),
        (torch.zeros(4, dtype=torch.complex64).conj(), 0, "resolve_conj"),
        ([1, 2], 0, "got list, expected torch.Tensor"),
        (torch.zeros(4), -1, "offset: got -1"),
        (torch.zeros(4), 1.5, "offset: got 1.5"),
        (torch.zeros(4), 2**63 - 8, "more than a file can hold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_arguments(engine, tmp_path, tensor, offset, message):
    with (
        AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file,
        pytest.raises(OpError, match=message),
    ):
        file.write(tensor, offset)


def test_refused_directions(engine, tmp_path):
    with (
        AsyncFile(tmp_path / "file.bin", "w", engine=engine) as file,
        pytest.raises(OpError, match='with "rw"'),
    ):
        file.read(torch.zeros(1))
    with AsyncFile(tmp_path / "file.bin", "r", engine=engine) as file:
        for call in (lambda: file.write(torch.zeros(1)), lambda: file.truncate(3)):
            with pytest.raises(OpError, match='with "rw"'):
                call()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queue_depth": 0}, "queue_depth: got 0"),
        ({"queue_depth": True}, "queue_depth: got True"),
        ({"block_bytes": 100}, "block_bytes: got 100"),
        ({"threads": 10_000}, "threads: got 10000"),
        ({"engine": "libaio"}, "engine: got 'libaio'"),
        ({"engine": "gds"}, "libcufile"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_settings(tmp_path, settings, message):
    with pytest.raises(OpError, match=message):
        AsyncFile(tmp_path / "file.bin", "rw", **settings)
    assert not (tmp_path / "file.bin").exists()


def test_settings_beside_a_shared_engine(engine, tmp_path):
    with pytest.raises(OpError, match="queue_depth: given by the shared engine"):
        AsyncFile(tmp_path / "file.bin", "rw", engine=engine, queue_depth=3)
    with pytest.raises(OpError, match=r"mode: got 'a'"):
        AsyncFile(tmp_path / "file.bin", "a", engine=engine)


def test_forked_child_is_refused(engine, tmp_path, monkeypatch):
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        with monkeypatch.context() as patch:
            patch.setattr(engine_module.os, "getpid", lambda: -1)
            with pytest.raises(OpError, match="forked child"):
                file.write(torch.zeros(1))
            with pytest.raises(OpError, match="forked child"):
                AsyncFile(tmp_path / "file.bin", "rw", engine=engine)
        file.write_sync(torch.zeros(1))
