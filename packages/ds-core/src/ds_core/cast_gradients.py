"""Gradients that travel in another number format than the one they are kept in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_core import comm
from ds_core.seams.transport import Transport


class CastGradients:
    """A `Transport` that reduces gradients in `dtype`, and leaves parameters as they are.

    A sum of N gradients in a 16-bit format is rounded at most N times, to 8 bits in bf16 and 11 in
    fp16; on gloo a reduce-scatter adds in fp32 and rounds only what it sends. Bytes change with
    the size of the elements.

    Args:
        inner: carries what was cast.
        dtype: of gradients on their way.
    """

    def __init__(self, inner: Transport, dtype: torch.dtype) -> None:
        self._inner, self._dtype = inner, dtype

    def all_gather(
        self, out: torch.Tensor, shard: torch.Tensor, group: comm.Group, *, caller: str
    ) -> comm.Pending:
        """Parameters: as they are."""
        return self._inner.all_gather(out, shard, group, caller=caller)

    def reduce_scatter(
        self,
        out: torch.Tensor,
        full: torch.Tensor,
        group: comm.Group,
        *,
        accumulate: bool,
        caller: str,
    ) -> comm.Pending:
        """The sum of what every rank's `full` is in `dtype`."""
        sent = self._cast(full, group)
        return self._inner.reduce_scatter(out, sent, group, accumulate=accumulate, caller=caller)

    def all_reduce(self, tensor: torch.Tensor, group: comm.Group, *, caller: str) -> comm.Pending:
        """The sum of what every rank's `tensor` is in `dtype`, rounded to it."""
        sent = self._cast(tensor, group)
        pending = self._inner.all_reduce(sent, group, caller=caller)
        if sent is tensor:
            return pending
        return _Then(pending, lambda: tensor.copy_(sent))

    def _cast(self, tensor: torch.Tensor, group: comm.Group) -> torch.Tensor:
        """`tensor` in the format of the wire, if there is a wire."""
        return tensor if group.size == 1 else tensor.to(self._dtype)


class _Then(comm.Pending):
    """A pending collective with something to do when it is complete."""

    __slots__ = ("_after", "_inner")

    def __init__(self, inner: comm.Pending, after: Callable[[], object]) -> None:
        self._inner = inner
        self._after: Callable[[], object] | None = after

    def is_complete(self) -> bool:
        return self._inner.is_complete()

    def wait(self) -> None:
        self._inner.wait()
        after, self._after = self._after, None
        if after is not None:
            after()
