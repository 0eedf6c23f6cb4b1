"""Lamb in one pass."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {"FusedLamb": "deepspeed.ops.lamb.fused_lamb:FusedLamb"},
    submodules=("fused_lamb",),
)
