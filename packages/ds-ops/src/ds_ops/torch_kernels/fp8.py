"""Products of fp8 matrices by torch's own kernels."""

from __future__ import annotations

import torch

from ds_core.ops import grouped_mm_fp8 as grouped
from ds_core.ops import scaled_mm as scaled
from ds_core.ops.grouped_mm import ends
from ds_ops.torch_kernels.grouped_mm import aligned
from ds_ops.triton_kernels import targets

#: Where torch has a grouped product of fp8 matrices, and products with scales by row, by tensor.
_GROUPED = ("sm_90",)
_BY_ROW = ("sm_90", "sm_100", "sm_103")
_BY_TENSOR = (*_BY_ROW, "sm_89", "sm_120")


def grouped_mm_fp8(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `ds_core.ops.grouped_mm_fp8.reference`; on a CPU one product of widened matrices each."""
    out = grouped.fake(a, b, scale_a, scale_b, offsets, out_dtype)
    if a.is_cuda:
        from ds_ops.triton_kernels.grouped_mm import clear_behind

        found = torch._scaled_grouped_mm(
            a, b, scale_a, scale_b, offs=offsets, out_dtype=out_dtype, use_fast_accum=False
        )
        return clear_behind(found, offsets)
    stops = ends(grouped.NAME, offsets, len(a))
    for expert, (begin, end) in enumerate(zip([0, *stops], stops, strict=False)):
        if begin < end:
            product = torch.mm(a[begin:end].float(), b[expert].float())
            product *= scale_a[begin:end, None]
            out[begin:end] = product.mul_(scale_b[expert])
    out[stops[-1] :] = 0
    return out


def grouped_partly(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    offsets: torch.Tensor,
    out_dtype: torch.dtype,
) -> str | None:
    """Why torch's grouped product does not take a call on a GPU, or None."""
    if not a.is_cuda:
        return None
    if targets.architecture(a.device.type, a.device.index) not in _GROUPED:
        return f"on GPUs for {', '.join(_GROUPED)} only"
    if out_dtype != torch.bfloat16:
        return "for bf16 results only"
    return _layout(a, b) or (None if scale_b.stride(-1) == 1 else "for scales without gaps only")


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `ds_core.ops.scaled_mm.reference`."""
    out = scaled.fake(a, b, scale_a, scale_b, bias, out_dtype)
    if out.numel() == 0:
        return out
    if len(scale_a) == len(scale_b) == 1:
        scale_a, scale_b = scale_a.view(()), scale_b.view(())
    else:
        scale_a = scale_a.expand(len(a)).contiguous()[:, None]
        scale_b = scale_b.expand(b.shape[1]).contiguous()[None]
    found: torch.Tensor = torch._scaled_mm(
        a, b, scale_a, scale_b, bias=bias, out_dtype=out_dtype, use_fast_accum=False
    )
    return found


def scaled_partly(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> str | None:
    """Why torch's product does not take a call on a GPU, or None."""
    if not a.is_cuda:
        return None
    by_tensor = scale_a.numel() == scale_b.numel() == 1
    there = _BY_TENSOR if by_tensor else _BY_ROW
    if targets.architecture(a.device.type, a.device.index) not in there:
        return f"with these scales on GPUs for {', '.join(there)} only"
    if out_dtype != torch.bfloat16 and not (by_tensor and bias is None):
        return "with scales of rows or a bias for bf16 results only"
    return _layout(a, b)


def _layout(a: torch.Tensor, b: torch.Tensor) -> str | None:
    if a.dim() != 2 or b.dim() not in (2, 3) or 0 in (*a.shape, *b.shape):
        return "for matrices that are not empty only"
    turned = b.transpose(-1, -2)
    sixteens = a.shape[1] % 16 == 0 and b.shape[-1] % 16 == 0
    if a.stride(1) != 1 or turned.stride(-1) != 1 or not (sixteens and aligned(a) and aligned(b)):
        return "for a by rows and b by columns only, of multiples of 16 elements"
    return None
