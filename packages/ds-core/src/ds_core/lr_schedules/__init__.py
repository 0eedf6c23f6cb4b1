"""Learning-rate schedules: DeepSpeed's five by its names and values, and torch's by theirs.

Each is a torch `LRScheduler` that is stepped once per optimizer step. The learning rate is a
function of the number of steps done alone, so a schedule's state is one integer and resumes under
changed parameters as if it had always had them.

`find_lr` and `suggest_lr` turn a range test into a learning rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ds_core.lr_schedules.building import build, effective_params, problems
from ds_core.lr_schedules.finding import LRFinding, find_lr, suggest_lr
from ds_core.lr_schedules.one_cycle import OneCycle
from ds_core.lr_schedules.range_test import LRRangeTest
from ds_core.lr_schedules.schedule import Schedule
from ds_core.lr_schedules.warmup import WarmupCosineLR, WarmupDecayLR, WarmupLR

if TYPE_CHECKING:
    from ds_core.lr_schedules.recorder import RangeTestRecorder

__all__ = [
    "LRFinding",
    "LRRangeTest",
    "OneCycle",
    "RangeTestRecorder",
    "Schedule",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
    "build",
    "effective_params",
    "find_lr",
    "problems",
    "suggest_lr",
]


def __getattr__(name: str) -> Any:
    # An observer needs the engine's world; a config that names a schedule does not.
    if name == "RangeTestRecorder":
        from ds_core.lr_schedules.recorder import RangeTestRecorder

        return RangeTestRecorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
