"""Checks of hyperparameters that several optimizers have."""

from __future__ import annotations

import torch

from ds_core.errors import OptimizerError


def check_not_negative(optimizer: str, **values: float) -> None:
    """Raise OptimizerError unless every value is a number of at least 0."""
    for name, value in values.items():
        if not value >= 0:
            raise OptimizerError(f"{optimizer}: {name}: got {value}, expected at least 0")


def check_betas(optimizer: str, betas: tuple[float, float]) -> None:
    """Raise OptimizerError unless there are two, each at least 0 and below 1."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise OptimizerError(
            f"{optimizer}: betas: got {betas}, expected two of at least 0 and below 1"
        )


def check_on_cpu(optimizer: str, param: torch.Tensor, elsewhere: str) -> None:
    """Raise OptimizerError unless a parameter is in host memory."""
    if param.device.type not in ("cpu", "meta"):
        raise OptimizerError(
            f"{optimizer}: params: got one on {param.device}, expected the CPU; use {elsewhere}"
        )
