"""What computes an operation: a signature with its reference, and implementations that compete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Op:
    """One operation: its contract and its truth.

    Attributes:
        name: such as "rms_norm".
        reference: plain torch, fp32 inside, readable over fast; runs anywhere. Its docstring is
            the contract: shapes, dtypes, formula, source.
        tolerance: largest relative error of an implementation, by dtype.
        cases: example arguments that every implementation is tested on, made for a device and
            dtype; odd sizes, one and empty included.
    """

    name: str
    reference: Callable[..., Any]
    tolerance: dict[torch.dtype, float]
    cases: Callable[[torch.device, torch.dtype], list[tuple[Any, ...]]]


@runtime_checkable
class Implementation(Protocol):
    """One way to compute an `Op`; registered by packages under `ds_core.ops`."""

    op: str
    name: str

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run there, or None if it can."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the op."""
