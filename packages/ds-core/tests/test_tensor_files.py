"""The engines behind the seam `ds_core.tensor_files` pass its contract."""

from __future__ import annotations

import errno

import pytest
import torch

from ds_core import plugins, tensor_files
from ds_core.errors import TensorFileError
from ds_core.tensor_files import ThreadedFiles, open_tensor_files
from ds_core.testing import file_size_limit
from ds_core.testing.contracts import TensorFilesContract


class TestThreadedFiles(TensorFilesContract):
    factory = staticmethod(ThreadedFiles)


@pytest.mark.skipif(
    not plugins.registered("tensor_files"), reason="no installed package registers an engine"
)
class TestInstalledFiles(TensorFilesContract):
    factory = staticmethod(open_tensor_files)


def test_without_a_package_threads_do_it(monkeypatch):
    monkeypatch.setattr(plugins, "registered", lambda seam: {})
    files = open_tensor_files()
    assert isinstance(files, ThreadedFiles)
    assert "threads" in files.name
    files.close()


def test_errors_name_path_offset_and_what_was_missing(tmp_path):
    files = ThreadedFiles()
    path = str(tmp_path / "x.bin")
    file = files.open(path)
    assert "pip install ds-ops" in file.why_buffered
    file.write(torch.ones(100, dtype=torch.uint8)).wait()
    with pytest.raises(TensorFileError, match="ends at byte 100, where 30 more") as caught:
        file.read(torch.zeros(80, dtype=torch.uint8), 50).wait()
    assert (caught.value.errno, caught.value.filename) == (errno.ENODATA, path)
    with file_size_limit(2000), pytest.raises(TensorFileError, match=r"pwritev of .* at 2000"):
        file.write(torch.ones(5000, dtype=torch.uint8)).wait()
    file.close()
    files.close()


def test_a_large_transfer_is_several_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_CALL_BYTES", 1000)
    files = ThreadedFiles()
    file = files.open(str(tmp_path / "x.bin"))
    data = torch.arange(7003) % 251
    file.write(data.to(torch.uint8)).wait()
    target = torch.zeros(7003, dtype=torch.uint8)
    assert file.read(target).wait() == 7003
    assert torch.equal(target, data.to(torch.uint8))
    file.close()
    files.close()
