"""The reference as an implementation: what computes an op where nothing faster is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_core.ops import library
from ds_core.seams.op import Op

REFERENCE = "reference"


class Reference:
    """Plain torch, on any device; changes nothing but what the schema says."""

    name = REFERENCE
    priority = 0
    devices: tuple[str, ...] = ()

    def __init__(self, op: Op) -> None:
        self.op = op.name
        self._kernel = op.reference

    def unavailable(self, device_type: str) -> str | None:
        return None

    def state(self, device_type: str) -> str:
        return "python"

    def partly(self) -> Callable[..., str | None] | None:
        """Always None: it takes every call."""
        return None

    def traced(self) -> Callable[..., Any] | None:
        return None

    def bind(self, namespace: str, device_type: str) -> None:
        library.bind_python(self.op, namespace, device_type, self._kernel)
