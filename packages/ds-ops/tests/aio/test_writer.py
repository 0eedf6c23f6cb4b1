"""FastFileWriter: what torch.save, zipfile and plain writes leave in the file."""

from __future__ import annotations

import errno
import random
import zipfile

import pytest
import torch

from ds_core.errors import OpError
from ds_ops import FastFileWriter
from ds_ops.aio import AsyncFileError


def test_torch_save_of_model_and_optimizer_loads_bit_equal(engine, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 500), torch.nn.Linear(500, 7)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 300).bfloat16()).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}
    with FastFileWriter(tmp_path / "fast.pt", engine=engine, buffer_bytes=50_000) as file:
        torch.save(state, file)
    torch.save(state, tmp_path / "plain.pt")
    with open(tmp_path / "file.pt", "wb") as plain:
        torch.save(state, plain)
    # torch names the archive after the path, and after nothing for a file object.
    assert (tmp_path / "fast.pt").read_bytes() == (tmp_path / "file.pt").read_bytes()
    found, expected = (torch.load(tmp_path / name) for name in ("fast.pt", "plain.pt"))
    assert found["step"] == 3
    for name, tensor in expected["model"].items():
        assert torch.equal(found["model"][name], tensor)
    for number, moments in expected["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(found["optimizer"]["state"][number][name], tensor)


def test_old_format_of_torch_save(engine, tmp_path):
    with FastFileWriter(tmp_path / "old.pt", engine=engine) as file:
        torch.save({"x": torch.arange(9)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(torch.load(tmp_path / "old.pt")["x"], torch.arange(9))


def test_zipfile_which_seeks_back(engine, tmp_path):
    texts = {f"member{i}": bytes([i]) * (i * 5000) for i in range(12)}
    with (
        FastFileWriter(tmp_path / "file.zip", engine=engine, buffer_bytes=8192) as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for name, text in texts.items():
            archive.writestr(name, text)
    with zipfile.ZipFile(tmp_path / "file.zip") as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == texts


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_writes_seeks_and_flushes_like_a_file(engine, tmp_path, buffers):
    chance = random.Random(buffers)
    with (
        FastFileWriter(
            tmp_path / "ours.bin", engine=engine, buffer_bytes=10_000, buffers=buffers
        ) as ours,
        open(tmp_path / "plain.bin", "wb") as plain,
    ):
        for _ in range(300):
            what = chance.random()
            if what < 0.8:
                data = chance.randbytes(chance.choice([0, 1, 5, 4096, 20_000]))
                assert ours.write(data) == plain.write(data)
            elif what < 0.9:
                place = chance.randrange(plain.tell() + 9000)
                assert ours.seek(place) == plain.seek(place)
            elif what < 0.95:
                assert ours.seek(0, 2) == plain.seek(0, 2)
            else:
                ours.flush()
            assert ours.tell() == plain.tell()
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()


def test_any_bytes_like_object(tmp_path):
    with FastFileWriter(tmp_path / "file.bin", fsync=True) as file:
        file.write(bytearray(b"ab"))
        file.write(memoryview(b"xcdx")[1:3])
        file.write(torch.tensor([0.5, 2.0]).numpy())
        file.writelines([b"e", b"f"])
    expected = b"abcd" + bytes(torch.tensor([0.5, 2.0]).view(torch.uint8).numpy()) + b"ef"
    assert (tmp_path / "file.bin").read_bytes() == expected


def test_file_is_as_long_as_what_was_written(tmp_path):
    path = tmp_path / "file.bin"
    with FastFileWriter(path, buffer_bytes=4096) as file:
        file.write(bytes(9_000))
        assert path.stat().st_size > 9_000  # lengthened ahead
    assert path.stat().st_size == 9_000
    with FastFileWriter(path) as file:
        file.write(bytes(100))
        file.truncate(50)
        file.seek(60)
    assert path.stat().st_size == 50
    with FastFileWriter(path):
        pass
    assert path.stat().st_size == 0


def test_closed_and_refused(tmp_path):
    file = FastFileWriter(tmp_path / "file.bin")
    assert file.writable()
    assert file.seekable()
    assert not file.readable()
    assert (file.name, file.mode) == (str(tmp_path / "file.bin"), "wb")
    with pytest.raises(OpError, match="no such place"):
        file.seek(-1)
    with pytest.raises(OSError, match="descriptor"):
        file.fileno()
    file.close()
    file.close()
    for call in (lambda: file.write(b"x"), file.tell, lambda: file.seek(0)):
        with pytest.raises(AsyncFileError, match="is closed"):
            call()
    with pytest.raises(OpError, match="expected at least 1"):
        FastFileWriter(tmp_path / "file.bin", buffers=0)
    with pytest.raises(AsyncFileError, match="ENOENT"):
        FastFileWriter(tmp_path / "none" / "file.bin")


def test_error_of_the_block_comes_first():
    file = FastFileWriter("/dev/full")

    def block() -> None:
        with file:
            file.write(b"abc")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        block()
    assert "ENOSPC" in caught.value.__notes__[0]
    assert file.closed


def test_what_failed_is_not_written_over_what_follows(tmp_path, monkeypatch):
    class Failing:
        def wait(self) -> int:
            raise AsyncFileError(errno.EIO, "file.bin", "write failed")

    with FastFileWriter(tmp_path / "file.bin", buffer_bytes=4096, buffers=1) as file:
        places = []

        def write(part, offset):
            places.append(offset)
            return Failing()

        monkeypatch.setattr(file.file, "write", write)
        for _ in range(2):
            with pytest.raises(AsyncFileError, match="EIO"):
                file.write(bytes(4096))
        assert places == [0, 4096]
