"""What every `TensorFiles` must do: move bytes exactly, or say where and why not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_core.errors import DsError
from ds_core.seams import TensorFiles
from ds_core.testing.faults import file_size_limit

Factory = Callable[[], TensorFiles]

#: Sizes of transfers: aligned or not, of several pieces, one byte, none.
_SIZES = (0, 1, 4095, 4096, 70_001, 1 << 20)


class TensorFilesContract:
    """Inherit to test an engine. `factory()` returns the `TensorFiles`.

    Its files raise `OSError`s that are also `DsError`s, with `errno`, and the path in the message.
    """

    factory: Callable[..., Any]

    @pytest.fixture
    def files(self) -> Iterator[TensorFiles]:
        """The engine, closed afterwards."""
        found: TensorFiles = type(self).factory()
        yield found
        found.close()

    @pytest.fixture
    def place(self, tmp_path: Path) -> str:
        """Path of a file that does not exist."""
        return str(tmp_path / "tensors.bin")

    def test_it_has_every_member_of_the_protocol(self, files: TensorFiles, place: str) -> None:
        assert isinstance(files, TensorFiles)
        file = files.open(place)
        assert file.why_buffered is None or file.why_buffered
        file.close()

    @pytest.mark.parametrize("size", _SIZES)
    @pytest.mark.parametrize("offset", [0, 4096, 1001])
    def test_what_was_written_is_read(
        self, files: TensorFiles, place: str, size: int, offset: int
    ) -> None:
        file, data = files.open(place), files.empty(size)
        assert data.numel() == size
        data.copy_(_pattern(size))
        assert file.write(data, offset).wait() == size
        target = files.empty(size).zero_()
        assert file.read(target, offset).wait() == size
        assert torch.equal(target, data)
        file.close()
        assert Path(place).read_bytes()[offset:] == bytes(_pattern(size).tolist())

    def test_tensors_of_any_format_keep_their_bits(self, files: TensorFiles, place: str) -> None:
        file = files.open(place)
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
            data = torch.randn(3, 67).to(dtype)
            file.write(data, 512).wait()
            target = torch.zeros_like(data)
            file.read(target, 512).wait()
            assert torch.equal(target, data)
        file.close()

    def test_many_at_once_do_not_mix(self, files: TensorFiles, place: str) -> None:
        file, parts = files.open(place), [_pattern(50_000, salt) for salt in range(12)]
        pending = [file.write(part, 65536 * at) for at, part in enumerate(parts)]
        for transfer in pending:
            transfer.wait()
            assert transfer.done()
        targets = [torch.zeros_like(part) for part in parts]
        reads = [file.read(target, 65536 * at) for at, target in enumerate(targets)]
        for transfer in reversed(reads):
            transfer.wait()
        assert all(torch.equal(a, b) for a, b in zip(targets, parts, strict=True))
        file.close()

    def test_opening_keeps_what_a_file_holds(self, files: TensorFiles, place: str) -> None:
        Path(place).write_bytes(b"kept")
        file, target = files.open(place), torch.zeros(4, dtype=torch.uint8)
        file.read(target).wait()
        file.close()
        assert bytes(target.tolist()) == b"kept"

    def test_preallocating_makes_a_file_that_long_and_never_shorter(
        self, files: TensorFiles, place: str
    ) -> None:
        file = files.open(place)
        file.preallocate(100_000)
        assert os.path.getsize(place) == 100_000
        file.preallocate(5)
        assert os.path.getsize(place) == 100_000
        file.close()

    def test_a_file_without_a_name_works_on(self, files: TensorFiles, place: str) -> None:
        file, data = files.open(place), _pattern(9000)
        os.unlink(place)
        file.write(data).wait()
        target = torch.zeros_like(data)
        file.read(target).wait()
        assert torch.equal(target, data)
        file.close()
        assert not os.path.exists(place)

    @pytest.mark.parametrize("present", [0, 100, 4096, 10_000])
    def test_a_short_file_is_an_error(self, files: TensorFiles, place: str, present: int) -> None:
        Path(place).write_bytes(bytes(present))
        file = files.open(place)
        with pytest.raises(OSError, match=os.path.basename(place)) as caught:
            file.read(torch.zeros(20_000, dtype=torch.uint8)).wait()
        file.close()
        assert isinstance(caught.value, DsError)
        assert caught.value.errno == errno.ENODATA
        assert str(present) in str(caught.value)

    def test_a_file_cut_while_it_is_open_is_an_error(self, files: TensorFiles, place: str) -> None:
        file = files.open(place)
        file.write(_pattern(30_000)).wait()
        os.truncate(place, 12_345)
        with pytest.raises(OSError, match=r"12345|17655"):
            file.read(torch.zeros(30_000, dtype=torch.uint8)).wait()
        file.close()

    def test_a_full_disk_is_an_error(self, files: TensorFiles, place: str) -> None:
        file = files.open(place)
        with file_size_limit(60_001):
            with pytest.raises(OSError, match=os.path.basename(place)) as caught:
                file.write(torch.ones(100_000, dtype=torch.uint8)).wait()
            assert isinstance(caught.value, DsError)
            with pytest.raises(OSError, match="99999"):
                file.preallocate(99_999)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        # The engine and the file work on.
        file.write(_pattern(70_000)).wait()
        file.close()

    def test_a_device_without_room_is_an_error(self, files: TensorFiles) -> None:
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        file = files.open("/dev/full")
        with pytest.raises(OSError, match="/dev/full") as caught:
            file.write(_pattern(8192), 4096).wait()
        assert caught.value.errno == errno.ENOSPC
        file.close()

    def test_a_folder_that_is_missing_is_an_error(self, files: TensorFiles, place: str) -> None:
        with pytest.raises(OSError, match="none") as caught:
            files.open(os.path.join(os.path.dirname(place), "none", "x.bin"))
        assert isinstance(caught.value, DsError)
        assert caught.value.errno == errno.ENOENT

    def test_closing_waits_for_what_is_under_way(self, files: TensorFiles, place: str) -> None:
        file, data = files.open(place), _pattern(3 << 20)
        file.write(data)
        file.close()
        assert Path(place).read_bytes() == bytes(data.numpy())


def _pattern(size: int, salt: int = 0) -> torch.Tensor:
    return ((torch.arange(size) * 7 + salt) % 251).to(torch.uint8)
