"""What a way of holding a model costs: the words in which a planner answers.

A planner is asked per config section, through entry points of group `ds_core.planners` whose
names are top-level keys: whoever shards a model knows what its ranks hold and send.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ds_core.config.section import Section
from ds_core.planning.optimizer_state import OptimizerState
from ds_core.precision import Precision

#: What a message may overlap: the computation of all micro-batches' forwards or backwards, that of
#: the last micro-batch's backward only, or nothing but the parameter update.
Phase = Literal["forward", "backward", "last backward", "update"]
Kind = Literal["parameters", "gradients", "control"]


@dataclass(frozen=True)
class Workload:
    """What is trained, and by how many.

    Attributes:
        model: whose parameters have shapes and dtypes, and need no data (fake or meta tensors).
        optimizer: what it keeps per parameter.
        precision: number formats.
        accumulation: micro-batches per optimizer step.
        data_ranks: data-parallel ranks.
        rank: which of them is asked about.
        wire: number format in which gradients travel; None: that of their buffers.
        is_host: whether the device is a CPU, so that nothing leaves it for the host.
        scales_gradients: whether they are clipped, or carry a loss scale, so that an update must
            wait for the end of backward.
    """

    model: nn.Module
    optimizer: OptimizerState
    precision: Precision
    accumulation: int
    data_ranks: int
    rank: int = 0
    wire: torch.dtype | None = None
    is_host: bool = False
    scales_gradients: bool = False


@dataclass(frozen=True)
class Message:
    """Collectives of one kind that a rank takes part in during one optimizer step.

    Attributes:
        op, caller: as the ledger of a real run names them.
        axis: axis of the mesh that it travels along.
        kind: what travels.
        phase: what it may overlap.
        num_calls: how many of them a step has.
        sent_bytes: what this rank sends in all of them together.
    """

    op: str
    caller: str
    axis: str
    kind: Kind
    phase: Phase
    num_calls: int
    sent_bytes: int


@dataclass(frozen=True)
class Costs:
    """What one rank holds and sends.

    Attributes:
        sharding: one line on who holds what.
        memory: bytes held between steps by kind: parameters, gradients, master, optimizer; and
            padding, which is part of the others. Exactly what `engine.memory()` counts.
        by_tier: the same by "device", "host" and "disk", where something is offloaded; of
            a CPU its own memory is the device's. Empty: all of it is on the device.
        host_buffers: the most of host memory that offloaded state passes through.
        computing_bytes: what is held beside them while forward and backward run, without
            activations; an estimate.
        updating_bytes: what is held beside them during the update; an estimate.
        update_traffic_bytes: what the update reads and writes in this rank's memory.
        offload_seconds: what a step takes on the host, on disk and for copies; an estimate.
        messages: what a step sends, in the long run (the first steps negotiate more).
        notes: what the figures take for granted.
        pipeline_stages: parts that the model is cut into along a pipeline.
    """

    sharding: str
    memory: Mapping[str, int]
    computing_bytes: int
    updating_bytes: int
    update_traffic_bytes: int
    messages: tuple[Message, ...]
    notes: tuple[str, ...] = ()
    pipeline_stages: int = 1
    by_tier: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    host_buffers: int = 0
    offload_seconds: float = 0.0

    @property
    def persistent_bytes(self) -> int:
        """Bytes held on the device between steps."""
        return _total(self.by_tier.get("device", {}) if self.by_tier else self.memory)

    @property
    def host_bytes(self) -> int:
        """Bytes held in host memory beside a device, buffers included."""
        return _total(self.by_tier.get("host", {})) + self.host_buffers

    @property
    def disk_bytes(self) -> int:
        """Bytes held on disk."""
        return _total(self.by_tier.get("disk", {}))


def _total(kinds: Mapping[str, int]) -> int:
    return sum(size for kind, size in kinds.items() if kind != "padding")


@dataclass(frozen=True)
class SectionChange:
    """Another value of a section's keys that needs less memory.

    Attributes:
        description: what a user would call it.
        values: keys of the section and their new values.
    """

    description: str
    values: Mapping[str, Any] = field(default_factory=dict)


class Planner(Protocol):
    """Answers for one config section. An entry point of `ds_core.planners` is a class of this.

    It is created without arguments; its methods are pure.
    """

    def costs(self, section: Section, workload: Workload) -> Costs | None:
        """What the section's choices cost; None if it asks for nothing."""
        ...

    def savings(self, section: Section) -> Iterable[SectionChange]:
        """Changes to the section that save memory, the least invasive first."""
        ...
