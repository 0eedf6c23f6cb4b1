"""From a model and an optimizer to units: laid out, filled, and handed to the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ds_core import comm
from ds_core.fused import prefer_fused
from ds_core.optimizer_state import allocate_state_of
from ds_zero import checks, inner_step, preflight
from ds_zero.choices import Choices
from ds_zero.errors import ShardError
from ds_zero.memory_plan import MemoryPlan
from ds_zero.offload.choice import is_host
from ds_zero.offload.homes import Homes
from ds_zero.plan import UnitSpec
from ds_zero.unit import Unit
from ds_zero.unit_plan import Setup

#: By a shard of the optimizer: the state that it has before its first step.
_States = dict[torch.Tensor, dict[str, Any]]


def checked_memory(
    specs: Sequence[UnitSpec], optimizer: torch.optim.Optimizer, mesh: comm.Mesh, choices: Choices
) -> MemoryPlan:
    """What this rank needs; raises ShardError on all ranks if it is too much on one. Collective."""
    device = specs[0].params[0].param.device

    def member(spec: UnitSpec) -> tuple[int, int]:
        group = mesh.group(*spec.placement.grad_axes)
        return group.size, group.rank

    setup = Setup(
        choices.stage,
        member,
        choices.precision,
        preflight.state_bytes_of(optimizer, device),
        choices.offload,
        choices.update_in_backward,
        accumulation=choices.accumulation,
        zenflow=choices.zenflow,
        prefetch=choices.prefetch,
        is_host=is_host(device),
    )
    group = mesh.group("dp")
    return preflight.check_memory(specs, setup, group, device=device, clips=choices.clips)


def build_units(
    specs: Sequence[UnitSpec],
    optimizer: torch.optim.Optimizer,
    mesh: comm.Mesh,
    homes: Homes,
    choices: Choices,
) -> list[Unit]:
    """The units of a model, whose parameters are views of them from now on. Collective.

    The groups of `optimizer` hold flat shards afterwards.
    """
    groups = [mesh.group(*spec.placement.grad_axes) for spec in specs]
    lanes = {id(group): _reduce_lane(group, choices.stage) for group in groups}
    tiers = choices.offload.states_of([_trained_numel(spec) for spec in specs])
    units: list[Unit] = []
    on_disk: _States = {}
    for index, (spec, group, states) in enumerate(zip(specs, groups, tiers, strict=True)):
        unit = Unit(
            index,
            spec,
            group,
            stage=choices.stage,
            precision=choices.precision,
            values=checks.full_value,
            broadcast=choices.broadcast,
            transport=choices.transport,
            reduce_group=lanes[id(group)],
            homes=homes,
            states=states,
            consumed=choices.update_in_backward,
        )
        units.append(unit)
        # One unit after the other: only one is whole, and in memory if it lives on disk.
        if unit.states == "nvme":
            on_disk.update(_put_on_disk(unit, optimizer))
        if unit.stage == 3:
            unit.free(_NOBODY)
    _hand_over([unit for unit in units if unit.trainable], optimizer, on_disk)
    return units


def _reduce_lane(group: comm.Group, stage: int) -> comm.Group:
    """Where gradients travel: at stage 3 in an order of their own, since gathers come between."""
    return group.lane("gradients") if stage == 3 else group


def _trained_numel(spec: UnitSpec) -> int:
    """Elements of a unit that an optimizer updates; all of them or none."""
    return sum(each.param.numel() for each in spec.params) if spec.trainable else 0


def _put_on_disk(unit: Unit, optimizer: torch.optim.Optimizer) -> _States:
    """Allocate the states of a unit that lives on disk, and write them; their small parts."""
    initial = inner_step.initial_state(optimizer, [unit])
    kept: _States = {}
    for piece in unit.optimizer_pieces:
        if piece.weights in initial:
            optimizer.state[piece.weights] = initial[piece.weights]
        else:
            group = optimizer.param_groups[piece.group_index]
            with unit.present(piece, edits=False):
                allocate_state_of(optimizer, group, piece.weights)
            unit.unstepped.add(piece.weights)
        unit.put_on_disk(piece, optimizer)
        kept[piece.weights] = optimizer.state[piece.weights]
    unit.drop_master()
    return kept


def _hand_over(units: list[Unit], optimizer: torch.optim.Optimizer, on_disk: _States) -> None:
    """Make the optimizer's groups hold flat shards in place of the model's parameters."""
    pieces: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for unit in units:
        for piece in unit.optimizer_pieces:
            pieces[piece.group_index].append(piece.weights)
    others = [unit for unit in units if unit.states != "nvme"]
    initial = inner_step.initial_state(optimizer, others)
    for group, params in zip(optimizer.param_groups, pieces, strict=True):
        group["params"] = params
    optimizer.state.clear()
    optimizer.state.update({**initial, **on_disk})
    inner_step.number_pieces(optimizer, units)
    prefer_fused(optimizer)


class _Nobody:
    """Keeps a sharded parameter while the optimizer is being built."""

    detaches_later = values_stay = False

    def touch(self, params: list[nn.Parameter], operation: str) -> None:
        """See `sharded_param.Keeper`."""
        raise ShardError(f"{operation} needs a parameter of a model that is being sharded")


_NOBODY = _Nobody()
