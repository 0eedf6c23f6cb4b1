"""Tensors as runs of bytes."""

from __future__ import annotations

import torch

from ds_core.errors import OpError


def check_tensor(call: str, tensor: torch.Tensor) -> None:
    """Raise OpError unless the tensor is one run of bytes in memory."""
    if not isinstance(tensor, torch.Tensor):
        raise OpError(f"{call}: tensor: got {type(tensor).__name__}, expected torch.Tensor")
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else tensor.layout
        raise OpError(f"{call}: tensor: it is {kind}, expected a dense tensor with memory")
    if not tensor.is_contiguous():
        raise OpError(
            f"{call}: tensor: not contiguous (shape {list(tensor.shape)}, strides "
            f"{list(tensor.stride())}); give .contiguous(), and copy it back after a read"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise OpError(
            f"{call}: tensor: a lazy conjugate or negative; give .resolve_conj().resolve_neg()"
        )


def check_offset(call: str, offset: int) -> None:
    """Raise OpError unless it is a place in a file."""
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise OpError(f"{call}: offset: got {offset!r}, expected an integer of at least 0")


def mark_written(tensor: torch.Tensor) -> None:
    """Let autograd know that the tensor's values change."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as uint8 [nbytes], on its device."""
    return tensor.detach().reshape(-1).view(torch.uint8)
