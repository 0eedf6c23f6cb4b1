"""What a config will cost, before anything is allocated: `ds plan` as a library.

    from ds_core import planning

    source = planning.model_of_size("7B")
    cluster = planning.Cluster(8, 8, planning.find_device("h100"))
    plan = planning.make_plan({"train_micro_batch_size_per_gpu": 1}, source, cluster)
    plan.memory, plan.wire_bytes(), plan.time.total

Model state and messages are exact (a real run counts the same bytes); activations and times are
estimates. Who shards a model registers a `Planner` for its config section under the entry-point
group `ds_core.planners`.
"""

from __future__ import annotations

from ds_core.planning.costs import Costs, Message, Planner, SectionChange, Workload
from ds_core.planning.devices import DEVICES, DeviceSpec, find_device
from ds_core.planning.fitting import Remedy, remedies
from ds_core.planning.model_source import ModelSource, model_from, model_of_size
from ds_core.planning.optimizer_state import OptimizerState
from ds_core.planning.plan import Plan, PlanOptions, make_plan
from ds_core.planning.step_time import Cluster, StepTime

__all__ = [
    "DEVICES",
    "Cluster",
    "Costs",
    "DeviceSpec",
    "Message",
    "ModelSource",
    "OptimizerState",
    "Plan",
    "PlanOptions",
    "Planner",
    "Remedy",
    "SectionChange",
    "StepTime",
    "Workload",
    "find_device",
    "make_plan",
    "model_from",
    "model_of_size",
    "remedies",
]
