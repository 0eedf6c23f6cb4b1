"""DeepSpeed's learning-rate schedules under its names: ds_core's, with its way to count steps."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from torch.optim import Optimizer

import ds_core.lr_schedules as ours

LR_SCHEDULE = "lr_schedule"
LR_RANGE_TEST, ONE_CYCLE = "LRRangeTest", "OneCycle"
WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR = "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]

#: Parameters of the schedules that the command line can give: type, default and help.
_ARGUMENTS: dict[str, tuple[type, Any, str]] = {
    "lr_range_test_min_lr": (float, 0.001, "first learning rate of the range test"),
    "lr_range_test_step_rate": (float, 1.0, "how fast the range test raises it"),
    "lr_range_test_step_size": (int, 1000, "steps between two values of the range test"),
    "lr_range_test_staircase": (bool, False, "raise it in stairs"),
    "cycle_first_step_size": (int, 1000, "steps of the first half of the cycle"),
    "cycle_first_stair_count": (int, -1, "stairs of the first half"),
    "cycle_second_step_size": (int, -1, "steps of the second half; -1: as the first"),
    "cycle_second_stair_count": (int, -1, "stairs of the second half"),
    "decay_step_size": (int, 1000, "steps between two decays after the cycle"),
    "cycle_min_lr": (float, 0.01, "lowest learning rate of the cycle"),
    "cycle_max_lr": (float, 0.1, "highest learning rate of the cycle"),
    "decay_lr_rate": (float, 0.0, "decay of the learning rate after the cycle"),
    "cycle_momentum": (bool, False, "cycle the momentum, too"),
    "cycle_min_mom": (float, 0.8, "lowest momentum of the cycle"),
    "cycle_max_mom": (float, 0.9, "highest momentum of the cycle"),
    "decay_mom_rate": (float, 0.0, "decay of the momentum after the cycle"),
    "warmup_min_lr": (float, 0, "learning rate at the start of the warm-up"),
    "warmup_max_lr": (float, 0.001, "learning rate at the end of the warm-up"),
    "warmup_num_steps": (int, 1000, "steps of the warm-up"),
    "warmup_type": (str, "log", "log or linear"),
    "warmup_min_ratio": (float, 0.01, "ratio at the start of the warm-up, for the cosine"),
    "cos_min_ratio": (float, 0.01, "ratio at the end of the cosine"),
}


class _Counted(ours.Schedule):
    """What DeepSpeed's schedules have in common and ds_core's have not.

    The last iteration is counted, from -1 before the first step. A schedule that is built in the
    middle of a run has no last learning rate until it is stepped.
    """

    #: Whether a schedule that has just been built knows its learning rate.
    knows_first_rate = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = inspect.signature(cls.__bases__[1])  # type: ignore[attr-defined]

    def __init__(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(get_torch_optimizer(optimizer), *args, **kwargs)
        self._knows_rate = self.knows_first_rate and self.last_batch_iteration == -1

    @property
    def last_batch_iteration(self) -> int:
        """Steps done, less one."""
        return self.last_epoch - 1

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Set the groups' learning rates for the next iteration, or for that after a given one."""
        if last_batch_iteration is None:
            super().step()
        else:
            self.load_state_dict({"last_batch_iteration": last_batch_iteration})
        self._knows_rate = True

    def get_last_lr(self) -> list[Any]:
        """The learning rate of each group. Raises AssertionError before the first step."""
        if not self._knows_rate:
            raise AssertionError("need to call step() first")
        return super().get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The last iteration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, sd: dict[str, Any]) -> None:
        """Go on after the iteration of a `state_dict`."""
        super().load_state_dict(sd)


class LRRangeTest(_Counted, ours.LRRangeTest):
    """A learning rate that rises until training fails: see ds_core.lr_schedules.LRRangeTest."""

    def step(self, batch_iteration: int | None = None) -> None:
        """See `WarmupLR.step`."""
        super().step(batch_iteration)


class OneCycle(_Counted, ours.OneCycle):
    """Up, down, and decay: see ds_core.lr_schedules.OneCycle."""

    knows_first_rate = False

    def step(self, batch_iteration: int | None = None) -> None:
        """See `WarmupLR.step`."""
        super().step(batch_iteration)

    def get_mom(self) -> list[Any] | None:
        """The momentum, or the betas, of each group; None if it is not cycled."""
        if self.momentum_key is None:
            return None
        return [group[self.momentum_key] for group in self.optimizer.param_groups]


class WarmupLR(_Counted, ours.WarmupLR):
    """A rise to a constant: see ds_core.lr_schedules.WarmupLR."""


class WarmupDecayLR(_Counted, ours.WarmupDecayLR):
    """A rise and a linear fall: see ds_core.lr_schedules.WarmupDecayLR."""


class WarmupCosineLR(_Counted, ours.WarmupCosineLR):
    """A rise and a cosine: see ds_core.lr_schedules.WarmupCosineLR."""


_CLASSES: dict[str, type[_Counted]] = {
    name.lower(): cls
    for name, cls in (
        (LR_RANGE_TEST, LRRangeTest),
        (ONE_CYCLE, OneCycle),
        (WARMUP_LR, WarmupLR),
        (WARMUP_DECAY_LR, WarmupDecayLR),
        (WARMUP_COSINE_LR, WarmupCosineLR),
    )
}


def schedule_maker(name: str, params: dict[str, Any]) -> Any:
    """What makes a configuration's schedule from an optimizer; None if it is not DeepSpeed's."""
    cls = _CLASSES.get(name.lower())
    if cls is None:
        return None
    complete = ours.effective_params(name, params)
    return lambda optimizer: cls(optimizer, **complete)


def get_torch_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer that is passed, or that something wraps as its `optimizer`.

    Raises TypeError if there is none.
    """
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        if isinstance(candidate, Optimizer):
            return candidate
    raise TypeError(f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer")


def update_lr(param_groups: list[dict[str, Any]], lrs: list[Any]) -> list[Any]:
    """Set each group's learning rate; returns them."""
    for group, rate in zip(param_groups, lrs, strict=False):
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return [group["lr"] for group in param_groups]


def add_tuning_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add an argument for every parameter of every schedule to a program's own; returns it."""
    group = parser.add_argument_group("Convergence Tuning", "learning-rate schedules")
    group.add_argument("--lr_schedule", type=str, default=None, help="a schedule, by name")
    for name, (kind, default, text) in _ARGUMENTS.items():
        if kind is bool:
            group.add_argument(f"--{name}", action="store_true", default=default, help=text)
        else:
            group.add_argument(f"--{name}", type=kind, default=default, help=text)
    return parser


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The schedules' arguments of this program's command line, and the others."""
    return add_tuning_arguments(argparse.ArgumentParser()).parse_known_args()


def override_params(args: Any, params: dict[str, Any], schedule: str | None = None) -> None:
    """Write what a parsed command line says of the schedules, or of one, into `params`."""
    accepted = None
    if schedule is not None:
        accepted = inspect.signature(_CLASSES[schedule.lower()]).parameters
    for name in _ARGUMENTS:
        value = getattr(args, name, None)
        if value is not None and (accepted is None or name in accepted):
            params[name] = value


def get_config_from_args(args: Any) -> tuple[dict[str, Any] | None, str | None]:
    """The scheduler section that a parsed command line asks for, or None and why there is none."""
    name = getattr(args, LR_SCHEDULE, None)
    if name is None:
        return None, f"--{LR_SCHEDULE} not specified on command line"
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not supported LR schedule"
    params: dict[str, Any] = {}
    override_params(args, params, name)
    return {"type": name, "params": params}, None


def get_lr_from_config(config: dict[str, Any]) -> tuple[Any, str]:
    """The learning rate that a scheduler section leads to, or None and why it has none."""
    for key in ("type", "params"):
        if key not in config:
            return None, f"LR schedule {key} not defined in config"
    name, params = config["type"], config["params"]
    rates = {LR_RANGE_TEST: "lr_range_test_min_lr", ONE_CYCLE: "cycle_max_lr"}
    if name not in VALID_LR_SCHEDULES:
        return None, f"{name} is not a valid LR schedule"
    if name == WARMUP_COSINE_LR:
        return None, f"{name} scales the optimizer's learning rate, so it has none of its own"
    return params[rates.get(name, "warmup_max_lr")], ""
