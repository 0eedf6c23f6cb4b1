"""Lamb for states on a device."""

from __future__ import annotations

from ds_ops.optim import FusedLamb

__all__ = ["FusedLamb"]
