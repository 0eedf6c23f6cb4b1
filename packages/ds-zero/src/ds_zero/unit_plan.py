"""What units will hold, by arithmetic on the layouts that a real run makes: nothing is allocated.

`UnitPlan` says of one unit what `ds_zero.unit.Unit` does: where its shard, gradients and states
live, and how large they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ds_core.flat import FlatLayout
from ds_core.precision import Precision
from ds_zero.holdings import Holding, Place
from ds_zero.host_steps.zenflow import ZenFlow, at_most_important, state_itemsize
from ds_zero.offload.buffers import whole_pages
from ds_zero.offload.choice import Offload
from ds_zero.plan import UnitSpec
from ds_zero.unit_piece import optimizer_ranges, unit_layout

#: Bytes of optimizer state of (group, number of elements, their dtype).
StateBytes = Callable[[int, int, torch.dtype], int]
#: (number of ranks, this one) over which a unit is sharded.
GroupOf = Callable[[UnitSpec], tuple[int, int]]


@dataclass(frozen=True)
class Setup:
    """How a model is sharded.

    Attributes:
        stage: 1, 2 or 3.
        group_of: who shares a unit.
        precision: dtypes of parameters, master copy and gradients.
        state_bytes: what the optimizer keeps.
        offload: what leaves the device.
        update_in_backward: whether gradients are used up in backward.
        accumulation: micro-batches per step.
        zenflow: how parts of a shard are stepped apart, if they are.
        prefetch: units gathered ahead at stage 3.
        is_host: whether the model computes on the CPU, so that "cpu" is no other memory.
        gap_bytes: what of `state_bytes` elements of no parameter have; default: as others.
    """

    stage: int
    group_of: GroupOf
    precision: Precision
    state_bytes: StateBytes
    offload: Offload = field(default_factory=Offload)
    update_in_backward: bool = False
    accumulation: int = 1
    zenflow: ZenFlow | None = None
    prefetch: int = 1
    is_host: bool = False
    gap_bytes: StateBytes | None = None

    @property
    def near(self) -> Place:
        """Where the model computes."""
        return "host" if self.is_host else "device"

    @property
    def shards_leave(self) -> bool:
        """Whether shards of parameters have a home elsewhere."""
        tier = self.offload.parameters
        return tier == "nvme" or (tier == "cpu" and not self.is_host)

    @property
    def may_move(self) -> bool:
        """Whether states change sides once both have been measured."""
        return self.offload.ratio == "auto" and not self.is_host


@dataclass(frozen=True)
class UnitPlan:
    """The buffers of one unit, as `ds_zero.unit.Unit` will make them.

    Attributes:
        spec: its parameters.
        setup: how it is sharded.
        layout: of its flat buffer.
        rank: whose part is meant.
        stage: at which it is; with one rank there is nothing to gather.
        dtype, grad_dtype: of parameters and accumulated gradients.
        master: dtype of the most precise copy, None if it is the shard itself.
        states, shard: where the optimizer's states, and the shard, live.
        leaves: whether the states were sent from the device, be it to the same memory.
    """

    spec: UnitSpec
    setup: Setup
    layout: FlatLayout
    rank: int
    stage: int
    dtype: torch.dtype
    grad_dtype: torch.dtype
    master: torch.dtype | None
    states: Place
    shard: Place
    leaves: bool = False

    # ------------------------------------------------------------------ sizes

    @property
    def numel(self) -> int:
        """Elements of all parameters, padding included."""
        return self.layout.numel

    @property
    def own(self) -> int:
        """Elements of this rank's shard."""
        return self.layout.shard_numel

    @property
    def gap(self) -> int:
        """Elements of the shard that belong to no parameter."""
        return self.own - sum(p.stop - p.start for p in self.layout.pieces(self.rank))

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole parameters."""
        return self.numel * self.dtype.itemsize

    @property
    def stepped(self) -> torch.dtype:
        """Dtype of what the optimizer updates."""
        return self.master or self.dtype

    @property
    def crosses(self) -> bool:
        """Whether gradients leave the device, and weights come back."""
        return self.states != self.setup.near and not self.setup.is_host

    @property
    def has_grad_in_twin(self) -> bool:
        """Whether the averaged gradient lies among the local ones."""
        alone = self.setup.stage == 1 or self.layout.num_shards == 1
        return alone and self.spec.trainable and self.grad_dtype == self.dtype and not self.crosses

    def ranges(self) -> list[tuple[int, int, int]]:
        """(group, start, stop) of what the optimizer steps on."""
        if not self.spec.trainable:
            return []
        limit = self.setup.offload.piece_numel if self.states == "disk" else None
        return optimizer_ranges(self.spec.params, self.layout, self.rank, limit)

    # ------------------------------------------------------------------ what is held

    def holdings(self) -> Iterator[Holding]:
        """What outlives a step, bit for bit as `ZeroOptimizer.memory_by_tier` counts it."""
        size, near = self.dtype.itemsize, self.setup.near
        if self.stage == 3:
            yield Holding(self.shard, "parameters", self.own * size, self.gap * size)
        else:
            yield Holding(near, "parameters", self.full_bytes, self.layout.padding * size)
        if not self.spec.trainable:
            return
        yield from self._gradients()
        if self.master is not None and self.states != "disk":
            size = self.master.itemsize
            yield Holding(self.states, "master", self.own * size, self.gap * size)
        parts = self.layout.pieces(self.rank)
        for group, start, stop in self.ranges():
            inside = (p.stop - p.start for p in parts if start <= p.offset < stop)
            gap = stop - start - sum(inside)
            if self.master is not None and self.states == "disk":
                size = self.master.itemsize
                yield Holding("disk", "master", (stop - start) * size, gap * size)
            state = self.setup.state_bytes(group, stop - start, self.stepped)
            of_gap = self.setup.gap_bytes or self.setup.state_bytes
            in_gap = of_gap(group, gap, self.stepped)
            if self.setup.zenflow is not None:
                state += (stop - start) * state_itemsize()
                in_gap += gap * state_itemsize()
            yield Holding(self.states, "optimizer", state, in_gap)

    def _gradients(self) -> Iterator[Holding]:
        size, near = self.grad_dtype.itemsize, self.setup.near
        if self.crosses:
            yield Holding("host", "gradients", self.own * size, self.gap * size)
        elif not self.setup.update_in_backward:
            whole = self.has_grad_in_twin
            numel, gap = (self.numel, self.layout.padding) if whole else (self.own, self.gap)
            yield Holding(near, "gradients", numel * size, gap * size)

    def passing(self) -> int:
        """Bytes on the host of what is on its way between host and device, and stays allocated."""
        if not self.crosses:
            return 0
        found = 0
        apart = self.setup.zenflow is not None or self.states == "disk"
        outgoing = self.master is not None and (self.master != self.dtype or apart)
        if outgoing and not (self.stage == 3 and self.shard == "host"):
            found += self.own * self.dtype.itemsize
        if self.setup.accumulation > 1 and not self.setup.update_in_backward:
            found += self.own * self.grad_dtype.itemsize
        return found

    @property
    def rounds(self) -> bool:
        """Whether an update leaves rounded weights beside those of the optimizer."""
        in_place = self.crosses and self.master == self.dtype
        return self.master is not None and (not in_place or self.shard == "host")

    def undo(self) -> int:
        """Bytes that take a step back, from backward until the step, where it is speculative."""
        if not (self.setup.offload.speculative and self.leaves):
            return 0
        found = self.own * self.dtype.itemsize if self.rounds else 0
        for group, start, stop in self.ranges():
            found += (stop - start) * self.stepped.itemsize
            found += self.setup.state_bytes(group, stop - start, self.stepped)
        return found

    def important(self) -> int:
        """Bytes of what ZenFlow steps apart: weights and states of their own, places; at most."""
        if self.setup.zenflow is None:
            return 0
        found = 0
        for group, start, stop in self.ranges():
            many = at_most_important(stop - start, self.setup.zenflow.topk_ratio, self.gap)
            found += many * (self.stepped.itemsize + torch.int64.itemsize)
            found += self.setup.state_bytes(group, many, self.stepped)
        return found

    def mean_of_rest(self) -> int:
        """Bytes of the mean gradient with which ZenFlow steps the rest."""
        if self.setup.zenflow is None:
            return 0
        return sum(stop - start for _, start, stop in self.ranges()) * torch.float32.itemsize

    # ------------------------------------------------------------------ what comes and goes

    def gathered(self) -> int:
        """Bytes near the computation while the unit is whole."""
        if self.stage < 3:
            return 0
        comes = self.shard != self.setup.near
        return self.full_bytes + (self.own * self.dtype.itemsize if comes else 0)

    def local_gradients(self) -> int:
        """Bytes near the computation while the unit's gradients are made and averaged."""
        if not self.spec.trainable:
            return 0
        consumed = self.setup.update_in_backward
        found = 0 if self.has_grad_in_twin and not consumed else self.full_bytes
        if self.crosses or (consumed and not self.has_grad_in_twin):
            found += self.own * self.grad_dtype.itemsize
        return found

    def staged(self) -> int:
        """Bytes near the computation while it is laid out, beside the parameters as they were."""
        wide = torch.promote_types(self.dtype, self.setup.precision.master or self.dtype)
        wide = wide if self.spec.trainable else self.dtype
        found = self.numel * wide.itemsize
        if wide != self.dtype:
            found += self.full_bytes
        return found + (self.own * self.dtype.itemsize if self.stage == 3 else 0)

    def recast(self) -> int:
        """Bytes of a gradient in the dtype that the optimizer steps in."""
        if not self.spec.trainable or self.grad_dtype == self.stepped:
            return 0
        return self.own * self.stepped.itemsize

    def records(self) -> list[int]:
        """Bytes of each piece of states on disk, as it lies there; at most."""
        if self.states != "disk":
            return []
        wide = 0 if self.master is None else self.master.itemsize
        sizes = [
            (stop - start) * wide + self.setup.state_bytes(group, stop - start, self.stepped) + 256
            for group, start, stop in self.ranges()
        ]
        return [whole_pages(size) for size in sizes]


def plan_unit_buffers(specs: Sequence[UnitSpec], setup: Setup) -> list[UnitPlan]:
    """The buffers of each unit, in order."""
    trained = [sum(p.param.numel() for p in s.params) if s.trainable else 0 for s in specs]
    tiers = setup.offload.states_of(trained)
    found, numel_in_cpu = list[UnitPlan](), 0
    for spec, tier in zip(specs, tiers, strict=True):
        ranks, rank = setup.group_of(spec)
        dtype = (setup.precision.compute if spec.dtype.is_floating_point else None) or spec.dtype
        layout = unit_layout(spec, dtype, ranks)
        stage = setup.stage if ranks > 1 or setup.shards_leave else min(setup.stage, 2)
        states: Place = setup.near
        if spec.trainable and tier != "device":
            states = "disk" if tier == "nvme" else "host"
        master = None
        if spec.trainable:
            wide = torch.promote_types(dtype, setup.precision.master or dtype)
            crosses = states != setup.near and not setup.is_host
            apart = wide != dtype or crosses or setup.zenflow is not None
            master = wide if apart else None
        shard: Place = setup.near
        if stage == 3 and setup.shards_leave:
            in_cpu = setup.offload.parameters == "cpu"
            if not in_cpu and numel_in_cpu + layout.shard_numel <= setup.offload.max_numel_in_cpu:
                in_cpu, numel_in_cpu = True, numel_in_cpu + layout.shard_numel
            shard = "host" if in_cpu else "disk"
        grad = setup.precision.grad or dtype
        leaves = spec.trainable and tier != "device"
        found.append(
            UnitPlan(spec, setup, layout, rank, stage, dtype, grad, master, states, shard, leaves)
        )
    return found


def accumulates_locally(units: Sequence[UnitPlan]) -> bool:
    """Whether an engine keeps whole gradients of all units from one micro-batch to the next."""
    setup = units[0].setup
    plain = all(u.grad_dtype == u.dtype for u in units if u.spec.trainable)
    return setup.accumulation > 1 and (setup.update_in_backward or (setup.stage == 1 and plain))
