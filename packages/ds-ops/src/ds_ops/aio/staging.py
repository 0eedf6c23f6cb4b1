"""Tensors on a device: through pinned buffers, piece by piece, copies and disk overlapping."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple, Protocol

import torch

from ds_ops.aio.channel import Channel, CpuTransfer, Verb
from ds_ops.aio.engine import AsyncIO
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.tensors import as_bytes

#: Pinned memory per device and engine: so many buffers of so many bytes.
BUFFERS, BUFFER_BYTES = 4, 8 << 20


class Copies(Protocol):
    """Copies between a device and pinned memory; tests put a fake in its place."""

    def empty(self, size: int) -> torch.Tensor:
        """Host memory, uint8 [size], that the device copies to and from."""
        ...

    def begin(self) -> Any:
        """A mark behind what the caller's stream has been given so far."""
        ...

    def follow(self, mark: Any) -> None:
        """Let all copies from now on happen behind the mark."""
        ...

    def to_host(self, host: torch.Tensor, device: torch.Tensor) -> None:
        """Copy, and return when the bytes are there."""
        ...

    def to_device(self, device: torch.Tensor, host: torch.Tensor) -> Any:
        """Begin to copy; a mark behind it."""
        ...

    def wait(self, mark: Any) -> None:
        """Return when what is before the mark is over: the host memory is free."""
        ...

    def join(self, mark: Any) -> None:
        """Let the caller's stream go on behind the mark."""
        ...


class AcceleratorCopies:
    """Copies by a stream of their own on torch's accelerator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device)

    def empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> Any:
        return torch.accelerator.current_stream(self._device).record_event()

    def follow(self, mark: Any) -> None:
        self._stream.wait_event(mark)

    def to_host(self, host: torch.Tensor, device: torch.Tensor) -> None:
        with self._stream:
            host.copy_(device, non_blocking=True)
        self._stream.synchronize()

    def to_device(self, device: torch.Tensor, host: torch.Tensor) -> Any:
        with self._stream:
            device.copy_(host, non_blocking=True)
        return self._stream.record_event()

    def wait(self, mark: Any) -> None:
        mark.synchronize()

    def join(self, mark: Any) -> None:
        torch.accelerator.current_stream(self._device).wait_event(mark)


class _Part(NamedTuple):
    """A run of the tensor's bytes in flight between file and buffer."""

    begin: int
    end: int
    buffer: torch.Tensor
    host: torch.Tensor
    transfer: CpuTransfer


class Stage:
    """The pinned buffers of one engine for one device, and the thread that fills and empties them.

    Transfers happen in the order in which they were begun; each keeps up to BUFFERS buffers busy.

    Args:
        engine: moves bytes between buffers and files.
        device: of the tensors.
        copies: how bytes get there and back.
    """

    def __init__(
        self, engine: AsyncIO, device: Any, copies: Callable[[Any], Copies] = AcceleratorCopies
    ) -> None:
        self._copies = copies(device)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="ds-aio-stage")
        self._buffers: list[torch.Tensor] = []
        self._room = max(BUFFER_BYTES, engine.block_bytes)

    def begin_on(self, channel: Channel) -> Callable[[Verb, torch.Tensor, int], StagedTransfer]:
        """What begins a transfer of a tensor of the device to or from that file."""

        def begin(verb: Verb, tensor: torch.Tensor, offset: int) -> StagedTransfer:
            mark = self._copies.begin()
            move = self._write if verb == "write" else self._read
            future = self._threads.submit(move, channel, as_bytes(tensor), offset, mark)
            return StagedTransfer(self._copies, future, tensor, channel.path)

        return begin

    def close(self) -> None:
        """Finish what was begun and let go of the buffers."""
        self._threads.shutdown()
        self._buffers.clear()

    def _write(self, channel: Channel, data: torch.Tensor, offset: int, mark: Any) -> _Ended:
        self._copies.follow(mark)
        free = self._free()
        parts: deque[_Part] = deque()
        error: AsyncFileError | None = None
        try:
            for begin, end, shift in self._runs(channel, data.numel(), offset):
                if not free:
                    error = self._finish(parts, free)
                if error is not None:
                    break
                buffer = free.pop()
                host = buffer[shift : shift + end - begin]
                self._copies.to_host(host, data[begin:end])
                transfer = channel.begin("write", host, offset + begin)
                parts.append(_Part(begin, end, buffer, host, transfer))
        finally:
            while parts:
                error = self._finish(parts, free) or error
        return _Ended(error, None)

    def _read(self, channel: Channel, data: torch.Tensor, offset: int, mark: Any) -> _Ended:
        self._copies.follow(mark)
        free = self._free()
        busy: deque[tuple[Any, torch.Tensor]] = deque()  # buffers that the device copies from
        parts: deque[_Part] = deque()
        runs = self._runs(channel, data.numel(), offset)
        error: AsyncFileError | None = None
        last: Any = None
        try:
            while True:
                while free and error is None and (run := next(runs, None)) is not None:
                    begin, end, shift = run
                    buffer = free.pop()
                    host = buffer[shift : shift + end - begin]
                    transfer = channel.begin("read", host, offset + begin)
                    parts.append(_Part(begin, end, buffer, host, transfer))
                if not parts:
                    break
                part = parts[0]
                error = self._finish(parts, []) or error
                if error is None:
                    last = self._copies.to_device(data[part.begin : part.end], part.host)
                    busy.append((last, part.buffer))
                # The oldest copy runs while the disk fills the other buffers.
                while len(busy) > (BUFFERS // 2 if parts else 0):
                    done, buffer = busy.popleft()
                    self._copies.wait(done)
                    free.append(buffer)
        finally:
            while parts:
                self._finish(parts, [])
        return _Ended(error, last)

    def _free(self) -> list[torch.Tensor]:
        if not self._buffers:
            self._buffers = [self._copies.empty(self._room) for _ in range(BUFFERS)]
        return list(self._buffers)

    def _runs(self, channel: Channel, size: int, offset: int) -> Iterator[tuple[int, int, int]]:
        """Begin and end of each part of the tensor, and where in its buffer it goes.

        Parts end at aligned offsets, and lie in the buffers as in the file, so that all but the
        ends of the whole go directly.
        """
        align = channel.opened.alignment
        step = self._room // align * align
        begin = 0
        while begin < size:
            at = offset + begin
            end = min(size, begin + step - at % align)
            yield begin, end, at % align
            begin = end

    @staticmethod
    def _finish(parts: deque[_Part], free: list[torch.Tensor]) -> AsyncFileError | None:
        """Wait for the oldest part; its buffer is free then."""
        part = parts.popleft()
        while not part.transfer.wait(1.0):
            pass
        free.append(part.buffer)
        return part.transfer.finish()


class _Ended(NamedTuple):
    """How a staged transfer ended: the error, and the mark behind its last copy to the device."""

    error: AsyncFileError | None
    last: Any


class StagedTransfer:
    """A transfer by a Stage; it keeps the tensor alive."""

    def __init__(
        self, copies: Copies, future: Future[_Ended], tensor: torch.Tensor, path: str
    ) -> None:
        self._copies, self._future, self._tensor = copies, future, tensor
        self._path = path

    def wait(self, seconds: float) -> bool:
        """Whether it is done, after waiting up to so long."""
        if not self._future.done() and seconds > 0:
            wait_for([self._future], timeout=seconds)
        return self._future.done()

    def finish(self) -> AsyncFileError | None:
        """Why it failed, or None; what the current stream does next sees the tensor filled."""
        try:
            ended = self._future.result()
        except Exception as failure:
            what = f"copying between {self._tensor.device} and pinned memory failed: {failure}"
            return AsyncFileError(errno.EIO, self._path, what, remedy="see the device's own error")
        if ended.last is not None:
            self._copies.join(ended.last)
        return ended.error
