"""Learning-rate schedules: DeepSpeed's five by its names and values, and torch's by theirs.

Each is a torch `LRScheduler` that is stepped once per optimizer step. The learning rate is a
function of the number of steps done alone, so a schedule's state is one integer and resumes under
changed parameters as if it had always had them.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from ds_core import _signatures, _values
from ds_core._signatures import Problem
from ds_core.errors import ConfigError
from ds_core.optimizers import Choice

logger = logging.getLogger(__name__)

Warmup = Literal["log", "linear"]
PerGroup = float | Sequence[float]

_HIDDEN = ("optimizer", "last_epoch")
_PASS_OBJECT = "build it and pass it to initialize(lr_scheduler=)"
#: Schedules of torch that a config cannot describe or a step without a metric cannot drive.
_REFUSED_TYPES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("LambdaLR", "MultiplicativeLR"), f"takes functions, which JSON has not; {_PASS_OBJECT}"
        ),
        **dict.fromkeys(
            ("SequentialLR", "ChainedScheduler"), f"takes other schedules; {_PASS_OBJECT}"
        ),
        "ReduceLROnPlateau": "needs a validation metric at every step; step it in your own loop",
    }
)


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
        self.min_lrs = _per_group(optimizer, lr_range_test_min_lr, "lr_range_test_min_lr")
        self.step_size = _positive(lr_range_test_step_size, "lr_range_test_step_size")
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, iteration: int) -> list[float]:
        interval = (iteration + 1) / self.step_size
        growth = 1 + self.step_rate * (math.floor(interval) if self.staircase else interval)
        return [rate * growth for rate in self.min_lrs]


class OneCycle(Schedule):
    """One triangle of the learning rate, momentum the other way round, then decay.

    Where the optimizer has `betas`, the first one is cycled between `cycle_max_mom` and
    `cycle_min_mom`. The second is left as the optimizer has it (DeepSpeed sets it to 0.99).

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
        self.min_lrs = _per_group(optimizer, cycle_min_lr, "cycle_min_lr")
        self.max_lrs = _per_group(optimizer, cycle_max_lr, "cycle_max_lr")
        self.min_moms = _per_group(optimizer, cycle_min_mom, "cycle_min_mom")
        self.max_moms = _per_group(optimizer, cycle_max_mom, "cycle_max_mom")
        self.up = _positive(cycle_first_step_size, "cycle_first_step_size")
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
        self.cycles_momentum = cycle_momentum and _has_betas(optimizer)
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates; sets the momenta of the groups as torch's own cycles do."""
        if self.cycles_momentum:
            moms = self.moms_at(self.last_epoch - 1)
            for group, momentum in zip(self.optimizer.param_groups, moms, strict=True):
                group["betas"] = (momentum, *group["betas"][1:])
        return super().get_lr()

    def lrs_at(self, iteration: int) -> list[float]:
        if iteration < self.up + self.down:
            height = self._height(iteration)
            return [_mix(*ends, height) for ends in zip(self.min_lrs, self.max_lrs, strict=True)]
        decay = 1 + self.lr_decay * self._steps_after_cycle(iteration)
        return [rate / decay for rate in self.min_lrs]

    def moms_at(self, iteration: int) -> list[float]:
        """The momentum of each group after `iteration + 1` steps."""
        if iteration < 0:
            return list(self.min_moms)  # DeepSpeed's first step has the momentum of the peak
        if iteration < self.up + self.down:
            height = self._height(iteration)
            return [_mix(*ends, height) for ends in zip(self.max_moms, self.min_moms, strict=True)]
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
        self.min_lrs = _per_group(optimizer, warmup_min_lr, "warmup_min_lr")
        self.max_lrs: list[float] | None = None
        if warmup_max_lr is not None:
            self.max_lrs = _per_group(optimizer, warmup_max_lr, "warmup_max_lr")
        self.warmup = _Rise(warmup_num_steps, warmup_type)
        super().__init__(optimizer, last_batch_iteration)

    def lrs_at(self, iteration: int) -> list[float]:
        peaks = self._base_rates() if self.max_lrs is None else self.max_lrs
        fraction = self.fraction(iteration) if iteration >= 0 else 0.0
        return [_mix(*ends, fraction) for ends in zip(self.min_lrs, peaks, strict=True)]

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
        self.total_num_steps = _positive(total_num_steps, "total_num_steps")
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
        self.total_num_steps = _positive(total_num_steps, "total_num_steps")
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
            return _mix(self.warmup_min_ratio, 1.0, self.warmup.at(iteration))
        window = max(1, self.total_num_steps - self.warmup.num_steps)
        progress = min(1.0, (iteration - self.warmup.num_steps + 1) / window)
        height = (1 + math.cos(math.pi * progress)) / 2
        return max(0.0, _mix(self.cos_min_ratio, 1.0, height))


class _Rise:
    """The rise of a warm-up from 0 to 1."""

    def __init__(self, num_steps: int, kind: str) -> None:
        if kind not in ("log", "linear"):
            raise ValueError(f"warmup_type: got {kind!r}, expected one of log, linear")
        # log(1) is 0: a rise of one step is no rise.
        self.num_steps = max(2, _positive(num_steps, "warmup_num_steps"))
        self.kind = kind

    def at(self, iteration: int) -> float:
        """Its height after `iteration + 1` steps, for 0 <= iteration < num_steps."""
        if self.kind == "linear":
            return iteration / self.num_steps
        return math.log(iteration + 1) / math.log(self.num_steps)


_OWN: tuple[type[Schedule], ...] = (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR)


def build(choice: Choice, optimizer: Optimizer) -> LRScheduler:
    """The schedule that a config names, over the groups of `optimizer`.

    Args:
        choice: the scheduler section.
        optimizer: its groups' learning rates are set to the schedule's first.

    Raises ConfigError if the type is unknown or the class refuses its arguments.
    """
    found = problems(choice.type, choice.params)
    if found:
        listing = "; ".join(f"scheduler.{key}: {message}" for key, message in found)
        raise ConfigError(listing)
    cls = _classes()[choice.type.lower()]
    try:
        return cls(optimizer, **_signatures.coerced(cls, choice.params))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"scheduler.params: {cls.__name__} refuses them: {error}") from error


def problems(type_name: str, params: Mapping[str, Any]) -> list[Problem]:
    """What keeps `build` from honouring a type and its params; keys are relative to the section."""
    name = type_name.lower()
    refused = {key.lower(): reason for key, reason in _REFUSED_TYPES.items()}
    if name in refused:
        return [("type", f"{type_name}: {refused[name]}")]
    classes = _classes()
    if name not in classes:
        valid = [cls.__name__ for cls in classes.values()]
        guess = _values.nearest(type_name, valid)
        hint = f"; did you mean {guess}?" if guess else ""
        expected = f"one of {', '.join(valid)}"
        return [("type", f"{_values.mismatch(type_name, expected)}{hint}")]
    return _signatures.check(classes[name], params, hidden=_HIDDEN)


def effective_params(type_name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` completed by the defaults of the schedule that they configure."""
    cls = _classes()[type_name.lower()]
    return {**_signatures.defaults(cls, hidden=_HIDDEN), **_signatures.coerced(cls, params)}


def _classes() -> dict[str, Any]:
    """The schedules that a config can name, by lower-case name; DeepSpeed's first."""
    found: dict[str, Any] = {cls.__name__.lower(): cls for cls in _OWN}
    for name in lr_scheduler.__all__:
        cls = getattr(lr_scheduler, name)
        is_schedule = (
            inspect.isclass(cls) and issubclass(cls, LRScheduler) and cls is not LRScheduler
        )
        if is_schedule and name not in _REFUSED_TYPES:
            found.setdefault(name.lower(), cls)
    return found


def _per_group(optimizer: Optimizer, value: PerGroup, name: str) -> list[float]:
    """One value per parameter group. Raises ValueError if a list has another length."""
    num_groups = len(optimizer.param_groups)
    if isinstance(value, (int, float)):
        return [float(value)] * num_groups
    if len(value) != num_groups:
        raise ValueError(f"{name}: got {len(value)} values for {num_groups} parameter groups")
    return [float(item) for item in value]


def _positive(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: got {value!r}, expected an integer > 0")
    return value


def _mix(start: float, end: float, fraction: float) -> float:
    return start + (end - start) * fraction


def _stairs(position: int, length: int, count: int) -> float:
    """How high `position` of `length` steps has climbed, in `count` equal stairs if it is not 0."""
    if count == 0:
        return position / length
    return math.floor(position * count / length) / count


def _has_betas(optimizer: Optimizer) -> bool:
    if "betas" in optimizer.defaults:
        return True
    logger.warning(
        "OneCycle: %s has no betas, so its momentum is not cycled (cycle_momentum is true)",
        type(optimizer).__name__,
    )
    return False


def _warn_if_never_warm(total_num_steps: int, warmup_num_steps: int) -> None:
    if total_num_steps < warmup_num_steps:
        logger.warning(
            "total_num_steps %d is less than warmup_num_steps %d: the top rate is never reached",
            total_num_steps,
            warmup_num_steps,
        )
