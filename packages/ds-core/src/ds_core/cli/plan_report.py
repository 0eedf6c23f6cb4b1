"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ds_core.cli.tables import table
from ds_core.planning.devices import GIB
from ds_core.planning.fitting import Remedy
from ds_core.planning.plan import FRAGMENTATION, RESERVED_BYTES, Plan
from ds_core.planning.step_time import LATENCY_S, WIRE_EFFICIENCY


def render(plan: Plan, fixes: Sequence[Remedy]) -> str:
    """The whole report."""
    blocks = [
        table("Run", _run_rows(plan)),
        table("Memory per rank", _memory_rows(plan)),
        table("Wire: sent per rank and step", _wire_rows(plan)),
        table("Step time (an estimate)", _time_rows(plan)),
        _verdict(plan, fixes),
    ]
    if plan.notes:
        blocks.append("Assumed\n" + "".join(f"  - {note}\n" for note in plan.notes))
    return "\n".join(blocks)


def as_json(plan: Plan, fixes: Sequence[Remedy]) -> str:
    """The same for programs: bytes and seconds."""
    return json.dumps(summary(plan) | {"remedies": [_told(fix) for fix in fixes]}, indent=2)


def summary(plan: Plan) -> dict[str, Any]:
    """The figures of a plan: bytes, seconds, operations."""
    loaded, time = plan.config, plan.time
    return {
        "model": plan.source.description,
        "parameters": plan.source.numel,
        "cluster": {
            "nodes": plan.cluster.nodes,
            "gpus_per_node": plan.cluster.gpus_per_node,
            "gpu": plan.cluster.device.name,
            "ranks": plan.cluster.size,
        },
        "batch": {
            "train_batch_size": loaded.train_batch_size,
            "train_micro_batch_size_per_gpu": loaded.train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": loaded.gradient_accumulation_steps,
        },
        "precision": str(plan.precision),
        "sharding": plan.costs.sharding,
        "memory": {
            "rank": plan.options.rank,
            **plan.memory,
            "persistent": plan.costs.persistent_bytes,
            "activations_estimate": plan.activation_bytes,
            "computing_estimate": plan.costs.computing_bytes,
            "updating_estimate": plan.costs.updating_bytes,
            "peak_estimate": plan.peak_bytes,
            "usable": plan.usable_bytes,
            "host": plan.costs.host_bytes,
            "disk": plan.costs.disk_bytes,
            "by_tier": {place: dict(kinds) for place, kinds in plan.costs.by_tier.items()},
            "fits": plan.fits,
        },
        "wire": {
            "sent_bytes": plan.wire_bytes(),
            "by_axis": _sums(plan, "axis"),
            "by_kind": _sums(plan, "kind"),
            "by_op": _sums(plan, "op"),
            "calls": sum(message.num_calls for message in plan.costs.messages),
        },
        "time": {
            "step_s": time.total,
            "forward_s": time.forward,
            "backward_s": time.backward,
            "update_s": time.update,
            "communication_s": time.communication,
            "exposed_communication_s": time.exposed,
            "bubble_s": time.bubble,
            "mfu": plan.options.mfu,
            "flops_per_rank": plan.flops,
            "samples_per_second": loaded.train_batch_size / time.total,
        },
        "notes": list(plan.notes),
    }


def _told(fix: Remedy) -> dict[str, Any]:
    return {
        "change": fix.description,
        "peak_estimate": fix.plan.peak_bytes,
        "samples_per_second": fix.plan.config.train_batch_size / fix.plan.time.total,
        "train_batch_size": fix.plan.config.train_batch_size,
    }


def _sums(plan: Plan, attribute: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for message in plan.costs.messages:
        total[getattr(message, attribute)] += message.sent_bytes
    return dict(total)


def _run_rows(plan: Plan) -> list[tuple[str, str]]:
    loaded = plan.config
    return [
        ("model", _model(plan)),
        ("cluster", str(plan.cluster)),
        (
            "batch",
            f"{loaded.train_batch_size} = {loaded.train_micro_batch_size_per_gpu} per micro-batch "
            f"x {loaded.gradient_accumulation_steps} accumulated x {plan.cluster.size} ranks",
        ),
        ("precision", str(plan.precision)),
        ("sharding", plan.costs.sharding),
    ]


def _model(plan: Plan) -> str:
    count = f"{plan.source.numel:,} parameters"
    told = plan.source.description
    return count if told == count else f"{told} ({count})"


def _memory_rows(plan: Plan) -> list[tuple[str, str, str]]:
    exact = [
        (kind, shown_bytes(size), "") for kind, size in plan.memory.items() if kind != "padding"
    ]
    exact[0] = (*exact[0][:2], "exact, padding included")
    on_device = ", on the device" if plan.costs.by_tier else ""
    persistent = ("= between steps", shown_bytes(plan.costs.persistent_bytes), f"exact{on_device}")
    padding = ("  of which padding", shown_bytes(plan.memory["padding"]), "")
    activations = plan.activation_bytes
    told = "not counted" if activations is None else shown_bytes(activations)
    return [
        *exact,
        persistent,
        padding,
        ("activations", told, _activation_note(plan)),
        (
            "while computing",
            shown_bytes(plan.costs.computing_bytes),
            "estimate: gathers, gradients",
        ),
        ("while updating", shown_bytes(plan.costs.updating_bytes), "estimate"),
        ("= peak", shown_bytes(plan.peak_bytes), "estimate"),
        ("usable", shown_bytes(plan.usable_bytes), _usable_note(plan)),
        *_offloaded_rows(plan),
    ]


def _offloaded_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """What is beside the device, of one rank and of the ranks of a node."""
    ranks, options, costs = plan.cluster.gpus_per_node, plan.options, plan.costs
    rows = []
    for name, size, room in (
        ("on the host", costs.host_bytes, options.host_memory_bytes),
        ("on disk", costs.disk_bytes, options.disk_bytes),
    ):
        if size:
            bound = f" of {shown_bytes(room)}" if room is not None else ""
            parts = [f"{shown_bytes(size * ranks)}{bound} on a node"]
            if name == "on the host" and costs.host_buffers:
                parts.append(f"at most {shown_bytes(costs.host_buffers)} of it are buffers")
            rows.append((name, shown_bytes(size), "; ".join(parts)))
    return rows


def _activation_note(plan: Plan) -> str:
    micro = plan.config.train_micro_batch_size_per_gpu
    if plan.source.measured is not None:
        return f"counted on a forward without data, micro-batch {micro}"
    if plan.source.shape is None:
        return ""
    layers = f"{plan.source.shape.layers} layers"
    how = "layer inputs and one layer (recomputed)" if plan.options.recompute else layers
    return (
        f"estimate: {how}, {micro} x {plan.options.sequence_length} tokens, fused attention, "
        f"with logits"
    )


def _usable_note(plan: Plan) -> str:
    if plan.cluster.device.name == "cpu":
        return "all of it"
    return (
        f"of {shown_bytes(plan.cluster.device.memory_bytes)}, less {FRAGMENTATION:.0%} and "
        f"{shown_bytes(RESERVED_BYTES)} for driver, libraries and allocator"
    )


def _wire_rows(plan: Plan) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, str, str], list[int]] = {}
    for message in plan.costs.messages:
        total = groups.setdefault((message.axis, message.kind, message.op), [0, 0])
        total[0] += message.sent_bytes
        total[1] += message.num_calls
    rows = [
        (f"{axis}: {kind}", shown_bytes(sent), f"{op}, {calls} call{'s' if calls > 1 else ''}")
        for (axis, kind, op), (sent, calls) in sorted(groups.items(), key=lambda item: -item[1][0])
    ]
    return [*rows, ("= in all", shown_bytes(plan.wire_bytes()), "exact, in the long run")]


def _time_rows(plan: Plan) -> list[tuple[str, str, str]]:
    time, device = plan.time, plan.cluster.device
    wire = f"at {WIRE_EFFICIENCY:.0%} of {device.intra_bandwidth / 1e9:g} GB/s within a node"
    if plan.cluster.nodes > 1:
        wire += f" and {device.inter_bandwidth / 1e9:g} GB/s per device between nodes"
    wire += f", {LATENCY_S * 1e6:g} us per call and doubling of ranks"
    tokens = f"{plan.config.train_batch_size / time.total:,.1f} samples/s"
    if plan.source.shape is not None:
        tokens += f", {plan.tokens_per_second:,.0f} tokens/s"
    return [
        (
            "forward, backward",
            shown_seconds(time.forward + time.backward),
            f"{plan.flops:.3g} operations at {plan.options.mfu:.0%} of the peak",
        ),
        ("update", shown_seconds(time.update), "memory bandwidth"),
        ("communication", shown_seconds(time.communication), wire),
        ("  of which exposed", shown_seconds(time.exposed), "not hidden behind computation"),
        ("pipeline bubble", shown_seconds(time.bubble), f"{plan.costs.pipeline_stages} stage(s)"),
        ("= step", shown_seconds(time.total), tokens),
    ]


def _verdict(plan: Plan, fixes: Iterable[Remedy]) -> str:
    use = plan.peak_bytes / plan.usable_bytes
    if plan.fits:
        return f"It fits: the peak is {use:.0%} of the usable memory.\n"
    lines = []
    if plan.peak_bytes > plan.usable_bytes:
        lines.append(f"It does not fit: the peak is {use:.0%} of the usable memory.")
    for name in plan.crowded:
        told = {"host": "memory", "disk": "disk"}[name]
        lines.append(
            f"It does not fit: the {told} of a node is too small for what its ranks offload."
        )
    rows = [
        (
            fix.description,
            shown_bytes(fix.plan.peak_bytes),
            f"{fix.plan.config.train_batch_size / fix.plan.time.total:,.1f} samples/s, batch "
            f"{fix.plan.config.train_batch_size}",
        )
        for fix in fixes
    ]
    if rows:
        return "\n".join(lines) + "\n" + table("It would with one of (the fastest first)", rows)
    lines.append(
        "No change known here makes it fit: use larger devices, or a package that shards the model "
        "(pip install ds-zero) if none is installed."
    )
    return "\n".join(lines) + "\n"


def shown_bytes(size: int) -> str:
    """Bytes in the unit that suits them: "1.25 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"


def shown_seconds(seconds: float) -> str:
    """Seconds in the unit that suits them: "12.3 ms"."""
    if seconds == 0:
        return "0"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return (
                f"{seconds / scale:,.3g} {unit}"
                if seconds < 100 * scale
                else (f"{seconds / scale:,.0f} {unit}")
            )
    return f"{seconds:.1e} s"
