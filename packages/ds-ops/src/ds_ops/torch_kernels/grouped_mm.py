"""grouped_mm by torch's own, where its rules allow: rows of a multiple of 16 bytes.

On GPUs these are the kernels for sm_90 and sm_100, of bf16: for all else torch waits for the
offsets and computes expert by expert, so that calls are left to others. What they leave as memory
was, rows behind the last expert's and matrices of experts without rows, a kernel in Triton clears.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import functional

from ds_core.ops.grouped_mm import NAME, check, check_backward, ends
from ds_ops.triton_kernels import targets

#: Where torch has a grouped product of its own.
_ARCHITECTURES = ("sm_90", "sm_100", "sm_103")


def grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm.reference`; on a GPU offsets are not looked at."""
    check(a, b, offsets)
    if a.is_cuda:
        from ds_ops.triton_kernels.grouped_mm import clear_behind

        return clear_behind(functional.grouped_mm(a, b, offs=offsets), offsets)
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
    """As `ds_core.ops.grouped_mm.backward_reference`; on a GPU offsets are not looked at."""
    check_backward(a, grad, offsets)
    turned = a.t()
    if a.is_cuda:
        from ds_ops.triton_kernels.grouped_mm import clear_empty

        return clear_empty(functional.grouped_mm(turned, grad, offs=offsets), offsets)
    stops = ends(NAME, offsets, len(a))
    if _suits(turned) and _suits(grad) and a.numel() and grad.numel():
        return functional.grouped_mm(turned, grad, offs=offsets)
    out = a.new_empty(len(offsets), a.shape[1], grad.shape[1])
    for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        torch.mm(turned[:, begin:end], grad[begin:end], out=out[expert])
    return out


def partly(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> str | None:
    """Why torch's kernels do not take a call on a GPU, or None; also for the gradient of b."""
    if not a.is_cuda:
        return None
    if targets.architecture(a.device.type, a.device.index) not in _ARCHITECTURES:
        return f"on GPUs for {', '.join(_ARCHITECTURES)} only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed, which clears what torch leaves as it was"
    if a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16:
        return "on GPUs for bf16 only"
    if a.dim() != 2 or b.dim() not in (2, 3) or 0 in (*a.shape, *b.shape):
        return "on GPUs for matrices that are not empty only"
    if not (aligned(a) and aligned(b)):
        return "on GPUs for matrices whose rows or columns are a multiple of 16 bytes apart only"
    return None


def aligned(t: torch.Tensor) -> bool:
    """Whether all rows or all columns of a tensor begin at multiples of 16 bytes of its storage."""
    down, along = t.stride()[-2:]
    starts = [t.storage_offset(), *t.stride()[:-2]]
    if along == 1 and down >= t.shape[-1]:
        starts.append(down)
    elif down == 1 and along >= t.shape[-2]:
        starts.append(along)
    else:
        return False
    return all(start * t.element_size() % 16 == 0 for start in starts)


def _suits(t: torch.Tensor) -> bool:
    """Whether torch's grouped_mm takes a matrix that lies so in memory."""
    outer = t.stride(-2) if t.stride(-1) == 1 else t.stride(-1)
    whole = 1 in (t.stride(-1), t.stride(-2))
    return whole and outer * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
