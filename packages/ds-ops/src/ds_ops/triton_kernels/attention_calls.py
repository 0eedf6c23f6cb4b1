"""Which calls of attention the kernels in Triton take; needs no Triton."""

from __future__ import annotations

from typing import Any

import torch


def attention(q: torch.Tensor, *others: Any) -> str | None:
    """Why a call of `attention` is not taken, or None."""
    return not_taken(q)


def attention_backward(grad: torch.Tensor, *others: Any) -> str | None:
    """Why a call of `attention_backward` is not taken, or None."""
    return not_taken(grad)


def not_taken(q: torch.Tensor) -> str | None:
    """Why queries of that dtype are not taken, or None.

    On a GPU only 16 bits: without matrix units whole heads of fp32 do not fit into registers. In
    Triton's interpreter all are.
    """
    if q.device.type == "cpu" or q.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"q: {q.dtype} on {q.device.type}, only torch.bfloat16 and torch.float16 are taken"
