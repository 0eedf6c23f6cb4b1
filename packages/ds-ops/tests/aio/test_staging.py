"""Tensors of a device: the way through pinned buffers, with a device that is faked."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from ds_ops.aio import AsyncFile, AsyncFileError, Token, aligned_empty, staging
from ds_ops.aio.staging import Stage


class SlowDevice:
    """Copies that happen some time after they were begun, as those of a GPU do."""

    def __init__(self, device: object) -> None:
        self.log: list[str] = []

    def empty(self, size: int) -> torch.Tensor:
        return aligned_empty(size)

    def begin(self) -> str:
        self.log.append("begin")
        return "mark"

    def follow(self, mark: Any) -> None:
        assert mark == "mark"
        self.log.append("follow")

    def to_host(self, host: torch.Tensor, device: torch.Tensor) -> None:
        host.copy_(device)

    def to_device(self, device: torch.Tensor, host: torch.Tensor) -> threading.Thread:
        def copy() -> None:
            time.sleep(0.002)
            device.copy_(host)

        thread = threading.Thread(target=copy)
        thread.start()
        return thread

    def wait(self, mark: threading.Thread) -> None:
        mark.join()

    def join(self, mark: threading.Thread) -> None:
        self.log.append("join")
        mark.join()


class BrokenDevice(SlowDevice):
    def to_host(self, host: torch.Tensor, device: torch.Tensor) -> None:
        raise RuntimeError("the device fell off the bus")


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", 16_384)


def moved(stage: Stage, file: AsyncFile, verb: Any, tensor: torch.Tensor, offset: int) -> int:
    transfer = stage.begin_on(file._channel)(verb, tensor, offset)
    return Token(transfer, verb, file.path, tensor.nbytes).wait()


@pytest.mark.parametrize("offset", [0, 4096, 4097])
@pytest.mark.parametrize("count", [0, 1, 4096, 50_001])
def test_tensors_go_to_the_file_and_back(engine, tmp_path, offset, count):
    stage = Stage(engine, "fake", SlowDevice)
    data = torch.randn(count)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        assert moved(stage, file, "write", data, offset) == data.nbytes
        found = torch.zeros(count)
        moved(stage, file, "read", found, offset)
        log = stage._copies.log
        stage.close()
    assert torch.equal(found, data)
    assert log[:2] == ["begin", "follow"]
    assert log[-1] == ("join" if count else "follow")
    assert (tmp_path / "file.bin").read_bytes()[offset:] == bytes(data.view(torch.uint8).numpy())


def test_short_file_and_broken_device(engine, tmp_path):
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        file.write_sync(torch.zeros(40_000, dtype=torch.uint8))
        stage = Stage(engine, "fake", SlowDevice)
        with pytest.raises(AsyncFileError, match="found only"):
            moved(stage, file, "read", torch.zeros(200_000, dtype=torch.uint8), 5)
        found = torch.ones(30_000, dtype=torch.uint8)
        moved(stage, file, "read", found, 5)  # its buffers are free again
        assert not found.any()
        stage.close()
        broken = Stage(engine, "fake", BrokenDevice)
        with pytest.raises(AsyncFileError, match="fell off the bus"):
            moved(broken, file, "write", found, 0)
        broken.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_tensors_of_an_accelerator(engine, tmp_path):
    device = torch.accelerator.current_accelerator()
    data = torch.randn(10_000_019, device=device)
    with AsyncFile(tmp_path / "file.bin", "rw", engine=engine) as file:
        file.write(data * 2, 3)  # the product is kept alive, and waited for
        file.wait_all()
        found = torch.zeros_like(data)
        file.read(found, 3).wait()
        assert torch.equal(found, data * 2)
