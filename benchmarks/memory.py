"""Bytes that a rank holds between steps, against the formulas; and the peak of a stage-3 step.

*Persistent*: after some steps, the storages of all tensors that Python can reach are added up,
each once. Single numbers (step counts, the stand-ins of sharded parameters) are left out of the
comparison and stated apart. With P parameters of b bytes on N ranks, and m bytes for the master
copy (4 if b < 4, else 0), the formulas are

    stage 0  (2 b + m + 8) P             stage 2  b P + (b + m + 8) P / N
    stage 1  2 b P + (m + 8) P / N       stage 3  (2 b + m + 8) P / N

*Peak*: torch's allocator reports every allocation and release to the profiler, so the largest
running sum over a step is what the step needs beyond what persists, exactly. What a plain loop
needs for the same micro-batch (activations, and the one gradient that autograd is writing) is
taken off; the rest is what stage 3 holds of gathered parameters and of whole gradients.

Source: Rajbhandari et al. 2020 (ZeRO), section 5 and table 1; fp32 Adam has two states.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from implementations import Dtype, Trainer, build
from models import ODD, QUICK, SHORT, STANDARD, Shape, batches, make_gpt, num_parameters
from ranks import Ranks
from report import Check, Report, main, mib

OURS = ("engine-0", "shard-1", "shard-2", "shard-3")
PEERS = ("ddp", "fsdp2", "deepspeed-1", "deepspeed-2", "deepspeed-3")
STEPS = 3
#: What must be exact in every format, model and number of ranks.
EXACT = (
    "largest deviation from formula + padding",
    "largest deviation of memory()",
    'largest deviation of memory()["padding"]',
)


class Worker:
    """Trains one implementation in one rank and looks at its memory."""

    def __init__(self, rank: int, world_size: int, name: str, dtype: Dtype, shape: Shape) -> None:
        self._trainer = build(name, make_gpt(shape), dtype=dtype, micro_batch=shape.micro_batch)
        self._batches = batches(shape, rank)
        self._drop_gradients = name == "torch"

    def persistent(self) -> dict[str, int]:
        """Bytes between steps: of buffers, of single numbers, and as the implementation says."""
        for _ in range(STEPS):
            self._trainer.step(*next(self._batches))
        del self._batches  # it holds on to the last batch
        buffers, numbers = _live_bytes()
        told = self._trainer.memory() if self._trainer.memory else {}
        return {
            "buffers": buffers,
            "numbers": numbers,
            "padding": _padding(self._trainer),
            "told": sum(size for kind, size in told.items() if kind != "padding"),
            "told padding": told.get("padding", 0),
        }

    def peak(self) -> int:
        """Largest number of bytes that a step holds beyond those before it."""
        for _ in range(STEPS):
            self._trainer.step(*next(self._batches))
        batch = next(self._batches)
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._trainer.step(*batch)
        return _largest_sum(profiler)


class PlainWorker:
    """Forward and backward of the bare model in one process, each gradient dropped as it comes."""

    def __init__(self, rank: int, world_size: int, shape: Shape) -> None:
        self._model = make_gpt(shape)
        self._batches = batches(shape, rank)
        for param in self._model.parameters():
            param.register_post_accumulate_grad_hook(_drop)

    def peak(self) -> int:
        """Largest number of bytes that forward and backward hold beyond the parameters."""
        self._pass()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self._pass()
        return _largest_sum(profiler)

    def _pass(self) -> None:
        self._model(*next(self._batches)).backward()


def run(quick: bool = False) -> Report:
    """Persistent memory against the formulas, and the transient memory of stage 3."""
    report = Report(
        "memory",
        "Bytes that a rank holds between steps",
        ["ranks", "format", "model", "implementation", "measured", "formula", "padding", "more"],
    )
    shape, worlds = (QUICK, (2,)) if quick else (STANDARD, (2, 4))
    short = QUICK if quick else SHORT  # tokens do not matter here, and bf16 may be slow
    for name in OURS:
        found = [
            _persistent(report, name, world_size, dtype, model, size)
            for world_size in worlds
            for dtype, model, size in (
                ("fp32", "GPT", shape),
                ("bf16", "GPT", short),
                ("fp32", "odd", ODD),
            )
        ]
        for quantity, values in zip(EXACT, zip(*found, strict=True), strict=True):
            report.checks.append(Check(f"{name}: {quantity}", max(values), 0, " B"))
    for name in PEERS:
        _persistent(report, name, 2, "fp32", "GPT", shape)
    for name in ("shard-3", "engine-3"):
        _peak(report, name, shape)
    report.notes += [
        f"GPT: P = {num_parameters(shape):,}; odd: P = {num_parameters(ODD):,}, no size of it a "
        "multiple of anything. Figures in bytes, of the rank that holds most.",
        "Padding: bytes of buffers that belong to no parameter, computed from the layout; the "
        "formula plus padding must be what is measured, on average over ranks. More: the rest.",
        "Of the peers' figures: buffers that only C++ holds (DDP's buckets) are not seen, "
        "gradients are freed between steps, and DeepSpeed's stage 3 allocates buffers of a fixed "
        "size that a small model does not fill.",
    ]
    return report


def _persistent(
    report: Report, name: str, world_size: int, dtype: Dtype, model: str, shape: Shape
) -> tuple[float, float, float]:
    """Add a row; returns by how many bytes each of `EXACT` is off, over all ranks."""
    with Ranks(world_size, Worker, name, dtype, shape) as ranks:
        answers: list[dict[str, int]] = ranks.ask("persistent")
    total = {key: sum(answer[key] for answer in answers) for key in answers[0]}
    stage = int(name.partition("-")[2] or {"ddp": 0, "fsdp2": 3}[name])
    expected = formula(num_parameters(shape), world_size, stage, dtype)
    # Shards are equal but for padding, so the formula speaks of their mean.
    more = total["buffers"] / world_size - expected - total["padding"] / world_size
    most = max(answer["buffers"] for answer in answers)
    cells = (f"{int(value):,}" for value in (most, expected, total["padding"] / world_size, more))
    report.rows.append([str(world_size), dtype, model, name, *cells])
    label = f"{name} on {world_size}, {dtype}, {model}"
    report.raw[label] = {"ranks": answers, "formula": expected}
    return (
        abs(more * world_size),
        abs(total["buffers"] - total["told"]),
        abs(total["padding"] - total["told padding"]),
    )


def formula(numel: int, world_size: int, stage: int, dtype: Dtype) -> float:
    """Bytes per rank of `numel` parameters with fp32 Adam (module docstring)."""
    element, master = (4, 0) if dtype == "fp32" else (2, 4)
    kinds = (master + 8, element, element)  # optimizer, gradients, parameters
    return sum(
        size * numel / (world_size if stage > place else 1) for place, size in enumerate(kinds)
    )


def _peak(report: Report, name: str, shape: Shape) -> None:
    with Ranks(1, PlainWorker, shape) as plain:
        activations = plain.ask("peak")[0]
    with Ranks(2, Worker, name, "fp32", shape) as ranks:
        peak = max(ranks.ask("peak"))
    unit = _largest_unit_bytes(shape)
    units = (peak - activations) / unit
    report.checks.append(
        Check(f"{name}: peak beyond persistent and activations", units, 2, " units")
    )
    report.raw[f"peak of {name}"] = {"peak": peak, "activations": activations, "unit": unit}
    report.notes.append(
        f"Peak of a step of {name} beyond persistent: {mib(peak)}; of a plain forward and "
        f"backward: {mib(activations)}; the largest unit with its gradients: {mib(unit)}."
    )


def _largest_unit_bytes(shape: Shape) -> int:
    """Parameters and gradients, in fp32, of the largest unit of the GPT."""
    with torch.device("meta"):
        model = make_gpt(shape)
    parts = (model.embedding, model.head, *model.blocks)
    return 2 * 4 * max(sum(param.numel() for param in part.parameters()) for part in parts)


def _live_bytes() -> tuple[int, int]:
    """Bytes of all distinct storages that Python can reach: of buffers, and of single numbers."""
    gc.collect()
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at some objects warns of deprecation
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    for tensor in tensors:
        for each in (tensor, tensor.grad if tensor.is_leaf else None):
            local = each.to_local() if hasattr(each, "to_local") else each
            if local is not None and local.device.type == "cpu":
                storage = local.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    sizes = list(storages.values())
    return sum(size for size in sizes if size > 8), sum(size for size in sizes if size <= 8)


def _padding(trainer: Trainer) -> int:
    """Bytes in our persistent buffers that belong to no parameter, from the layouts of the units.

    Optimizer states have no padding at the end of a shard, only between parameters.
    """
    sharding: Any = next((item for item in trainer.keep if hasattr(item, "units")), None)
    if sharding is None:
        return 0
    padding = 0
    for unit in sharding.units:
        layout, width = unit.layout, unit.dtype.itemsize
        pieces = layout.pieces(unit.group.rank)
        used = sum(piece.stop - piece.start for piece in pieces)
        own = layout.shard_numel - used
        states = sum(piece.stop - piece.start for piece in unit.optimizer_pieces) - used
        parameters = own if sharding.stage == 3 else layout.padding
        gradients = own if sharding.stage >= 2 else layout.padding
        master = 0 if unit.master is None else own * 4
        padding += width * (parameters + gradients) + master + 8 * states
    return padding


def _largest_sum(profiler: profile) -> int:
    """The largest running sum of the allocations and releases that a profile recorded."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    largest = held = 0
    for _, change in changes:
        held += change
        largest = max(largest, held)
    return largest


def _drop(param: torch.Tensor) -> None:
    param.grad = None


if __name__ == "__main__":
    main(run)
