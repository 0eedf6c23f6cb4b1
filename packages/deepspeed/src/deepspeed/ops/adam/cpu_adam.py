"""Adam for states in host memory."""

from __future__ import annotations

import torch

from ds_ops.optim import CPUAdam, FusedAdam


class DeepSpeedCPUAdam(CPUAdam):
    """`ds_ops.optim.CPUAdam` that also takes parameters which are on a device for now.

    Those that ZeRO offloads step on the host; others where they are, as `FusedAdam` steps them.
    """

    def _check_param(self, param: torch.Tensor) -> None:
        FusedAdam._check_param(self, param)
