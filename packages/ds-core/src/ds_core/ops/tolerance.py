"""How far from the truth an implementation may be: one table for all ops.

The truth is the reference in float64; the distance is ||d|| / ||truth|| over a whole tensor. An
implementation is right if it is within its class, or at most 1.5 times as far off as plain torch
with fp32 inside on the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

#: Largest distance by the dtype of a result. Rounding to bf16 alone gives 1.7e-3, to fp16 2e-4.
CLASS: Mapping[torch.dtype, float] = MappingProxyType(
    {
        torch.float64: 1e-12,
        torch.float32: 1e-6,
        torch.bfloat16: 4e-3,
        torch.float16: 1e-3,
    }
)

#: For results that are moved, packed or counted, not computed.
EXACT: Mapping[torch.dtype, float] = MappingProxyType(
    dict.fromkeys((*CLASS, torch.float8_e4m3fn, torch.float8_e5m2), 0.0)
)

#: How much further off than plain torch an implementation may be.
BESIDE_TORCH = 1.5
