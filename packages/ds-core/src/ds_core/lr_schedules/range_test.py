"""The schedule of a learning-rate range test."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from ds_core.lr_schedules.schedule import PerGroup, Schedule, per_group, positive


class LRRangeTest(Schedule):
    """A learning rate that grows with the steps, to find the largest that trains.

    lr = min_lr * (1 + step_rate * t / step_size) after t steps; with `staircase`, t / step_size is
    rounded down.

    Args:
        optimizer: whose groups are scheduled.
        lr_range_test_min_lr: first learning rate, for all groups or one per group.
        lr_range_test_step_size: steps per unit of growth.
        lr_range_test_step_rate: growth per `step_size` steps, in units of `min_lr`.
        lr_range_test_staircase: whether it grows in stairs.
        last_batch_iteration: see `Schedule`.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters" (1803.09820).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_range_test_min_lr: PerGroup = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = positive(lr_range_test_step_size, "lr_range_test_step_size")
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, iteration: int) -> list[float]:
        interval = (iteration + 1) / self.step_size
        growth = 1 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [rate * growth for rate in self.min_lrs]
