"""What observers cost a step: processor time per step with each of them, over that without any.

The model is so small that it costs nothing itself, so that what an observer adds shows; it is told
in microseconds and as a part of a step of 50 ms. Engines with and without observers take turns, and
an observer's cost is the median over turns of what a step takes longer than in the engine without.

The trace is told twice: outside its window, which is all but a few steps of a run, and inside,
where it also depends on how many operations a step has. Wandb and Comet are left out: what
they cost is their own processes and threads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import Tiny
from ranks import Ranks
from report import Check, Report, main, median

STEP_S = 0.050
#: Largest part of a step that no observer, and all of them together, may cost.
OFF_LIMIT, ALL_LIMIT = 0.01, 0.03

#: Name of the case and the config that it adds; "{}" is a folder of its own.
CASES: dict[str, dict[str, Any]] = {
    "no observer": {},
    "progress, a line each 100 steps": {"progress": True, "steps_per_print": 100},
    "JSON lines, each step": {"metrics": {"jsonl": "{}/metrics.jsonl"}},
    "CSV, each step": {"csv_monitor": {"enabled": True, "output_path": "{}"}},
    "TensorBoard, each step": {"tensorboard": {"enabled": True, "output_path": "{}"}},
    "JSON lines and times by phase": {
        "metrics": {"jsonl": "{}/metrics.jsonl"},
        "wall_clock_breakdown": True,
    },
    "JSON lines and memory by phase": {
        "metrics": {"jsonl": "{}/metrics.jsonl"},
        "memory_breakdown": True,
    },
    "trace, outside its window": {"trace": {"enabled": True, "start_step": 10**9}},
}
ALL = "all of them, each step"
CASES[ALL] = {
    key: value for case in CASES.values() for key, value in case.items() if key != "metrics"
} | {"metrics": {"jsonl": "{}/metrics.jsonl"}}
RECORDING = {
    "trace, recording without operations": {"ops": False},
    "trace, recording with operations": {"ops": True},
}
NO_EVENTS = "events removed"


class Worker:
    """Trains the tiny model in one rank, with one engine for each case."""

    def __init__(self, rank: int, world_size: int, folder: str) -> None:
        self._batch = torch.randn(4, 16), torch.randn(4, 16)
        self._engines = {
            name: self._build(_placed(config, Path(folder, str(place))))
            for place, (name, config) in enumerate(CASES.items())
        }
        # What an engine would take that has no events at all.
        self._engines[NO_EVENTS] = self._build({})
        self._engines[NO_EVENTS]._emit = lambda *args, **values: None

    def _build(self, config: dict[str, Any]) -> Any:
        import ds_core

        torch.manual_seed(0)
        base = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}}
        return ds_core.initialize(Tiny(), {**base, **config})

    def turn(self, steps: int) -> dict[str, float]:
        """Seconds of processor time per step of each case.

        Each takes its steps in a row, the first ones not counted: after another engine's step the
        processor's caches are full of that one's.
        """
        return {name: self.turn_of(name, steps) for name in self._engines}

    def turn_of(self, name: str, steps: int) -> float:
        """The same of one case."""
        engine = self._engines[name]
        for _ in range(5):
            self._step(engine)
        return self._timed(lambda: [self._step(engine) for _ in range(steps)]) / steps

    def recorded(self, folder: str, steps: int, ops: bool) -> float:
        """Seconds of processor time per step inside the window of a trace."""
        trace = {"enabled": True, "start_step": 5, "num_steps": steps + 2, "output_path": folder}
        engine = self._build({"trace": {**trace, "ops": ops}})
        for _ in range(6):
            self._step(engine)
        taken = self._timed(lambda: [self._step(engine) for _ in range(steps)]) / steps
        engine.close()
        return taken

    @staticmethod
    def _timed(work: Callable[[], Any]) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    def _step(self, engine: Any) -> None:
        loss = engine(*self._batch)
        engine.backward(loss)
        engine.step()


def run(quick: bool = False) -> Report:
    """Processor time of observers per step."""
    turns, steps = (5, 50) if quick else (25, 100)
    report = Report(
        "observers",
        "Processor time of observers per step of one rank",
        ["observers", "per step", "of a step of 50 ms"],
    )
    with tempfile.TemporaryDirectory() as folder, Ranks(1, Worker, folder) as ranks:
        ranks.ask("turn", 20)
        found = [ranks.ask("turn", steps)[0] for _ in range(turns)]
        costs = {
            name: median(turn[name] - turn["no observer"] for turn in found)
            for name in CASES
            if name != "no observer"
        }
        off = median(turn["no observer"] - turn[NO_EVENTS] for turn in found)
        for place, (name, options) in enumerate(RECORDING.items()):
            taken = []
            for turn in range(5):
                plain = ranks.ask("turn_of", "no observer", 50)[0]
                place_of = f"{folder}/trace{place}-{turn}"
                taken.append(ranks.ask("recorded", place_of, 50, options["ops"])[0] - plain)
            costs[name] = median(taken)
    costs = {"no observer (cost of the events)": max(0.0, off), **costs}
    for name, seconds in costs.items():
        report.rows.append([name, f"{seconds * 1e6:,.0f} us", f"{seconds / STEP_S:.2%}"])
    step = median(turn["no observer"] for turn in found)
    report.notes.append(f"A step of this engine without observers: {step * 1e6:,.0f} us.")
    report.notes.append(
        "All: progress, JSON lines, CSV, TensorBoard, times and memory by phase, and a trace "
        "outside its window. A trace with operations costs its window about a microsecond or two "
        "for each of them; a step of this model has about a hundred."
    )
    report.checks = [
        Check("no observer, of a step of 50 ms", off / STEP_S, OFF_LIMIT),
        Check("all, of a step of 50 ms", costs[ALL] / STEP_S, ALL_LIMIT),
    ]
    report.raw = {"seconds": costs, "turns": found}
    return report


def _placed(value: Any, folder: Path) -> Any:
    """A config with its folder filled in."""
    if isinstance(value, dict):
        return {key: _placed(item, folder) for key, item in value.items()}
    return value.replace("{}", str(folder)) if isinstance(value, str) else value


if __name__ == "__main__":
    main(run)
