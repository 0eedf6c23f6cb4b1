"""Between device and host: gradients one way, updated weights the other, beside the program."""

from __future__ import annotations

import torch

from ds_core import accelerator


class SideStream:
    """Copies between the device and page-locked host memory, in order, beside its computation.

    On a CPU copies are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = None if device.type == "cpu" else accelerator.current().stream()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copied:
        """Begin to copy what `source` will hold once the work queued so far is done."""
        if self._stream is None:
            target.copy_(source)
            return Copied(None)
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            target.copy_(source, non_blocking=True)
        for tensor in (target, source):
            if tensor.device.type != "cpu":
                # Or its memory could be given to others before the copy is done.
                tensor.record_stream(self._stream)
        return Copied(self._stream.record_event())


class Copied:
    """A copy that was begun."""

    def __init__(self, event: torch.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """Wait on the host until it is done."""
        if self._event is not None:
            self._event.synchronize()

    def join(self) -> None:
        """Let the device's work queued from now on wait for it."""
        if self._event is not None:
            self._event.wait(torch.accelerator.current_stream())


def host_empty(numel: int, dtype: torch.dtype, *, pin: bool) -> torch.Tensor:
    """`[numel]` in host memory, page-locked where there is an accelerator to copy from it."""
    pinned = pin and torch.accelerator.is_available()
    return torch.empty(numel, dtype=dtype, pin_memory=pinned)


class Crossing:
    """The host's side of one unit whose optimizer states are not on its device.

    Args:
        numel: of the shard.
        grad_dtype: in which gradients accumulate.
        side: makes the copies; shared by all units, so that they keep their order.
        pin: whether host memory is page-locked.
    """

    def __init__(self, numel: int, grad_dtype: torch.dtype, side: SideStream, *, pin: bool) -> None:
        self._side, self._pin = side, pin
        #: The averaged gradient, once `settle` has been called.
        self.gradient = host_empty(numel, grad_dtype, pin=pin)
        self._arriving: Copied | None = None
        # What must be added to the gradient once it is here.
        self._addend: torch.Tensor | None = None
        self._adds = False

    @property
    def addend_bytes(self) -> int:
        """Bytes of what accumulation needs beside the gradient."""
        return 0 if self._addend is None else self._addend.nbytes

    def send_gradient(self, source: torch.Tensor, *, accumulate: bool) -> None:
        """Begin to bring a gradient to the host, to be added to the present one or to replace it.

        `source` may be freed once this returns.
        """
        self.settle()
        target = self.gradient
        if accumulate:
            if self._addend is None:
                numel, dtype = self.gradient.numel(), self.gradient.dtype
                self._addend = host_empty(numel, dtype, pin=self._pin)
            target = self._addend
        self._adds = accumulate
        self._arriving = self._side.copy(target, source)

    def settle(self) -> None:
        """Wait until the gradient is here."""
        if self._arriving is None:
            return
        self._arriving.wait()
        self._arriving = None
        if self._adds:
            assert self._addend is not None
            self.gradient.add_(self._addend)

    def send_weights(self, shard: torch.Tensor, source: torch.Tensor) -> None:
        """Give the shard on the device its new values; what is queued there next sees them."""
        self._side.copy(shard, source).join()
