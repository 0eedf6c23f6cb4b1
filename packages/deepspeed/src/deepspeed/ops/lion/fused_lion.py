"""Lion for states on a device."""

from __future__ import annotations

from ds_ops.optim import FusedLion

__all__ = ["FusedLion"]
