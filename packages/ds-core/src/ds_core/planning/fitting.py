"""What to change so that a model fits: each change alone first, then two together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ds_core.config.document import read
from ds_core.errors import ConfigError, PlanError
from ds_core.planning.plan import Plan, make_plan, planners
from ds_core.planning.step_time import Cluster

#: Largest cluster that is proposed.
MAX_RANKS = 16_384


@dataclass(frozen=True)
class Remedy:
    """A change with which the model fits, and what it costs then.

    Attributes:
        description: what is changed.
        plan: the plan with it.
    """

    description: str
    plan: Plan


@dataclass(frozen=True)
class _Change:
    description: str
    kind: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    recompute: bool = False
    nodes: int | None = None


def remedies(document: Any, plan: Plan) -> list[Remedy]:
    """The smallest change of each kind with which `plan` fits, the fastest step first.

    Where none suffices alone pairs are tried, then all together. Empty if nothing helps, or if the
    plan fits already.
    """
    if plan.fits:
        return []
    changes = list(_changes(plan))
    found = _first_of_each_kind(document, plan, [(change,) for change in changes])
    if not found:
        pairs: list[tuple[_Change, ...]] = [
            pair for pair in itertools.combinations(changes, 2) if pair[0].kind != pair[1].kind
        ]
        found = _first_of_each_kind(document, plan, pairs)
    here = [change for change in changes if change.kind != "nodes"]
    if not found and here:
        found = _first_of_each_kind(document, plan, [_strongest(here, here[-1])])
    if not found:
        bigger = [change for change in changes if change.kind == "nodes"]
        found = _first_of_each_kind(document, plan, [_strongest(changes, c) for c in bigger])
    return sorted(found, key=lambda remedy: _seconds_per_sample(remedy.plan))


def _seconds_per_sample(plan: Plan) -> float:
    """Device time per sample, so that a larger cluster is not better by being larger."""
    return plan.time.total * plan.cluster.size / plan.config.train_batch_size


def _changes(plan: Plan) -> Iterator[_Change]:
    """Single changes, of each kind the smallest first."""
    loaded = plan.config
    per_step = loaded.train_micro_batch_size_per_gpu * loaded.gradient_accumulation_steps
    for micro in range(loaded.train_micro_batch_size_per_gpu - 1, 0, -1):
        if per_step % micro == 0:
            keys = {
                "train_micro_batch_size_per_gpu": micro,
                "gradient_accumulation_steps": per_step // micro,
            }
            yield _Change(f"micro-batch {micro} x {per_step // micro} accumulated", "micro", keys)
    for name, planner in planners().items():
        section = loaded.section(name)
        for saving in () if section is None else planner.savings(section):
            yield _Change(saving.description, name, {name: dict(saving.values)})
    if not plan.options.recompute and plan.source.shape is not None:
        yield _Change("recompute activations block by block", "recompute", recompute=True)
    nodes = plan.cluster.nodes * 2
    while nodes * plan.cluster.gpus_per_node <= MAX_RANKS:
        yield _Change(f"{nodes} nodes instead of {plan.cluster.nodes}", "nodes", nodes=nodes)
        nodes *= 2


def _strongest(changes: list[_Change], last: _Change) -> tuple[_Change, ...]:
    """`last` together with the most saving change of every other kind."""
    others = {change.kind: change for change in changes if change.kind != last.kind}
    return (*others.values(), last)


def _first_of_each_kind(
    document: Any, plan: Plan, candidates: list[tuple[_Change, ...]]
) -> list[Remedy]:
    found: dict[tuple[str, ...], Remedy] = {}
    for changes in candidates:
        kinds = tuple(change.kind for change in changes)
        if kinds in found:
            continue
        changed = _apply(document, plan, changes)
        if changed is not None and changed.fits:
            told = " and ".join(change.description for change in changes)
            found[kinds] = Remedy(told, changed)
    return list(found.values())


def _apply(document: Any, plan: Plan, changes: tuple[_Change, ...]) -> Plan | None:
    """The plan with the changes; None if the config cannot be honoured with them."""
    data = dict(read(document).data)
    batch = plan.config
    # The global batch stays, whatever the file left open.
    data["train_batch_size"] = batch.train_batch_size
    data["train_micro_batch_size_per_gpu"] = batch.train_micro_batch_size_per_gpu
    given_batch = "train_batch_size" in read(document).data
    data.pop("gradient_accumulation_steps", None)
    options, cluster = plan.options, plan.cluster
    for change in changes:
        for key, value in change.keys.items():
            if key == "gradient_accumulation_steps":
                continue  # follows from the other two
            old = data.get(key)
            data[key] = {**old, **value} if isinstance(old, dict) else value
        options = replace(options, recompute=options.recompute or change.recompute)
        if change.nodes is not None:
            cluster = Cluster(change.nodes, cluster.gpus_per_node, cluster.device)
            per_pass = data["train_micro_batch_size_per_gpu"] * cluster.size
            if not given_batch and batch.train_batch_size % per_pass:
                del data["train_batch_size"]  # it follows from the ranks, and grows with them
    try:
        return make_plan(data, plan.source, cluster, options)
    except (ConfigError, PlanError):
        return None
