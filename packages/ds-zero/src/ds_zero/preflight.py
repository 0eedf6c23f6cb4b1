"""Before anything is allocated: the plan of a run, and an error on all ranks if it does not fit."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ds_core import comm, ops
from ds_core.errors import DsError
from ds_core.optimizer_state import allocate_state_of, is_wide
from ds_core.precision import Precision
from ds_zero.errors import ShardError
from ds_zero.fitting import least_change
from ds_zero.host_steps.combinations import check_combination
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.memory_plan import MemoryPlan, complaints, planned
from ds_zero.offload.choice import Offload
from ds_zero.plan import ParamSpec, Selector, UnitSpec, plan_units
from ds_zero.room import Room, measure
from ds_zero.unit_plan import Setup, StateBytes, UnitPlan, plan_unit_buffers

logger = logging.getLogger(__name__)

_PROBE_NUMEL = 8


def memory_plan(
    model: nn.Module,
    stage: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    world_size: int = 1,
    rank: int = 0,
    local_ranks: int = 1,
    precision: Precision | None = None,
    offload: Offload | None = None,
    update_in_backward: bool = False,
    accumulation: int = 1,
    prefetch: int = 1,
    units: Iterable[Selector] | None = None,
    leaf_modules: Iterable[Selector] = (),
    min_unit_numel: int = 1 << 18,
    max_grad_norm: float | None = None,
    activations: int | None = None,
    device: torch.device | str | None = None,
    room: Room | None = None,
    zenflow: ZenFlow | None = None,
) -> MemoryPlan:
    """What `ds_zero.shard` with the same arguments will hold on each tier, without allocating it.

        print(ds_zero.memory_plan(model, 2, world_size=8, offload=Offload("cpu")).table())

    Not collective, and needs no processes.

    Args:
        model: on any device; "meta" for one that has no memory yet.
        stage: 1, 2 or 3.
        optimizer: whose states are counted; default: AdamW.
        world_size, rank: over how many ranks, and which of them is meant.
        local_ranks: ranks on this host, which share its memory and disks.
        precision, offload, update_in_backward, accumulation, prefetch, units, leaf_modules,
            min_unit_numel, max_grad_norm, zenflow: as `shard` takes them.
        activations: bytes of one micro-batch, if known.
        device: on which it will compute; default: the model's, the CPU for "meta".
        room: what is free; default: measured here and now.

    Raises ShardError for a stage or a number of ranks that makes no sense, and for what `shard`
    refuses to combine.
    """
    if stage not in (1, 2, 3):
        raise ShardError(f"stage: got {stage!r}, expected 1, 2 or 3")
    if not 0 <= rank < world_size:
        raise ShardError(f"rank: got {rank} of world_size {world_size}, expected 0 or more, below")
    if accumulation < 1:
        raise ShardError(f"accumulation: got {accumulation}, expected at least 1")
    offload = offload or Offload()
    check_combination(stage, offload, update_in_backward=update_in_backward, zenflow=zenflow)
    group_of: dict[int, int] = {}
    for index, group in enumerate([] if optimizer is None else optimizer.param_groups):
        group_of.update((id(param), index) for param in group["params"])
    specs = [
        ParamSpec(name, p, group_of.get(id(p), 0) if p.requires_grad else None)
        for name, p in model.named_parameters()
    ]
    where = torch.device(device) if device is not None else specs[0].param.device
    setup = Setup(
        stage=stage,
        group_of=lambda spec: (world_size, rank),
        precision=precision or Precision(),
        state_bytes=state_bytes_of(optimizer, where),
        offload=offload,
        update_in_backward=update_in_backward,
        accumulation=accumulation,
        zenflow=zenflow,
        prefetch=prefetch,
        is_host=where.type in ("cpu", "meta"),
    )
    plan = plan_units(model, specs, units=units, leaves=leaf_modules, min_unit_numel=min_unit_numel)
    found = room or measure(torch.device("cpu") if setup.is_host else where, folders_of(offload))
    return _advised(
        plan, setup, found, local_ranks, clips=max_grad_norm is not None, activations=activations
    )


def check_memory(
    specs: Sequence[UnitSpec],
    setup: Setup,
    group: comm.Group,
    *,
    device: torch.device,
    clips: bool,
) -> MemoryPlan:
    """The plan of this rank, logged; raises ShardError on all ranks of `group` if one does not fit.

    Args:
        specs: the units.
        setup: how the model is sharded.
        group: the ranks that shard it.
        device: on which it computes.
        clips: whether gradients are clipped.

    Collective.
    """
    room = measure(device, folders_of(setup.offload))
    mine = _planned(plan_unit_buffers(specs, setup), room, 1)
    everybody: list[MemoryPlan] = comm.all_gather_object(mine, group, caller="memory plan")
    local = sum(plan.room.host_name == room.host_name for plan in everybody)
    mine = replace(mine, local_ranks=local)
    wrong = complaints(everybody)
    if not wrong:
        logger.info("%s", mine.table())
        return mine
    advice = _advised(specs, setup, room, local, clips=clips).advice
    told = "\n".join(wrong)
    raise ShardError(
        f"memory: a rank cannot hold its part of the model.\n{told}\n"
        f"{replace(mine, advice=advice).table()}"
        f"(check_memory=False tries all the same)"
    )


def folders_of(offload: Offload) -> list[str]:
    """The folders of swap files."""
    folders = []
    if offload.optimizer == "nvme":
        folders.append(offload.folder)
    if offload.parameters == "nvme":
        folders.append(offload.folder_of_parameters)
    return [folder for folder in folders if folder]


def _planned(
    units: Sequence[UnitPlan], room: Room, local_ranks: int, activations: int | None = None
) -> MemoryPlan:
    return planned(
        units, title=_title(units), room=room, local_ranks=local_ranks, activations=activations
    )


def _advised(
    specs: Sequence[UnitSpec],
    setup: Setup,
    room: Room,
    local_ranks: int,
    *,
    clips: bool,
    activations: int | None = None,
) -> MemoryPlan:
    def plan_of(units: Sequence[UnitPlan]) -> MemoryPlan:
        return _planned(units, room, local_ranks, activations)

    plan = plan_of(plan_unit_buffers(specs, setup))
    if plan.fits:
        return plan
    return replace(plan, advice=least_change(specs, setup, plan_of, clips=clips))


def _title(units: Sequence[UnitPlan]) -> str:
    setup, first = units[0].setup, units[0]
    ranks, rank = setup.group_of(first.spec)
    told = [
        f"ZeRO stage {setup.stage}, {len(units)} units over {ranks} ranks, rank {rank}",
        "+".join(sorted({str(u.dtype).removeprefix("torch.") for u in units})),
    ]
    if setup.offload.optimizer != "device":
        told.append(f"optimizer on {setup.offload.optimizer}")
    if setup.offload.parameters != "device":
        told.append(f"parameters on {setup.offload.parameters}")
    if setup.offload.ratio != 1.0:
        told.append(f"ratio {setup.offload.ratio}")
    if setup.offload.speculative:
        told.append("speculative steps")
    if setup.zenflow is not None:
        told.append("ZenFlow")
    if setup.accumulation > 1:
        told.append(f"{setup.accumulation} micro-batches a step")
    if setup.update_in_backward:
        told.append("updates in backward")
    return "; ".join(told)


# ---------------------------------------------------------------------- optimizers


def state_bytes_of(optimizer: torch.optim.Optimizer | None, device: torch.device) -> StateBytes:
    """Bytes of state that an optimizer keeps, found by a step of its twin on a tiny parameter.

    The optimizer itself stays as it is. Of one that cannot step on a flat parameter nothing is
    counted, and a warning says so.
    """
    if optimizer is None:
        # Imported here: it brings pydantic, which a loop of one's own does not need.
        from ds_core.planning.optimizer_state import OptimizerState

        adamw = OptimizerState(None)
        return lambda group, numel, dtype: adamw.flat_bytes(numel, dtype)
    told = getattr(optimizer, "state_bytes", None)
    if told is not None:
        return lambda group, numel, dtype: int(told(numel))
    found: dict[tuple[int, torch.dtype], float] = {}
    home = torch.device("cpu") if device.type == "meta" else device

    def state_bytes(group: int, numel: int, dtype: torch.dtype) -> int:
        if (group, dtype) not in found:
            found[group, dtype] = _probed(optimizer, group, dtype, home)
        return round(numel * found[group, dtype])

    return state_bytes


def _probed(
    optimizer: torch.optim.Optimizer, group: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Bytes of state per element."""
    shaped = [param for param in optimizer.param_groups[group]["params"] if param.dim() > 0]
    if optimizer.state and shaped:
        # It allocates before its first step, as Adagrad does.
        held = optimizer.state.get(shaped[0], {}).values()
        return dtype.itemsize * sum(is_wide(v) for v in held)
    twin = object.__new__(type(optimizer))
    # Without what a schedule put in its place, and without hooks: nobody shall see the step.
    own = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
    hooks = [key for key in own if key.startswith("_optimizer_")]
    twin.__dict__.update(own, state=defaultdict(dict), **{key: OrderedDict() for key in hooks})
    with torch.device(device):
        tiny = nn.Parameter(torch.zeros(_PROBE_NUMEL, dtype=dtype))
    twin.param_groups = [{**optimizer.param_groups[group], "params": [tiny]}]
    try:
        with ops.use(**dict.fromkeys(getattr(optimizer, "ops", ()), "reference")):
            allocate_state_of(twin, twin.param_groups[0], tiny)
    except (DsError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        logger.warning(
            "memory plan: what %s keeps per parameter is not known, and counts as nothing: %s",
            type(optimizer).__name__,
            error,
        )
        return 0.0
    wide = [v for v in twin.state[tiny].values() if isinstance(v, torch.Tensor) and v.dim()]
    return sum(value.numel() * value.element_size() for value in wide) / _PROBE_NUMEL
