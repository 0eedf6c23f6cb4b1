"""Tables of the memory that a model's states need, from `ds_zero.estimate_memory`.

Where the numbers are not those of the original: it counts 18 bytes per parameter (2 of the
parameter, 2 + 4 of gradients in two formats, 4 of the master copy, 8 of Adam); here there is one
gradient, of 2 bytes, and it is sharded too: 16. It counts 4 bytes per parameter of the largest
layer for stage 3; here two units and their gradients are on the device: 8.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ds_zero import Offload, estimate_memory

#: Bytes per parameter of a model that every rank first builds whole, in fp32.
_BUILT_WHOLE = 4


@dataclass(frozen=True)
class Cluster:
    """Nodes with equally many devices."""

    devices_per_node: int
    nodes: int

    @property
    def size(self) -> int:
        """Ranks."""
        return self.devices_per_node * self.nodes

    def __str__(self) -> str:
        nodes, devices = self.nodes, self.devices_per_node
        return f"{nodes} node{'s' * (nodes > 1)}, {devices} GPU{'s' * (devices > 1)} per node"


def needs(
    stage: int,
    numel: int,
    largest: int,
    cluster: Cluster,
    offload: Offload,
    *,
    sharded_build: bool,
    factor: float,
) -> tuple[int, int]:
    """Bytes of a node's host memory, and of one device, for bf16 training with Adam.

    factor: what host memory is multiplied by, for buffers.
    """
    found = estimate_memory(
        numel,
        stage=stage,
        world_size=cluster.size,
        dtype=torch.bfloat16,
        largest_unit=largest,
        offload=offload,
    )
    # What is on the host while it trains, or before, while it is built: whichever is more.
    built = largest if sharded_build else numel
    host = max(found["host"], _BUILT_WHOLE * built) * cluster.devices_per_node
    return int(host * factor), found["total"]


def sizes_of(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, shared ones once, and of its largest layer; sharded or not."""
    layers = (sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return sum(param.numel() for param in model.parameters()), max(layers, default=0)


def show(
    numel: int, largest: int | None, cluster: Cluster, rows: Iterator[tuple[int, int, str]]
) -> None:
    """Write a table onto standard output: host and device bytes of each choice."""
    layer = "" if largest is None else f", {int(largest / 1e6)}M largest layer params"
    lines = [
        "Estimated memory needed for params, optim states and gradients for a:",
        f"HW: Setup with {cluster}.",
        f"SW: Model with {int(numel / 1e6)}M total params{layer}.",
        "  per CPU  |  per GPU |   Options",
        *(f" {cpu / 2**30:7.2f}GB | {gpu / 2**30:6.2f}GB | {told}" for cpu, gpu, told in rows),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
