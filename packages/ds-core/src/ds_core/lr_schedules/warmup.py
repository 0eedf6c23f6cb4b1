"""Schedules that begin with a rise: then constant, falling on a line, or on a cosine."""

from __future__ import annotations

import logging
import math
from typing import Literal

from torch.optim import Optimizer

from ds_core.lr_schedules.schedule import PerGroup, Schedule, mix, per_group, positive

logger = logging.getLogger(__name__)

Warmup = Literal["log", "linear"]


class WarmupLR(Schedule):
    """A learning rate that rises to `warmup_max_lr` and stays there.

    Args:
        optimizer: whose groups are scheduled.
        warmup_min_lr: first learning rate, for all groups or one per group.
        warmup_max_lr: last one; None: what the optimizer was built with.
        warmup_num_steps: steps until then, at least 2.
        warmup_type: "log" rises as log(t + 1) / log(num_steps), "linear" as t / num_steps.
        last_batch_iteration: see `Schedule`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = per_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs: list[float] | None = None
        if warmup_max_lr is not None:
            self.max_lrs = per_group(optimizer, warmup_max_lr, "warmup_max_lr")
        self.warmup = _Rise(warmup_num_steps, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, iteration: int) -> list[float]:
        peaks = self._base_rates() if self.max_lrs is None else self.max_lrs
        fraction = self.fraction(iteration) if iteration >= 0 else 0.0
        return [mix(*ends, fraction) for ends in zip(self.min_lrs, peaks, strict=True)]

    def fraction(self, iteration: int) -> float:
        """Where between the lowest (0) and the highest (1) rate a step is."""
        return self.warmup.at(iteration) if iteration < self.warmup.num_steps else 1.0


class WarmupDecayLR(WarmupLR):
    """A learning rate that rises as `WarmupLR` and falls linearly to `warmup_min_lr`.

    Args:
        optimizer: whose groups are scheduled.
        total_num_steps: steps of rise and fall together.
        warmup_min_lr: first and last learning rate, for all groups or one per group.
        warmup_max_lr: highest one; None: what the optimizer was built with.
        warmup_num_steps: steps of the rise.
        warmup_type: see `WarmupLR`.
        last_batch_iteration: see `Schedule`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_lr: PerGroup = 0.0,
        warmup_max_lr: PerGroup | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: Warmup = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = positive(total_num_steps, "total_num_steps")
        _warn_if_never_warm(total_num_steps, warmup_num_steps)
        super().__init__(
            optimizer,
            warmup_min_lr,
            warmup_max_lr,
            warmup_num_steps,
            warmup_type,
            last_batch_iteration,
        )

    def fraction(self, iteration: int) -> float:
        if iteration < self.warmup.num_steps:
            return self.warmup.at(iteration)
        left = self.total_num_steps - iteration
        return max(0.0, left / max(1, self.total_num_steps - self.warmup.num_steps))


class WarmupCosineLR(Schedule):
    """The optimizer's learning rate times a ratio that rises to 1 and falls on a cosine.

    Before the first step the ratio is 0, as in DeepSpeed.

    Args:
        optimizer: whose groups are scheduled; the rates it was built with are the highest.
        total_num_steps: steps of rise and fall together.
        warmup_min_ratio: ratio after the first step.
        warmup_num_steps: steps of the rise, at least 2.
        cos_min_ratio: last ratio, which stays.
        warmup_type: see `WarmupLR`.
        last_batch_iteration: see `Schedule`.

    Source of the cosine: Loshchilov & Hutter 2017, "SGDR" (1608.03983), without restarts.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: Warmup = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = positive(total_num_steps, "total_num_steps")
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup = _Rise(warmup_num_steps, warmup_type)
        _warn_if_never_warm(total_num_steps, warmup_num_steps)
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, iteration: int) -> list[float]:
        ratio = self.ratio(iteration) if iteration >= 0 else 0.0
        return [rate * ratio for rate in self._base_rates()]

    def ratio(self, iteration: int) -> float:
        """The factor on the optimizer's own rate after `iteration + 1` steps."""
        if iteration < self.warmup.num_steps:
            return mix(self.warmup_min_ratio, 1.0, self.warmup.at(iteration))
        window = max(1, self.total_num_steps - self.warmup.num_steps)
        progress = min(1.0, (iteration - self.warmup.num_steps + 1) / window)
        height = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, mix(self.cos_min_ratio, 1.0, height))


class _Rise:
    """The rise of a warm-up from 0 to 1."""

    def __init__(self, num_steps: int, kind: str) -> None:
        if kind not in ("log", "linear"):
            raise ValueError(f"warmup_type: got {kind!r}, expected one of log, linear")
        # log(1) is 0: a rise of one step is no rise.
        self.num_steps = max(2, positive(num_steps, "warmup_num_steps"))
        self.kind = kind

    def at(self, iteration: int) -> float:
        """Its height after `iteration + 1` steps, for 0 <= iteration < num_steps."""
        if self.kind == "linear":
            return iteration / self.num_steps
        return math.log(iteration + 1) / math.log(self.num_steps)


def _warn_if_never_warm(total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        logger.warning(
            "total_num_steps %d is less than warmup_num_steps %d: the top rate is never reached",
            total_num_steps,
            warmup_num_steps,
        )
