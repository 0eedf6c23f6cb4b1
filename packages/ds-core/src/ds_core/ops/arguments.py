"""What op files share: how arguments are refused, widened and made up for tests."""

from __future__ import annotations

from typing import Any

import torch

from ds_core.errors import OpError

#: The dtypes that most ops take.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expect(condition: bool, op: str, argument: str, got: Any, expected: Any) -> None:
    """Raise OpError unless `condition` holds: "op: argument: got ..., expected ..."."""
    if not condition:
        raise OpError(f"{op}: {argument}: got {_shown(got)}, expected {_shown(expected)}")


def expect_tensors(op: str, **given: Any) -> None:
    """Raise OpError unless each is a tensor."""
    for argument, value in given.items():
        if not isinstance(value, torch.Tensor):
            expect(False, op, argument, value, "a tensor")


def expect_float(op: str, argument: str, t: torch.Tensor) -> None:
    """Raise OpError unless `t` is fp32, bf16, fp16 or, for the reference, float64."""
    expect(t.dtype in (*FLOATS, torch.float64), op, argument, t.dtype, "a float dtype")


def expect_shape(op: str, argument: str, t: torch.Tensor, shape: Any) -> None:
    """Raise OpError unless `t` has that shape."""
    expect(tuple(t.shape) == tuple(shape), op, argument, f"shape {list(t.shape)}", list(shape))


def expect_like(op: str, argument: str, t: torch.Tensor, like: torch.Tensor) -> None:
    """Raise OpError unless `t` has the shape and dtype of another tensor."""
    expect_shape(op, argument, t, like.shape)
    expect(t.dtype == like.dtype, op, argument, t.dtype, like.dtype)


def expect_together(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise OpError unless all tensors are on the device of the first."""
    for argument, t in others.items():
        if t is not None and t.device != first.device:
            raise OpError(f"{op}: {argument}: on {t.device}, expected {first.device}")


def compact(t: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous tensor of the same values; None stays None."""
    return None if t is None else t.contiguous()


def wide(t: torch.Tensor) -> torch.Tensor:
    """In the dtype that references compute in: float64 stays, all others become fp32."""
    return t if t.dtype is torch.float64 else t.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of `wide` of a tensor of `dtype`."""
    return dtype if dtype is torch.float64 else torch.float32


def randn(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same on every call and device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """An equal, contiguous tensor that begins one element behind an aligned address."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return room[1:].view(t.shape).copy_(t)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)
