"""What ZeRO holds and sends, by arithmetic on the layouts that a real run would make.

Entry point of `ds_core.planners`: `ds plan` and `ds tune` ask it. Exact for the state between
steps and for the messages of a step; see `ds_zero.unit` for what the buffers are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ds_core.config import Section
from ds_core.errors import PlanError
from ds_core.flat import FlatLayout
from ds_core.planning import Costs, Message, SectionChange, Workload
from ds_core.planning.costs import Kind, Phase
from ds_zero.checks import NOT_ELEMENTWISE
from ds_zero.config import ZeroSection
from ds_zero.plan import ParamSpec, UnitSpec, plan_units
from ds_zero.sharding import leaf_selectors
from ds_zero.unit import unit_layout


@dataclass(frozen=True)
class _UnitPlan:
    """The buffers of one unit, as `ds_zero.unit.Unit` will make them."""

    spec: UnitSpec
    layout: FlatLayout
    stage: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    master: torch.dtype | None

    @property
    def numel(self) -> int:
        return self.layout.numel

    @property
    def own(self) -> int:
        return self.layout.shard_numel

    @property
    def full_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def has_grad_in_twin(self) -> bool:
        return self.stage == 1 and self.spec.trainable and self.grad_dtype == self.dtype

    @property
    def stepped(self) -> torch.dtype:
        """Dtype of what the optimizer updates."""
        return self.master or self.dtype


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
        units = _plan(section, workload)
        memory = _memory(units, workload)
        trained = sum(unit.own for unit in units if unit.spec.trainable)
        updated = memory["gradients"] if section.stage > 1 else trained * 4
        updated += 2 * (memory["master"] + memory["optimizer"])
        updated += trained * units[0].dtype.itemsize * (1 if memory["master"] else 2)
        return Costs(
            sharding=f"ZeRO stage {section.stage}, {len(units)} units over "
            f"{workload.data_ranks} ranks",
            memory=memory,
            computing_bytes=_computing_bytes(units),
            updating_bytes=max(
                (unit.own * unit.stepped.itemsize for unit in units if _recasts(unit)), default=0
            ),
            update_traffic_bytes=updated,
            messages=tuple(_messages(section.stage, units, workload)),
            notes=_notes(units),
        )

    def savings(self, section: Section) -> Iterator[SectionChange]:
        """The higher stages."""
        stage = section.stage if isinstance(section, ZeroSection) else 0
        for higher in range(stage + 1, 4):
            yield SectionChange(f"ZeRO stage {higher}", {"stage": higher})


def _plan(section: ZeroSection, work: Workload) -> list[_UnitPlan]:
    specs = [
        ParamSpec(name, param, 0 if param.requires_grad else None)
        for name, param in work.model.named_parameters()
    ]
    units = plan_units(work.model, specs, leaves=leaf_selectors(section, work.model))
    return [_unit(spec, section.stage, work) for spec in units]


def _unit(spec: UnitSpec, stage: int, work: Workload) -> _UnitPlan:
    compute = work.precision.compute if spec.dtype.is_floating_point else None
    dtype = compute or spec.dtype
    master = None
    if work.precision.master is not None and spec.trainable:
        wide = torch.promote_types(dtype, work.precision.master)
        master = None if wide == dtype else wide
    return _UnitPlan(
        spec,
        unit_layout(spec, dtype, work.data_ranks),
        stage if work.data_ranks > 1 else min(stage, 2),
        dtype,
        work.precision.grad or dtype,
        master,
    )


def _memory(units: list[_UnitPlan], work: Workload) -> dict[str, int]:
    total = dict.fromkeys(("parameters", "gradients", "master", "optimizer", "padding"), 0)
    for unit in units:
        pieces = unit.layout.pieces(work.rank)
        held = sum(piece.stop - piece.start for piece in pieces)
        own_gap, full_gap = unit.own - held, unit.layout.padding
        is_cut = unit.stage == 3
        total["parameters"] += (unit.own if is_cut else unit.numel) * unit.dtype.itemsize
        total["padding"] += (own_gap if is_cut else full_gap) * unit.dtype.itemsize
        if not unit.spec.trainable:
            continue
        whole = unit.has_grad_in_twin
        total["gradients"] += (unit.numel if whole else unit.own) * unit.grad_dtype.itemsize
        total["padding"] += (full_gap if whole else own_gap) * unit.grad_dtype.itemsize
        if unit.master is not None:
            total["master"] += unit.own * unit.master.itemsize
            total["padding"] += own_gap * unit.master.itemsize
        if pieces:
            # The optimizer steps on the part from the first parameter's start to the last's end.
            last = pieces[-1]
            reach = last.offset + last.stop - last.start - pieces[0].offset
            total["optimizer"] += work.optimizer.flat_bytes(reach, unit.stepped)
            total["padding"] += work.optimizer.gap_bytes(reach - held, unit.stepped)
    return total


def _computing_bytes(units: list[_UnitPlan]) -> int:
    """Full parameters and gradients that come and go: the root's, and those of two units."""
    roots = [unit for unit in units if unit.spec.is_root]
    others = sorted((u for u in units if not u.spec.is_root), key=lambda u: -u.full_bytes)[:2]
    live = [*roots, *others]
    whole = sum(unit.full_bytes for unit in live if unit.stage == 3)
    twins = sum(u.full_bytes for u in live if u.spec.trainable and not u.has_grad_in_twin)
    return whole + twins


def _recasts(unit: _UnitPlan) -> bool:
    return unit.spec.trainable and unit.grad_dtype != unit.stepped


def _messages(stage: int, units: list[_UnitPlan], work: Workload) -> Iterator[Message]:
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
        flags = 8 * (1 + sum(len(unit.spec.params) for unit in trained))
        yield Message(
            "all_gather", "gradient norm", "dp", "control", "update", 1, (ranks - 1) * flags
        )


def _gathers(units: list[_UnitPlan], passes: int, ranks: int) -> Iterator[Message]:
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
    unit: _UnitPlan,
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


def _notes(units: list[_UnitPlan]) -> tuple[str, ...]:
    if units[0].stage < 3:
        return ()
    return ("stage 3: every unit is used by its own modules, once in each forward",)
