"""Start a script in several processes, here or on many hosts, over torchrun's elastic agent.

    ds run --nproc 2 train.py --lr 1e-3
    ds run --hostfile hosts train.py

`launch` runs a `LaunchSpec` on this node; a job that fails raises `JobFailure`, whose text is the
report. For several hosts, `cluster.make_cluster_job` checks a job, a `cluster.Launcher` (entry
point group `ds_core.launchers`) turns it into commands, and `head.launch_on_hosts` runs them.
"""

from __future__ import annotations

from ds_core.launcher.errors import JobFailure
from ds_core.launcher.job import launch
from ds_core.launcher.plan import LaunchPlan, LaunchSpec, make_plan

__all__ = ["JobFailure", "LaunchPlan", "LaunchSpec", "launch", "make_plan"]
