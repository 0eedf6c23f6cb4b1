"""Step time, processor time, losses and peak memory of training on two ranks, beside the peers.

Every implementation has two processes of its own, alive together with the others of its group, and
they take turns step by step, in an order that rotates. A ratio is the median over turns of the
quotient within the turn, so a machine that is busy for a while slows both sides.
"""

from __future__ import annotations

import importlib
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from implementations import Dtype, build, is_ours
from models import QUICK, SHORT, STANDARD, Shape, batches, make_gpt
from original import original
from ranks import Ranks
from report import Check, Report, main, median, mib, ratios

#: Implementations whose processes are alive together; the first is the measure of the others.
GROUPS = (
    ("ddp", "shard-1", "engine-1", "deepspeed-1"),
    ("ddp", "shard-2", "engine-2", "deepspeed-2"),
    ("ddp", "shard-3", "fsdp2", "deepspeed-3"),
    ("ddp", "engine-3", "fsdp2", "deepspeed-3"),
    ("ddp", "engine-0"),
)
WARMUP = 3
FSDP2_LIMIT, DEEPSPEED_LIMIT = 0.85, 0.75


class Worker:
    """Trains one implementation in one rank."""

    def __init__(self, rank: int, world_size: int, name: str, dtype: Dtype, shape: Shape) -> None:
        # So that all begin with the same memory.
        importlib.import_module("torch.distributed.fsdp")
        if name.startswith("deepspeed"):
            original()
        warm = torch.randn(256, 256)
        (warm @ warm).sum()
        _reset_peak()
        self._before = _resident("VmRSS")
        self._trainer = build(name, make_gpt(shape), dtype=dtype, micro_batch=shape.micro_batch)
        self._batches = batches(shape, rank)
        self._setup_peak = _resident("VmHWM") - self._before
        self._num_steps = 0

    def step(self) -> tuple[float, float, float]:
        """Seconds, seconds of processor time, and loss of one step."""
        if self._num_steps == WARMUP:
            _reset_peak()
        self._num_steps += 1
        batch = next(self._batches)
        processor, clock = time.process_time(), time.perf_counter()
        loss = self._trainer.step(*batch)
        seconds = time.perf_counter() - clock
        return seconds, time.process_time() - processor, float(loss)

    def memory(self) -> tuple[int, int]:
        """Largest growth of resident bytes while it was set up, and in steps since the warm-up."""
        return self._setup_peak, _resident("VmHWM") - self._before


@dataclass
class Series:
    """What the turns of one implementation gave: the slower rank's time, both ranks' work."""

    seconds: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    setup_peak: int = 0
    steady_peak: int = 0

    def take(self, answers: Sequence[tuple[float, float, float]]) -> None:
        self.seconds.append(max(answer[0] for answer in answers))
        self.processor_s.append(sum(answer[1] for answer in answers))
        self.losses.append(sum(answer[2] for answer in answers) / len(answers))


def measure(names: Sequence[str], dtype: Dtype, shape: Shape, steps: int) -> dict[str, Series]:
    """Train all of `names` in turns."""
    series = {name: Series() for name in names}
    ranks: dict[str, Ranks] = {}
    try:
        for name in names:
            ranks[name] = Ranks(2, Worker, name, dtype, shape)
        for turn in range(steps):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                series[name].take(ranks[name].ask("step"))
        for name in names:
            peaks = ranks[name].ask("memory")
            series[name].setup_peak = max(peak[0] for peak in peaks)
            series[name].steady_peak = max(peak[1] for peak in peaks)
    finally:
        for each in ranks.values():
            each.close()
    return series


def run(quick: bool = False) -> Report:
    """Time of a training step against DDP, FSDP2 and DeepSpeed."""
    shape, steps = (QUICK, 6) if quick else (STANDARD, 20 + WARMUP)
    report = Report(
        "train_step",
        "Time, processor time and memory of a step: two gloo ranks, one thread each",
        [
            *("implementation", "step", "time / DDP", "processor / DDP", "bf16 processor / DDP"),
            *("peak memory", "loss - DDP's"),
        ],
    )
    for group in GROUPS:
        full = measure(group, "fp32", shape, steps)
        short = QUICK if quick else SHORT
        half = measure(group, "bf16", short, max(steps // 2, WARMUP + 3))
        report.raw[" ".join(group)] = {
            name: {"fp32": vars(full[name]), "bf16": vars(half[name])} for name in group
        }
        shown = {row[0] for row in report.rows}
        report.rows += [_row(name, full, half) for name in group if name not in shown]
        report.checks += _checks(group, full)
    report.notes += [
        f"fp32: {shape.micro_batch} x {shape.tokens} tokens per rank, {steps} steps, the first "
        f"{WARMUP} not counted; bf16 (parameters in bf16 with an fp32 master copy; DDP: autocast): "
        f"{short.micro_batch} x {short.tokens} tokens, because this processor may multiply bf16 "
        f"slowly.",
        "Peak memory: growth of a rank's resident memory over the imports, in steps after the "
        "warm-up.",
    ]
    return report


def _row(name: str, full: dict[str, Series], half: dict[str, Series]) -> list[str]:
    own, ddp = full[name], full["ddp"]
    apart = max(abs(a - b) for a, b in zip(own.losses, ddp.losses, strict=True))
    return [
        name,
        f"{median(own.seconds[WARMUP:]):.3f} s",
        f"{_ratio(full, name, 'ddp'):.3f}",
        f"{_ratio(full, name, 'ddp', 'processor_s'):.3f}",
        f"{_ratio(half, name, 'ddp', 'processor_s'):.3f}",
        mib(own.steady_peak),
        f"{apart:.1e}",
    ]


def _ratio(series: dict[str, Series], over: str, under: str, what: str = "seconds") -> float:
    values = (getattr(series[name], what)[WARMUP:] for name in (over, under))
    return median(ratios(*values))


def _checks(group: Sequence[str], series: dict[str, Series]) -> list[Check]:
    limits: list[tuple[str, str, float]] = []
    for name in group:
        stage = name.partition("-")[2]
        if not is_ours(name) or stage == "0":
            continue
        limits.append((name, "ddp", 1.15 if stage == "3" else 1.10))
        if stage == "3" and "fsdp2" in group:
            limits.append((name, "fsdp2", FSDP2_LIMIT))
        if f"deepspeed-{stage}" in group:
            limits.append((name, f"deepspeed-{stage}", DEEPSPEED_LIMIT))
    return [
        Check(f"{over} {label} / {under}", _ratio(series, over, under, what), limit)
        for over, under, limit in limits
        for what, label in (("seconds", "time"), ("processor_s", "processor time"))
    ]


def _resident(kind: str) -> int:
    """Resident bytes of this process: now ("VmRSS") or at most ("VmHWM")."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: the most is all there is
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    values: dict[str, Any] = dict(line.split(":", 1) for line in lines)
    return int(values[kind].split()[0]) * 1024


def _reset_peak() -> None:
    """Let VmHWM start again from the present size, where the kernel permits it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main(run)
