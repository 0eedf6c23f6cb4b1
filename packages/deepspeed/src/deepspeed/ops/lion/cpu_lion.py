"""Lion for states in host memory."""

from __future__ import annotations

import torch

from ds_ops.optim import CPULion, FusedLion


class DeepSpeedCPULion(CPULion):
    """`ds_ops.optim.CPULion` that also takes parameters which are on a device for now."""

    def _check_param(self, param: torch.Tensor) -> None:
        FusedLion._check_param(self, param)
