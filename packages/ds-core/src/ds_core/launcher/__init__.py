"""Start a script in several processes, over the elastic agent of torchrun.

    ds run --nproc 2 train.py --lr 1e-3

`launch` runs a `LaunchSpec`; a job that fails raises `JobFailure`, whose text is the report.
"""

from __future__ import annotations

from ds_core.launcher.errors import JobFailure
from ds_core.launcher.job import launch
from ds_core.launcher.plan import LaunchPlan, LaunchSpec, make_plan

__all__ = ["JobFailure", "LaunchPlan", "LaunchSpec", "launch", "make_plan"]
