"""How long a step takes, as far as arithmetic, memory and wires decide it: an estimate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ds_core.planning.costs import Costs, Message
from ds_core.planning.devices import DeviceSpec

#: What one collective costs beside its bytes, per doubling of the number of ranks.
LATENCY_S = 10e-6
#: The part of a link's bandwidth that large messages reach.
WIRE_EFFICIENCY = 0.8
#: Forward is one third of the arithmetic, backward two thirds; recomputation adds a forward.
_FORWARD, _BACKWARD = 1 / 3, 2 / 3


@dataclass(frozen=True)
class Cluster:
    """Where a job runs.

    Attributes:
        nodes: machines.
        gpus_per_node: devices in each.
        device: of which kind they are.
    """

    nodes: int
    gpus_per_node: int
    device: DeviceSpec

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        parts = f"{self.nodes} node{'s' if self.nodes > 1 else ''} x {self.gpus_per_node}"
        return f"{parts} {self.device.name} = {self.size} ranks"

    def wire_seconds(self, sent_bytes: float, num_calls: int) -> float:
        """Time of collectives over all ranks, each of which sends so much in them.

        Between nodes every device carries its share of what a node must learn: (K-1)/K of the
        whole for K nodes, over all its network cards; within a node each sends at the rate of the
        node's links. The slower of the two decides.
        """
        if self.size == 1 or num_calls == 0:
            return 0.0
        whole = sent_bytes * self.size / (self.size - 1)
        inside = sent_bytes / self.device.intra_bandwidth
        between = whole * (self.nodes - 1) / self.nodes / self.gpus_per_node
        seconds = max(inside, between / self.device.inter_bandwidth) / WIRE_EFFICIENCY
        return seconds + num_calls * LATENCY_S * math.ceil(math.log2(self.size))


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by what takes them.

    Attributes:
        forward, backward: computing, of all micro-batches; recomputation is part of backward.
        update: the optimizer's pass over memory.
        communication: all collectives, if nothing overlapped them.
        exposed: what of that is left beside the computation it may overlap.
        bubble: idling of a pipeline's stages.
    """

    forward: float
    backward: float
    update: float
    communication: float
    exposed: float
    bubble: float

    @property
    def compute(self) -> float:
        """Forward, backward and update."""
        return self.forward + self.backward + self.update

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.bubble


def estimate_step(
    costs: Costs,
    *,
    cluster: Cluster,
    accumulation: int,
    flops: float,
    weight_bytes: float,
    itemsize: int,
    mfu: float,
    recompute: bool = False,
) -> StepTime:
    """The time of a step on `cluster`.

    Args:
        costs: what a rank holds and sends.
        cluster: where.
        accumulation: micro-batches per step.
        flops: operations of one rank's forwards and backwards in a step.
        weight_bytes: what is read of the weights in one pass over the model.
        itemsize: bytes of the numbers that are multiplied.
        mfu: part of the device's peak that the arithmetic reaches (0 to 1).
        recompute: whether backward runs the forward again.
    """
    device = cluster.device
    arithmetic = flops / (device.flops(itemsize) * mfu)
    # A small batch waits for the weights: read once in forward, and twice in backward.
    reading = accumulation * 3 * weight_bytes / device.memory_bandwidth
    busy = max(arithmetic, reading)
    forward = busy * _FORWARD
    backward = busy * _BACKWARD + (forward if recompute else 0.0)
    update = costs.update_traffic_bytes / device.memory_bandwidth + costs.offload_seconds
    room = {
        "forward": forward,
        "backward": backward,
        "last backward": backward / accumulation,
        "update": update,
    }
    exposed = total = 0.0
    for phase, available in room.items():
        wire = _seconds(cluster, (m for m in costs.messages if m.phase == phase))
        total += wire
        exposed += max(0.0, wire - available)
    stages = costs.pipeline_stages
    bubble = (forward + backward) * bubble_over_work(stages, accumulation)
    return StepTime(forward, backward, update, total, exposed, bubble)


def bubble_over_work(stages: int, micro_batches: int) -> float:
    """Idle time of a pipeline's stage over its working time: (p-1)/m with GPipe and 1F1B.

    Source: Huang et al. 2019, "GPipe", section 2.3; Narayanan et al. 2021, section 2.2.
    """
    return (stages - 1) / micro_batches


def _seconds(cluster: Cluster, messages: Iterable[Message]) -> float:
    return sum(cluster.wire_seconds(m.sent_bytes, m.num_calls) for m in messages)
