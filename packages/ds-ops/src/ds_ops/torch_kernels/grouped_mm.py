"""grouped_mm by torch's own, where its rules allow: rows of a multiple of 16 bytes."""

from __future__ import annotations

import torch
from torch.nn import functional

from ds_core.ops.grouped_mm import NAME, check, check_backward, ends


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm.reference`."""
    check(a, b, offsets)
    stops = ends(NAME, offsets, len(a))
    if _suits(a) and _suits(b) and a.numel() and b.shape[2]:
        out = functional.grouped_mm(a, b, offs=offsets)
    else:
        out = a.new_empty(len(a), b.shape[2])
        for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
            torch.mm(a[begin:end], b[expert], out=out[begin:end])
    out[stops[-1] :] = 0  # which torch leaves as memory was
    return out


def grouped_mm_backward(a: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm.backward_reference`."""
    check_backward(a, grad, offsets)
    stops = ends(NAME, offsets, len(a))
    turned = a.t()
    if _suits(turned) and _suits(grad) and a.numel() and grad.numel():
        return functional.grouped_mm(turned, grad, offs=offsets)
    out = a.new_empty(len(offsets), a.shape[1], grad.shape[1])
    for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        torch.mm(turned[:, begin:end], grad[begin:end], out=out[expert])
    return out


def _suits(t: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes a matrix that lies so in memory."""
    outer = t.stride(-2) if t.stride(-1) == 1 else t.stride(-1)
    whole = 1 in (t.stride(-1), t.stride(-2))
    return whole and outer * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
