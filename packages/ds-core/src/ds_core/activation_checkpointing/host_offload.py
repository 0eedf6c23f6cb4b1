"""Saved tensors in host memory: copied out while forward goes on, and back ahead of their use.

Copies in both directions are queued on one side stream per device, in the order of the blocks. It
waits for what computes a tensor; and before memory that a copy reads or writes is freed, the
stream that computes waits for the copy. So a buffer is never used by two at once, on the host or
on the device, and the processor waits for nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ds_core.accelerator import Accelerator
from ds_core.activation_checkpointing.buffer_pool import BufferPool
from ds_core.activation_checkpointing.layout import Layout
from ds_core.activation_checkpointing.unmoved import Unmoved, changed_in_place
from ds_core.errors import DsError

#: Tensors below this stay on the device: a copy would cost more than it frees.
MIN_BYTES = 1024

#: Blocks whose copies to the host may be under way, their inputs still on the device.
_MAX_LEAVING = 2


def needs_copies(device: torch.device) -> bool:
    """Whether tensors of a device are elsewhere than in host memory."""
    return device.type != "cpu"


@dataclass
class OffloadCounts:
    """What a `HostOffload` has done so far.

    Attributes:
        num_sent, sent_bytes: copied to the host.
        num_fetched, fetched_bytes: copied back.
        num_ahead: of those, how many before they were asked for.
        num_on_device: asked for while still on the device.
    """

    num_sent: int = 0
    sent_bytes: int = 0
    num_fetched: int = 0
    fetched_bytes: int = 0
    num_ahead: int = 0
    num_on_device: int = 0


class HostOffload:
    """Where the inputs of checkpointed blocks wait in (pinned) host memory for their backward.

    One object serves all blocks of a model: it knows their order, brings the inputs of the block
    before back while one is computed again, and uses its buffers from step to step. For tensors
    on a CPU it does nothing: they are in host memory.

    Args:
        min_bytes: smaller tensors stay on the device.
        keep_last: blocks, the newest ones, whose inputs stay: backward begins with them. Those of
            up to two blocks more are there while their copies are under way.
        max_free_buffers: host buffers that are kept for the next step.

    Attributes:
        counts: what it has done.
        buffers: its host memory.
    """

    def __init__(
        self, *, min_bytes: int = MIN_BYTES, keep_last: int = 1, max_free_buffers: int = 64
    ) -> None:
        settings = {
            "min_bytes": min_bytes,
            "keep_last": keep_last,
            "max_free_buffers": max_free_buffers,
        }
        for name, value in settings.items():
            if value < 0:
                raise DsError(f"HostOffload: {name}: got {value}, expected 0 or more")
        self._settings = settings
        self._min_bytes, self._keep_last = min_bytes, keep_last
        self.counts = OffloadCounts()
        self.buffers = BufferPool(_host_buffer, max_free_buffers)
        self._streams: dict[torch.device, torch.Stream | None] = {}
        self._known = WeakTensorKeyDictionary()
        self._block = _Block(None)
        self._staying: deque[_Block] = deque()
        self._leaving: deque[_Block] = deque()
        self._asking = self._ahead = _Block(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(HostOffload, **self._settings), ()

    def begin_block(self) -> None:
        """Say that what is packed from now on are the inputs of the next block."""
        if not self._block.saved:
            return
        self._block = _Block(self._block)
        while len(self._staying) >= max(self._keep_last, 1):
            self._send_block(self._staying.popleft())

    def pack(self, tensor: torch.Tensor) -> object:
        """What autograd shall keep in place of a tensor. Queues copies; waits for nothing."""
        layout = Layout.of(tensor) if needs_copies(tensor.device) else None
        if layout is None or layout.num_bytes < self._min_bytes:
            return Unmoved.of(tensor)
        saved = self._saved_before(tensor)
        if saved is None:
            saved = Saved(tensor, layout, self.buffers)
            if not tensor.requires_grad:
                self._known[tensor] = weakref.ref(saved)
        return self._ticket(saved)

    def pack_again(self, packed: object) -> object:
        """What to keep in place of a tensor that an earlier block packed, in the present one."""
        return self._ticket(packed.saved) if isinstance(packed, _Ticket) else packed

    def unpack(self, packed: object) -> torch.Tensor:
        """The tensor that `pack` was given, on its device.

        Raises DsError if it was changed in place meanwhile.
        """
        if isinstance(packed, Unmoved):
            return packed.checked()
        assert isinstance(packed, _Ticket)
        saved, block = packed
        previous = block.previous
        if self._ahead is not block and self._ahead is not previous:
            for guessed in self._ahead.living():
                guessed.forget_copy()
        self._bring([saved])
        if self._asking is not block:
            self._asking, self._ahead = block, previous or block
            self._bring(block.living())
            if previous is not None:
                self.counts.num_ahead += self._bring(previous.living())
        tensor = saved.on_device()
        if tensor is not None:
            self.counts.num_on_device += 1
            return tensor
        is_needed_again = previous is not None and any(s is saved for s in previous.living())
        return saved.arrived(keeps_copy=is_needed_again)

    def _ticket(self, saved: Saved) -> _Ticket:
        if not self._block.saved:
            self._staying.append(self._block)
        self._block.saved.append(weakref.ref(saved))
        if self._keep_last == 0:
            self._send(saved)
        return _Ticket(saved, self._block)

    def _saved_before(self, tensor: torch.Tensor) -> Saved | None:
        """A tensor that several blocks get, such as a mask, is copied once."""
        found = self._known.get(tensor)
        saved: Saved | None = None if found is None else found()
        return saved if saved is not None and saved.version == tensor._version else None

    # ------------------------------------------------------------------ to the host

    def _send_block(self, block: _Block) -> None:
        for saved in block.living():
            self._send(saved)
        self._leaving.append(block)
        while len(self._leaving) > _MAX_LEAVING:
            for saved in self._leaving.popleft().living():
                saved.leave()

    def _send(self, saved: Saved) -> None:
        tensor = saved.tensor
        if tensor is None or saved.host is not None or not saved.is_unchanged():
            return
        flat = saved.layout.flatten(tensor)
        stream = self._stream(saved.device)
        with _queued_on(stream):
            saved.host = self.buffers.take(saved.layout.num_bytes)
            _copy(saved.host.view(flat.dtype), flat)
            saved.sent = None if stream is None else stream.record_event()
        saved.source = flat
        self.counts.num_sent += 1
        self.counts.sent_bytes += saved.layout.num_bytes
        if stream is None:
            saved.leave()

    # ------------------------------------------------------------------ and back

    def _bring(self, wanted: Iterable[Saved]) -> int:
        """Queue copies to the device of those that are not there; returns how many."""
        fetched = 0
        for saved in wanted:
            if saved.tensor is None and saved.copy is None:
                self._fetch(saved)
                fetched += 1
        return fetched

    def _fetch(self, saved: Saved) -> None:
        assert saved.host is not None
        layout = saved.layout
        # Of the stream that computes, so that it can be freed like any other tensor.
        saved.copy = torch.empty(layout.numel, dtype=layout.dtype, device=saved.device)
        stream = self._stream(saved.device)
        with _queued_on(stream):
            _copy(saved.copy, saved.host.view(layout.dtype))
            saved.came = None if stream is None else stream.record_event()
        self.counts.num_fetched += 1
        self.counts.fetched_bytes += layout.num_bytes

    def _stream(self, device: torch.device) -> torch.Stream | None:
        if device not in self._streams:
            side = Accelerator(device.type)
            self._streams[device] = torch.Stream(device) if side.has_streams else None
        return self._streams[device]


@functools.cache
def shared_offload() -> HostOffload:
    """The one of this process for whoever gives no settings."""
    return HostOffload()


class Saved:
    """A tensor on its way to the host, there, or on its way back.

    Attributes:
        tensor: itself, as long as it is on the device.
        source: its elements, which a copy may still be reading.
        host: its bytes in host memory, from when the copy was queued.
        sent: when that copy is done.
        copy: its elements on the device again.
        came: when these are there.
        changed: whether it was changed in place before it had left.
    """

    def __init__(self, tensor: torch.Tensor, layout: Layout, buffers: BufferPool) -> None:
        self.tensor: torch.Tensor | None = tensor.detach()
        self.version, self.layout, self.device = tensor._version, layout, tensor.device
        self.source: torch.Tensor | None = None
        self.host: torch.Tensor | None = None
        self.copy: torch.Tensor | None = None
        self.sent: torch.Event | None = None
        self.came: torch.Event | None = None
        self.changed = False
        self._buffers = buffers

    def __del__(self) -> None:
        self.forget_copy()
        if self.host is not None:
            self._buffers.give(self.host)

    def is_unchanged(self) -> bool:
        """Whether nobody has written into the tensor while it was on the device."""
        self.changed |= self.tensor is not None and self.tensor._version != self.version
        return not self.changed

    def leave(self) -> None:
        """Free the tensor's memory on the device, for whatever is computed after the copy."""
        if self.host is None or self.tensor is None:
            return
        self.is_unchanged()
        _wait(self.sent, self.device)
        self.tensor = self.source = None

    def on_device(self) -> torch.Tensor | None:
        """The tensor if it has not left. Raises DsError if it was changed."""
        if not self.is_unchanged():
            raise changed_in_place(self.layout.shape)
        return self.tensor

    def arrived(self, *, keeps_copy: bool) -> torch.Tensor:
        """What was fetched, from now on its receiver's; with `keeps_copy`, a copy of it."""
        assert self.copy is not None
        _wait(self.came, self.device)
        if keeps_copy:
            return self.layout.restore(self.copy.clone())
        flat, self.copy, self.came = self.copy, None, None
        return self.layout.restore(flat)

    def forget_copy(self) -> None:
        """Free what was fetched for nothing."""
        if self.copy is not None:
            _wait(self.came, self.device)
            self.copy = self.came = None


class _Block:
    """The tensors that one block's call packed, in order."""

    def __init__(self, previous: _Block | None) -> None:
        self._previous = None if previous is None else weakref.ref(previous)
        self.saved: list[weakref.ref[Saved]] = []

    @property
    def previous(self) -> _Block | None:
        """The block called before, while its backward has not been."""
        return None if self._previous is None else self._previous()

    def living(self) -> list[Saved]:
        """Those whose backward is still to come."""
        return [saved for each in self.saved if (saved := each()) is not None]


class _Ticket(NamedTuple):
    saved: Saved
    block: _Block


def _host_buffer(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.accelerator.is_available())


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Queue a copy on the current stream, if there are streams."""
    target.copy_(source, non_blocking=True)


def _queued_on(stream: torch.Stream | None) -> Any:
    """What is done inside is queued on `stream`, after all that is queued for computing."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.accelerator.current_stream(stream.device))
    return stream


def _wait(event: torch.Event | None, device: torch.device) -> None:
    """Have what is computed from now on begin after `event`."""
    if event is not None:
        torch.accelerator.current_stream(device).wait_event(event)
