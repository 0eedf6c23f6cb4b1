"""What a config will cost on a cluster: memory per rank, bytes on the wire, time of a step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ds_core import assembly, config, plugins
from ds_core.config import Config
from ds_core.errors import ConfigError, PlanError
from ds_core.planning.costs import Costs, Planner, Workload
from ds_core.planning.devices import DeviceSpec
from ds_core.planning.model_source import ModelSource
from ds_core.planning.optimizer_state import OptimizerState
from ds_core.planning.replicated import replicated_costs
from ds_core.planning.step_time import Cluster, StepTime, estimate_step
from ds_core.precision import Precision

#: What the driver, the communication library and torch's allocator take of a device's memory.
RESERVED_BYTES = 3 * 2**29
FRAGMENTATION = 0.04


@dataclass(frozen=True)
class PlanOptions:
    """What a plan depends on beside config, model and cluster.

    Attributes:
        sequence_length: tokens per sample.
        recompute: whether each block's activations are computed again in backward.
        mfu: part of the device's peak that the arithmetic reaches.
        rank: whose memory is shown; ranks differ by padding only.
        host_memory_bytes: of each node, for what is offloaded; None: not bounded.
        disk_bytes: free on each node's disk; None: not bounded.
    """

    sequence_length: int = 2048
    recompute: bool = False
    mfu: float = 0.4
    rank: int = 0
    host_memory_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """The answer.

    Attributes:
        config: complete, for this cluster.
        source: the model.
        cluster: where it runs.
        options: what else was assumed.
        precision: number formats.
        costs: model state and messages: exact.
        activation_bytes: saved for backward by one micro-batch, an estimate; None: not known.
        flops: operations of one rank's step.
        time: of a step, an estimate.
        notes: what the figures take for granted.
    """

    config: Config
    source: ModelSource
    cluster: Cluster
    options: PlanOptions
    precision: Precision
    costs: Costs
    activation_bytes: int | None
    flops: float
    time: StepTime
    notes: tuple[str, ...]

    @property
    def memory(self) -> Mapping[str, int]:
        """Bytes of model state of one rank by kind, as `engine.memory()` will count them."""
        return self.costs.memory

    @property
    def peak_bytes(self) -> int:
        """The most that a rank holds at once, an estimate."""
        computing = self.costs.computing_bytes + (self.activation_bytes or 0)
        return self.costs.persistent_bytes + max(computing, self.costs.updating_bytes)

    @property
    def usable_bytes(self) -> int:
        """What of a device's memory is left for the model."""
        if self.cluster.device.name == "cpu":
            return self.cluster.device.memory_bytes
        return int(self.cluster.device.memory_bytes * (1 - FRAGMENTATION)) - RESERVED_BYTES

    @property
    def fits(self) -> bool:
        """Whether the estimated peak is below the usable memory, and what is offloaded has room."""
        return self.peak_bytes <= self.usable_bytes and not self.crowded

    @property
    def crowded(self) -> list[str]:
        """The places beside the device that cannot hold what is offloaded: "host", "disk"."""
        ranks, options = self.cluster.gpus_per_node, self.options
        needs = {
            "host": (self.costs.host_bytes * ranks, options.host_memory_bytes),
            "disk": (self.costs.disk_bytes * ranks, options.disk_bytes),
        }
        return [name for name, (need, room) in needs.items() if room is not None and need > room]

    def wire_bytes(self, *, axis: str | None = None, kind: str | None = None) -> int:
        """What a rank sends in a step, filtered by axis of the mesh and kind of message."""
        return sum(
            message.sent_bytes
            for message in self.costs.messages
            if axis in (None, message.axis) and kind in (None, message.kind)
        )

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        tokens = self.config.train_batch_size * self.options.sequence_length
        return tokens / self.time.total


def make_plan(
    document: Mapping[str, Any] | str | os.PathLike[str],
    source: ModelSource,
    cluster: Cluster,
    options: PlanOptions | None = None,
) -> Plan:
    """What training `source` with a config on `cluster` costs; takes no memory and no processes.

    Args:
        document: a config, or the path of its JSON file.
        source: the model; see `model_from` and `model_of_size`.
        cluster: nodes, devices per node and their kind.
        options: what else it depends on.

    Raises ConfigError for a config that cannot be honoured there, PlanError for options or a
    cluster that make no sense.
    """
    options = options or PlanOptions()
    _check(cluster, options)
    loaded = config.load(document, world_size=cluster.size)
    precision = precision_on(loaded, cluster.device)
    work = Workload(
        source.module,
        OptimizerState(loaded.optimizer),
        precision,
        loaded.gradient_accumulation_steps,
        cluster.size,
        options.rank,
        wire_format(loaded),
        cluster.device.name == "cpu",
        bool(loaded.gradient_clipping or precision.loss_scale),
    )
    costs = costs_of(loaded, work)
    itemsize = compute_itemsize(source, precision)
    flops = _flops(source, loaded, options)
    notes = [*source.notes, *costs.notes]
    if loaded.optimizer is None:
        notes.append("the config names no optimizer: AdamW is assumed")
    time = estimate_step(
        costs,
        cluster=cluster,
        accumulation=loaded.gradient_accumulation_steps,
        flops=flops,
        weight_bytes=source.numel * itemsize,
        itemsize=itemsize,
        mfu=options.mfu,
        recompute=options.recompute,
    )
    activations = _activation_bytes(source, loaded, options, itemsize)
    return Plan(
        loaded,
        source,
        cluster,
        options,
        precision,
        costs,
        activations,
        flops,
        time,
        tuple(notes),
    )


def costs_of(loaded: Config, work: Workload) -> Costs:
    """What the config's way of sharding costs; plain data parallelism if no section asks for more.

    Raises ConfigError if several sections do.
    """
    found = {}
    for name, planner in planners().items():
        section = loaded.section(name)
        costs = None if section is None else planner.costs(section, work)
        if costs is not None:
            found[name] = costs
    if len(found) > 1:
        raise ConfigError(f"{' and '.join(found)}: each asks for its own sharding; keep one")
    return next(iter(found.values()), None) or replicated_costs(work)


def planners() -> dict[str, Planner]:
    """The planners of installed packages, by the config section they answer for."""
    return {
        name: plugins.load("planners", name)() for name in sorted(plugins.registered("planners"))
    }


def precision_on(loaded: Config, device: DeviceSpec) -> Precision:
    """The number formats of a run on such a device."""
    precision, _ = assembly._precision(loaded, _PlannedAccelerator(device))
    return precision


def wire_format(loaded: Config) -> torch.dtype | None:
    """The number format in which gradients travel; None: that of their buffers."""
    name = loaded.communication_data_type
    return None if name is None else assembly._DTYPES[name]


class _PlannedAccelerator(assembly.Accelerator):
    """Answers for a device that is not here."""

    def __init__(self, spec: DeviceSpec) -> None:
        super().__init__("cpu" if spec.name == "cpu" else "cuda")
        object.__setattr__(self, "_spec", spec)

    def supports(self, dtype: torch.dtype) -> bool:
        return True

    def computes_fast(self, dtype: torch.dtype) -> bool:
        spec: DeviceSpec = self.__dict__["_spec"]
        if spec.name == "cpu":
            return super().computes_fast(dtype)
        return dtype is not torch.bfloat16 or spec.bf16_is_fast


def compute_itemsize(source: ModelSource, precision: Precision) -> int:
    """Bytes of the numbers that are multiplied."""
    dtype = precision.autocast or precision.compute
    return next(source.module.parameters()).dtype.itemsize if dtype is None else dtype.itemsize


def _flops(source: ModelSource, loaded: Config, options: PlanOptions) -> float:
    samples = loaded.train_micro_batch_size_per_gpu * loaded.gradient_accumulation_steps
    if source.measured is not None:
        return source.measured.flops / source.measured.samples * samples
    tokens = options.sequence_length
    if source.shape is None:
        return 6.0 * source.numel * tokens * samples
    is_guess = source.shape.matrix_params() > source.numel or source.notes
    matrix = source.numel if is_guess else source.shape.matrix_params()
    return source.shape.flops_per_sample(tokens, matrix) * samples


def _activation_bytes(
    source: ModelSource, loaded: Config, options: PlanOptions, itemsize: int
) -> int | None:
    micro = loaded.train_micro_batch_size_per_gpu
    if source.measured is not None:
        return source.measured.activation_bytes * micro // source.measured.samples
    if source.shape is None:
        return None
    return source.shape.activation_bytes(
        micro, options.sequence_length, itemsize, recompute=options.recompute
    )


def _check(cluster: Cluster, options: PlanOptions) -> None:
    for name, value in (
        ("--nodes", cluster.nodes),
        ("--gpus-per-node", cluster.gpus_per_node),
        ("--sequence-length", options.sequence_length),
        ("--host-memory-gib", options.host_memory_bytes),
        ("--disk-gib", options.disk_bytes),
    ):
        if value is not None and value < 1:
            raise PlanError(f"{name}: got {value}, expected at least 1")
    if not 0 < options.mfu <= 1:
        raise PlanError(f"--mfu: got {options.mfu:g}, expected a part of the peak, 0 to 1")
    if not 0 <= options.rank < cluster.size:
        raise PlanError(
            f"--rank: got {options.rank}, expected 0 to {cluster.size - 1} on {cluster}"
        )
