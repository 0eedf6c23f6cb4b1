"""The persistent buffers of a module: what a checkpoint holds beside parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def persistent_buffers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(qualified name, buffer) of every buffer that `state_dict` would hold: no copies."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from persistent_buffers(child, f"{prefix}{name}.")
