"""Whether there are experts on ranks of their own: none can be made before ds-moe."""

from __future__ import annotations

import torch
from torch import nn


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether a parameter is an expert's: programs mark those with `allreduce = False`."""
    return not getattr(param, "allreduce", True)


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """Whether a model has layers of experts, and how many experts one has; none can be made yet."""
    return False, 0
