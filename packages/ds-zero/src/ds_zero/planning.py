"""What ZeRO holds and sends, by arithmetic on the layouts that a real run would make.

Entry point of `ds_core.planners`: `ds plan` and `ds tune` ask it. Exact for the state between
steps and for the messages of a step; see `ds_zero.unit` for what the buffers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ds_core.config import Section
from ds_core.errors import PlanError
from ds_core.planning import Costs, Message, SectionChange, Workload
from ds_core.planning.costs import Kind, Phase
from ds_zero.checks import NOT_ELEMENTWISE
from ds_zero.config import OffloadOptimizerSection, OffloadParamSection, ZeroSection
from ds_zero.holdings import Place, by_place, in_memory
from ds_zero.memory_plan import buffer_bytes
from ds_zero.plan import ParamSpec, plan_units
from ds_zero.sharding import leaf_selectors
from ds_zero.unit_plan import Setup, UnitPlan, plan_unit_buffers

#: Bytes per second, where nobody has measured: a rank's share of host memory and of the link
#: between host and device; a node's disk.
_HOST_BANDWIDTH, _LINK_BANDWIDTH, _DISK_BANDWIDTH = 20e9, 25e9, 2e9


class ZeroPlanner:
    """Answers for the `zero_optimization` section (a `ds_core.planning.Planner`)."""

    def costs(self, section: Section, workload: Workload) -> Costs | None:
        """What one rank holds and sends; None at stage 0."""
        if not isinstance(section, ZeroSection) or section.stage == 0:
            return None
        if workload.optimizer.class_name in NOT_ELEMENTWISE:
            raise PlanError(
                f"optimizer.type: {workload.optimizer.name} computes its update from whole "
                f"matrices, and ZeRO hands it flat shards; use an elementwise one such as AdamW, "
                f"or zero_optimization.stage 0"
            )
        if section.update_in_backward and workload.scales_gradients:
            raise PlanError(
                "zero_optimization.update_in_backward: got true with gradient_clipping or a loss "
                "scale, which need all gradients first; leave out one of them"
            )
        units = _plan(section, workload)
        places = by_place(each for unit in units for each in unit.holdings())
        memory = in_memory(places)
        # What takes steps back is there from backward on.
        buffers = buffer_bytes(units) + sum(unit.undo() for unit in units)
        trained = sum(unit.own for unit in units if unit.spec.trainable)
        updated = memory["gradients"] if section.stage > 1 else trained * 4
        updated += 2 * (memory["master"] + memory["optimizer"])
        updated += trained * units[0].dtype.itemsize * (1 if memory["master"] else 2)
        offloads = len(places) > 1 or (not workload.is_host and "host" in places)
        recast = max((unit.recast() for unit in units), default=0)
        here = buffers if workload.is_host else 0
        return Costs(
            sharding=f"ZeRO stage {section.stage}, {len(units)} units over "
            f"{workload.data_ranks} ranks{_told(section)}",
            memory=memory,
            computing_bytes=_computing_bytes(units) + here,
            updating_bytes=recast + here,
            update_traffic_bytes=_on_device(units, updated),
            messages=tuple(_messages(section.stage, units, workload)),
            notes=_notes(units, offloads),
            by_tier=_tiers(places, workload) if offloads else {},
            host_buffers=0 if workload.is_host else buffers,
            offload_seconds=_offload_seconds(units, workload),
        )

    def savings(self, section: Section) -> Iterator[SectionChange]:
        """Updates in backward, the higher stages, states and shards on the host or on disk."""
        if not isinstance(section, ZeroSection) or section.stage == 0:
            for stage in (1, 2, 3):
                yield SectionChange(f"ZeRO stage {stage}", {"stage": stage})
            return
        if not section.update_in_backward:
            yield SectionChange("update_in_backward", {"update_in_backward": True})
        for higher in range(section.stage + 1, 4):
            yield SectionChange(f"ZeRO stage {higher}", {"stage": higher})
        states = _device_of(section.offload_optimizer)
        if states == "none":
            told, values = _offloaded("offload_optimizer", "cpu", section.offload_optimizer)
            yield SectionChange(told, {**values, "stage": section.stage})
        told, values = _offloaded("offload_optimizer", "nvme", section.offload_optimizer)
        if states != "nvme":
            yield SectionChange(told, {**values, "stage": section.stage})
        if _device_of(section.offload_param) != "nvme":
            shards, more = _offloaded("offload_param", "nvme", section.offload_param)
            both = {**values, **more, "stage": 3}
            yield SectionChange(f"ZeRO stage 3, {told}, {shards}", both)


_Offloads = OffloadOptimizerSection | OffloadParamSection | None


def _device_of(section: _Offloads) -> str:
    return "none" if section is None else section.device


def _offloaded(key: str, device: str, present: _Offloads) -> tuple[str, dict[str, Any]]:
    """What a user would call it, and the keys of the section."""
    values: dict[str, Any] = {"device": device}
    if device == "nvme":
        # The path is the user's to choose; nothing is opened for a plan.
        values["nvme_path"] = (present.nvme_path if present is not None else None) or "/local_nvme"
        if key == "offload_param":
            values["max_in_cpu"] = 0
    return f"{key} on {device}", {key: values}


def _told(section: ZeroSection) -> str:
    told = [
        f", {key} on {_device_of(part)}"
        for key, part in (
            ("optimizer", section.offload_optimizer),
            ("parameters", section.offload_param),
        )
        if _device_of(part) != "none"
    ]
    return "".join(told) + (", updates in backward" if section.update_in_backward else "")


def _plan(section: ZeroSection, work: Workload) -> list[UnitPlan]:
    specs = [
        ParamSpec(name, param, 0 if param.requires_grad else None)
        for name, param in work.model.named_parameters()
    ]
    units = plan_units(work.model, specs, leaves=leaf_selectors(section, work.model))
    setup = Setup(
        stage=section.stage,
        group_of=lambda spec: (work.data_ranks, work.rank),
        precision=work.precision,
        state_bytes=lambda group, numel, dtype: work.optimizer.flat_bytes(numel, dtype),
        gap_bytes=lambda group, numel, dtype: work.optimizer.gap_bytes(numel, dtype),
        offload=section.offload(),
        update_in_backward=section.update_in_backward,
        accumulation=work.accumulation,
        zenflow=None if section.zenflow is None else section.zenflow.choice(),
        prefetch=1 if section.stage3_prefetch_bucket_size else 0,
        is_host=work.is_host,
    )
    return plan_unit_buffers(units, setup)


def _tiers(
    places: Mapping[Place, Mapping[str, int]], work: Workload
) -> dict[str, Mapping[str, int]]:
    """With a CPU its memory is the device's."""
    near = {"host": "device"} if work.is_host else {}
    return {near.get(place, place): kinds for place, kinds in places.items()}


def _on_device(units: list[UnitPlan], updated: int) -> int:
    """The part of an update's traffic that is in the memory of the device."""
    trained = sum(unit.own for unit in units if unit.spec.trainable)
    stays = sum(u.own for u in units if u.spec.trainable and not u.crosses)
    return updated * stays // max(1, trained)


def _offload_seconds(units: list[UnitPlan], work: Workload) -> float:
    """What offloaded states and shards take in a step, nothing beside anything else."""
    seconds = 0.0
    for unit in units:
        shard, moves = unit.own * unit.dtype.itemsize, 2 * work.accumulation
        if unit.shard == "disk":
            seconds += (moves + 1) * shard / _DISK_BANDWIDTH
        elif unit.shard != unit.setup.near:
            seconds += (moves + 1) * shard / _LINK_BANDWIDTH
        states = sum(h.nbytes for h in unit.holdings() if h.kind in ("master", "optimizer"))
        if unit.states == "disk":
            seconds += 2 * states / _DISK_BANDWIDTH
        if unit.crosses:
            seconds += 2 * states / _HOST_BANDWIDTH
            seconds += unit.own * (unit.grad_dtype.itemsize + unit.dtype.itemsize) / _LINK_BANDWIDTH
    return seconds


def _computing_bytes(units: list[UnitPlan]) -> int:
    """Full parameters and gradients that come and go: the root's, and those of two units."""
    roots = [unit for unit in units if unit.spec.is_root]
    others = sorted((u for u in units if not u.spec.is_root), key=lambda u: -u.full_bytes)[:2]
    return sum(unit.gathered() + unit.local_gradients() for unit in [*roots, *others])


def _messages(stage: int, units: list[UnitPlan], work: Workload) -> Iterator[Message]:
    ranks, passes = work.data_ranks, work.accumulation
    if ranks == 1:
        return
    trained = [unit for unit in units if unit.spec.trainable]
    reduces_each = stage >= 2 or any(unit.grad_dtype != unit.dtype for unit in trained)
    for unit in trained:
        times = passes if reduces_each else 1
        phase: Phase = "backward" if reduces_each else "last backward"
        wire = work.wire or unit.dtype
        yield _message("reduce_scatter", unit, "gradients", phase, times, ranks, wire)
        if unit.stage < 3:
            yield _message("all_gather", unit, "parameters", "update", 1, ranks)
    if stage == 3:
        yield from _gathers(units, passes, ranks)
    if trained:
        flags = 8 * (3 + sum(len(unit.spec.params) for unit in trained))
        yield Message(
            "all_gather", "gradient norm", "dp", "control", "update", 1, (ranks - 1) * flags
        )


def _gathers(units: list[UnitPlan], passes: int, ranks: int) -> Iterator[Message]:
    has_gradient = False
    for unit in units:
        has_gradient = has_gradient or unit.spec.trainable
        yield _message("all_gather", unit, "parameters", "forward", passes, ranks)
        # The root stays whole until the end of backward, and what lies before everything that is
        # trained has no backward.
        if has_gradient and not unit.spec.is_root:
            yield _message("all_gather", unit, "parameters", "backward", passes, ranks)
    if not all(unit.spec.is_root for unit in units):
        calls = 2 * passes
        yield Message(
            "all_gather", "gather order", "dp", "control", "forward", calls, calls * 8 * (ranks - 1)
        )


def _message(
    op: str,
    unit: UnitPlan,
    kind: Kind,
    phase: Phase,
    times: int,
    ranks: int,
    dtype: torch.dtype | None = None,
) -> Message:
    sent = times * (ranks - 1) * unit.own * (dtype or unit.dtype).itemsize
    return Message(
        op,
        unit.spec.name,
        "x".join(unit.spec.placement.grad_axes),
        kind,
        phase,
        times,
        sent,
    )


def _notes(units: list[UnitPlan], offloads: bool) -> tuple[str, ...]:
    notes = []
    if units[0].stage == 3:
        notes.append("stage 3: every unit is used by its own modules, once in each forward")
    if offloads:
        notes.append(
            f"offload: a rank's share of host memory moves {_HOST_BANDWIDTH / 1e9:g} GB/s, of the "
            f"link to its device {_LINK_BANDWIDTH / 1e9:g} GB/s, of the disk "
            f"{_DISK_BANDWIDTH / 1e9:g} GB/s; none of it beside anything else"
        )
    return tuple(notes)
