"""What the machinery around a model costs the processor: steps of a model with 1072 parameters.

Two measures per step: processor time, on one rank and on two, the implementations taking turns; and
machine instructions on one rank, counted by valgrind's callgrind where that is installed, as the
difference between runs of two lengths. The overhead of an implementation is what it takes beyond a
bare torch loop in one process.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ds_core.testing import free_port
from implementations import build, is_ours
from models import Tiny
from ranks import Ranks, join
from report import Check, Report, main, median

IMPLEMENTATIONS = (
    *("torch", "ddp", "fsdp2", "engine-0", "deepspeed-0"),
    *(f"{family}-{stage}" for stage in (1, 2, 3) for family in ("shard", "engine", "deepspeed")),
)
#: The largest part of DeepSpeed's overhead that ours may be: of the engine, and of a sharding.
LIMITS = {"0": 0.1, "1": 0.2, "2": 0.2, "3": 0.2}
#: Lengths of the two runs under callgrind.
FEW, MANY = 20, 60
TOOLS = ("valgrind", "callgrind_control")


class Worker:
    """Trains the tiny model in one rank."""

    def __init__(self, rank: int, world_size: int, name: str) -> None:
        torch.manual_seed(0)
        self._trainer = build(name, Tiny(), micro_batch=4)
        self._batch = torch.randn(4, 16), torch.randn(4, 16)

    def steps(self, number: int) -> float:
        """Seconds of processor time per step."""
        begin = time.process_time()
        for _ in range(number):
            self._trainer.step(*self._batch)
        return (time.process_time() - begin) / number


TWO_RANKS = "processor time, two ranks"


def run(quick: bool = False) -> Report:
    """Host overhead of engine and sharding against DeepSpeed's."""
    turns, steps = (3, 50) if quick else (9, 200)
    report = Report(
        "host_overhead",
        "Processor time and instructions of a step of a model with 1072 parameters",
        ["implementation", "one rank", "two ranks", "instructions, one rank"],
    )
    measures = {
        "processor time, one rank": _processor_times(1, turns, steps),
        TWO_RANKS: _processor_times(2, turns, steps),
    }
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        report.notes.append(f"No instructions: {', '.join(missing)} not found.")
    else:
        chosen = [
            n
            for n in IMPLEMENTATIONS
            if not quick or n in ("torch", *_of_stage("0"), *_of_stage("2"))
        ]
        measures["instructions, one rank"] = {name: _instructions(name) for name in chosen}
    for name in IMPLEMENTATIONS:
        report.rows.append([name, *(_shown(values, name) for values in measures.values())])
        report.rows[-1] += ["-"] * (len(report.columns) - len(report.rows[-1]))
    for measure, values in measures.items():
        bare = values.get("torch") or measures["processor time, one rank"]["torch"]
        for name in IMPLEMENTATIONS:
            peer = f"deepspeed-{name[-1]}"
            if measure != TWO_RANKS and is_ours(name) and name in values and peer in values:
                part = (values[name] - bare) / (values[peer] - bare)
                limit = LIMITS[name[-1]]
                report.checks.append(Check(f"{name} / {peer}: overhead, {measure}", part, limit))
    report.notes.append(
        "Overhead: beyond `torch`, which is one process without communication. Below zero where "
        "clipping inside the optimizer's fused kernel saves more than the engine costs."
    )
    report.notes.append(
        "With two ranks most of a step is the latency of gloo's messages and its own threads; "
        "these figures are shown, and not held against a target."
    )
    report.raw = measures
    return report


def _of_stage(stage: str) -> tuple[str, ...]:
    return tuple(name for name in IMPLEMENTATIONS if name.endswith(f"-{stage}"))


def _shown(values: dict[str, float], name: str) -> str:
    if name not in values:
        return "-"
    value = values[name]
    return f"{value * 1e6:,.0f} us" if value < 1 else f"{value:,.0f}"


def _processor_times(world_size: int, turns: int, steps: int) -> dict[str, float]:
    """Median seconds of processor time per step and rank."""
    names = [n for n in IMPLEMENTATIONS if world_size == 1 or n != "torch"]
    found: dict[str, list[float]] = {name: [] for name in names}
    ranks: dict[str, Ranks] = {}
    try:
        for name in names:
            ranks[name] = Ranks(world_size, Worker, name)
            ranks[name].ask("steps", 20)
        for _ in range(turns):
            for name in names:
                answers = ranks[name].ask("steps", steps)
                found[name].append(sum(answers) / world_size)
    finally:
        for each in ranks.values():
            each.close()
    return {name: median(values) for name, values in found.items()}


def _instructions(name: str) -> float:
    """Instructions per step on one rank."""
    few, many = (_counted(name, steps) for steps in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def _counted(name: str, steps: int) -> int:
    """Instructions of a run from the moment when it has warmed up."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        options = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        inside = [sys.executable, __file__, "--inside", name, str(steps)]
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            ["valgrind", *options, *inside], check=False, capture_output=True, env=environment
        )
        written = out.read_text() if out.exists() else ""
        total = re.search(r"^totals: (\d+)", written, re.MULTILINE)
        if done.returncode != 0 or total is None:
            raise RuntimeError(f"callgrind of {name} failed:\n{done.stderr.decode()[-2000:]}")
        return int(total[1])


def _inside(name: str, steps: int) -> None:
    """Body of a run under callgrind: counting begins after the warm-up."""
    join(0, 1, free_port())
    worker = Worker(0, 1, name)
    worker.steps(5)
    control = ["callgrind_control", "--instr=on", str(os.getpid())]
    subprocess.run(control, check=True, capture_output=True, timeout=120)
    worker.steps(steps)
    os._exit(0)


if __name__ == "__main__":
    if "--inside" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--inside", nargs=2, metavar=("NAME", "STEPS"))
        implementation, number = parser.parse_args().inside
        _inside(implementation, int(number))
    else:
        main(run)
