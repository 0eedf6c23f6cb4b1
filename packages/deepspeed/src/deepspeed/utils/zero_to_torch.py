"""The command `zero_to_torch`: weights of a checkpoint as files of torch, in any dtype."""

from __future__ import annotations

from deepspeed.utils.zero_to_fp32 import main

__all__ = ["main"]
