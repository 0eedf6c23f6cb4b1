"""Root-mean-square normalization. Source: Zhang and Sennrich 2019, equation 4."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.seams.op import Op


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in fp32.

    x: `[..., d]`, any float dtype; weight: `[d]`. Returns x's shape and dtype.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def cases(device: torch.device, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Ordinary, odd, single and empty shapes."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    shapes = [((4, 16), 64), ((3,), 127), ((1,), 1), ((0,), 8)]
    return [(make(*lead, d), make(d)) for lead, d in shapes]


OP = Op(
    name="rms_norm",
    reference=reference,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3},
    cases=cases,
)
