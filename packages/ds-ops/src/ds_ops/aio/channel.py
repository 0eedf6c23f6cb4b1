"""One open file on one engine: where requests for plain memory begin and end."""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from ds_ops.aio.engine import AsyncIO
from ds_ops.aio.errors import AsyncFileError
from ds_ops.aio.opening import Opened

logger = logging.getLogger(__name__)

Verb = Literal["read", "write"]


@dataclass(frozen=True)
class Channel:
    """What requests need of a file: it outlives an AsyncFile dropped with some under way."""

    path: str
    opened: Opened
    engine: AsyncIO

    def begin(self, verb: Verb, tensor: torch.Tensor, offset: int) -> CpuTransfer:
        """Begin to read or write a CPU tensor."""
        opened = self.opened
        target = (opened.direct, opened.buffered, opened.alignment, opened.memory_alignment)
        writes = verb == "write"
        request = self.engine.submit(target, writes, tensor.data_ptr(), tensor.nbytes, offset)
        return CpuTransfer(self, request, verb, tensor, offset)

    def outcome(self, request: int, verb: Verb, size: int, offset: int) -> AsyncFileError | None:
        """Why a request that is done failed, or None; its handle is void then."""
        ended = self.engine.finish(request)
        if ended.direct_refused and self.opened.refusal is None:
            self.opened.refusal = "the file system refused a direct transfer (EINVAL)"
            logger.warning("%s: %s: using the page cache", self.path, self.opened.refusal)
        if ended.error:
            what = f"{verb} of {size} bytes at {offset} failed"
            return AsyncFileError(ended.error, self.path, what, offset=ended.error_offset)
        if ended.end_of_file >= 0:
            found = max(0, ended.end_of_file - offset)
            what = f"read of {size} bytes found only {found}"
            return AsyncFileError(errno.ENODATA, self.path, what, offset=offset)
        return None


class CpuTransfer:
    """A request for the memory of a CPU tensor, which it keeps alive."""

    def __init__(
        self, channel: Channel, request: int, verb: Verb, tensor: torch.Tensor, offset: int
    ) -> None:
        self._channel, self._request, self._verb = channel, request, verb
        self._tensor, self._offset = tensor, offset

    def wait(self, seconds: float) -> bool:
        """Whether it is done, after waiting up to so long."""
        return self._channel.engine.wait(self._request, seconds)

    def finish(self) -> AsyncFileError | None:
        """Why it failed, or None."""
        size = self._tensor.nbytes
        return self._channel.outcome(self._request, self._verb, size, self._offset)
