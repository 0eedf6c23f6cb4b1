"""What the schedules share: a learning rate that is a function of the steps done."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PerGroup = float | Sequence[float]


class Schedule(LRScheduler):
    """Base of DeepSpeed's schedules: the learning rates are a function of the steps done.

    Args:
        optimizer: whose parameter groups are scheduled.
        last_batch_iteration: -1 starts from the beginning; i continues after i + 1 steps.
    """

    def __init__(self, optimizer: Optimizer, last_batch_iteration: int = -1) -> None:
        super().__init__(optimizer)
        if last_batch_iteration != -1:
            self.load_state_dict({"last_batch_iteration": last_batch_iteration})

    @abstractmethod
    def lrs_at(self, iteration: int) -> list[float]:
        """The learning rate of each group after `iteration + 1` steps; -1: before the first."""

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each group after `last_epoch` steps."""
        return list(self.lrs_at(self.last_epoch - 1))

    def state_dict(self) -> dict[str, Any]:
        """The steps done; the parameters of the schedule are the config's, not the state's."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the steps that `state_dict` counts, and set the groups' rates to it.

        Accepts the state of DeepSpeed's schedules too, which counts one less.
        """
        if "last_epoch" in state_dict:
            self.last_epoch = int(state_dict["last_epoch"])
        else:
            self.last_epoch = int(state_dict["last_batch_iteration"]) + 1
        self._step_count = self.last_epoch + 1
        rates = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = rates

    def _base_rates(self) -> list[float]:
        return [float(rate) for rate in self.base_lrs]


def per_group(optimizer: Optimizer, value: PerGroup, name: str) -> list[float]:
    """One value per parameter group. Raises ValueError if a list has another length."""
    num_groups = len(optimizer.param_groups)
    if isinstance(value, (int, float)):
        return [float(value)] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name}: got {len(value)} values for {num_groups} parameter groups")
    return [float(item) for item in value]


def positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: got {value!r}, expected an integer > 0")
    return value


def mix(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction
