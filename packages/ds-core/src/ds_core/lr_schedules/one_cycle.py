"""One cycle of the learning rate, and of momentum the other way round."""

from __future__ import annotations

import logging
import math

import torch
from torch.optim import Optimizer

from ds_core.lr_schedules.schedule import PerGroup, Schedule, mix, per_group, positive

logger = logging.getLogger(__name__)


class OneCycle(Schedule):
    """One triangle of the learning rate, momentum the other way round, then decay.

    Momentum is cycled between `cycle_max_mom` and `cycle_min_mom`: the first of an optimizer's
    `betas`, the others staying as they are (DeepSpeed sets the second to 0.99), or the `momentum`
    of one that was built with any (DeepSpeed leaves SGD's alone).

    Args:
        optimizer: whose groups are scheduled.
        cycle_min_lr: where the cycle starts and ends, for all groups or one per group.
        cycle_max_lr: its peak.
        decay_lr_rate: after the cycle, lr = min_lr / (1 + rate * t / decay_step_size).
        cycle_first_step_size: steps up to the peak.
        cycle_second_step_size: steps down; None: as many as up.
        cycle_first_stair_count: stairs on the way up; 0: a straight line.
        cycle_second_stair_count: stairs on the way down; None: as many as up.
        decay_step_size: steps per unit of decay; 0: no decay.
        cycle_momentum: whether momentum is cycled.
        cycle_min_mom: momentum at the peak of the learning rate.
        cycle_max_mom: momentum at the ends of the cycle.
        decay_mom_rate: after the cycle, momentum = max_mom * (1 + rate * t / decay_step_size).
        last_batch_iteration: see `Schedule`.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters" (1803.09820).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_min_lr: PerGroup,
        cycle_max_lr: PerGroup,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: int = 2000,
        cycle_second_step_size: int | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: PerGroup = 0.8,
        cycle_max_mom: PerGroup = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = per_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self.min_moms = per_group(optimizer, cycle_min_mom, "cycle_min_mom")
        self.max_moms = per_group(optimizer, cycle_max_mom, "cycle_max_mom")
        self.up = positive(cycle_first_step_size, "cycle_first_step_size")
        self.down = self.up if cycle_second_step_size is None else cycle_second_step_size
        if self.down < 0:
            raise ValueError(f"cycle_second_step_size: got {self.down}, expected an integer >= 0")
        self.up_stairs = cycle_first_stair_count
        self.down_stairs = (
            self.up_stairs if cycle_second_stair_count is None else cycle_second_stair_count
        )
        # No step size means no decay, whatever the rates.
        self.lr_decay = decay_lr_rate / decay_step_size if decay_step_size else 0.0
        self.mom_decay = decay_mom_rate / decay_step_size if decay_step_size else 0.0
        self.momentum_key = _momentum_key(optimizer) if cycle_momentum else None
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates; sets the momenta of the groups as torch's own cycles do."""
        if self.momentum_key is not None:
            moms = self.moms_at(self.last_epoch - 1)
            for group, momentum in zip(self.optimizer.param_groups, moms, strict=True):
                if self.momentum_key == "betas":
                    group["betas"] = (momentum, *group["betas"][1:])
                else:
                    group["momentum"] = momentum
        return super().get_lr()

    def lrs_at(self, iteration: int) -> list[float]:
        if iteration < self.up + self.down:
            height = self._height(iteration)
            return [mix(*ends, height) for ends in zip(self.min_lrs, self.max_lrs, strict=True)]
        decay = 1 + self.lr_decay * self._steps_after_cycle(iteration)
        return [rate / decay for rate in self.min_lrs]

    def moms_at(self, iteration: int) -> list[float]:
        """The momentum of each group after `iteration + 1` steps."""
        if iteration < 0:
            return list(self.min_moms)  # DeepSpeed's first step has the momentum of the peak
        if iteration < self.up + self.down:
            height = self._height(iteration)
            return [mix(*ends, height) for ends in zip(self.max_moms, self.min_moms, strict=True)]
        growth = 1 + self.mom_decay * self._steps_after_cycle(iteration)
        return [momentum * growth for momentum in self.max_moms]

    def _steps_after_cycle(self, iteration: int) -> int:
        return iteration - (self.up + self.down) + 1

    def _height(self, iteration: int) -> float:
        """Where between the ends (0) and the peak (1) of the cycle a step is."""
        position = (iteration + 1) % (self.up + self.down)
        if position <= self.up:
            return _stairs(position, self.up, self.up_stairs)
        return _stairs(self.up + self.down - position, self.down, self.down_stairs)


def _stairs(position: int, length: int, count: int) -> float:
    """How high `position` of `length` steps has climbed, in `count` equal stairs if it is not 0."""
    if count == 0:
        return position / length
    return math.floor(position * count / length) / count


def _momentum_key(optimizer: Optimizer) -> str | None:
    """Where the groups of an optimizer have their momentum, if it uses any."""
    if "betas" in optimizer.defaults:
        return "betas"
    if optimizer.defaults.get("momentum"):
        return "momentum"
    logger.warning(
        "OneCycle: this %s has neither betas nor momentum, so there is none to cycle "
        "(cycle_momentum is true)",
        type(optimizer).__name__,
    )
    return None
