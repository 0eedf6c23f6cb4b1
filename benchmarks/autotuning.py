"""`ds tune` against an exhaustive search of the same grid: what it misses, and what it saves."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ds_core.testing import run_ranks
from ds_core.tuning import Outcome, TuningResult, trial, tune
from models import GPT, Shape
from report import Check, Report, main

SHAPE = Shape(vocab=512, width=128, depth=4, heads=4, context=64, tokens=64)
NUM_RANKS = 2
TRAIN_BATCH = 64
MAX_REGRET, MAX_RUNS = 0.03, 0.25
WARMUP, STEPS = 2, 4


def example(micro_batch_size: int) -> tuple[GPT, tuple[torch.Tensor, torch.Tensor]]:
    """What is tuned: a GPT of 0.9 M parameters, and a batch."""
    ids = torch.randint(0, SHAPE.vocab, (micro_batch_size, SHAPE.tokens))
    return GPT(SHAPE), (ids, ids.roll(-1, 1))


def run(quick: bool = False) -> Report:
    """Regret and number of runs of several searches, against every point measured in turns."""
    report = Report(
        "autotuning",
        "Autotuning: a quarter of the runs of an exhaustive search",
        ["search", "chosen", "runs", "of the grid", "regret"],
    )
    configs: list[Mapping[str, Any]] = []

    def note(name: str, config: Mapping[str, Any], steps: int) -> Outcome:
        configs.append(config)
        return Outcome(1.0)

    sizes = 4 if quick else 99
    grid = _search("exhaustive", sizes, strategy="gridsearch", runner=note)
    points = dict(zip((row.point for row in grid.records), configs, strict=True))
    seconds: dict[str, list[float]] = {point: [] for point in points}
    for _ in range(1 if quick else 5):
        for point, config in points.items():
            seconds[point] += _measure(config, STEPS)
    cost = {point: statistics.median(values) for point, values in seconds.items()}
    best = min(cost, key=lambda point: cost[point])
    report.rows.append(["exhaustive", best, str(len(points)), "100 %", "0 %"])
    regrets, fractions = [], []
    for number in range(3 if quick else 5):
        found = _search(f"tuned {number}", sizes, strategy="model_based", runner=_outcome)
        regret = cost[found.best_point.key] / cost[best] - 1
        fraction = len(found.records) / len(points)
        regrets.append(regret)
        fractions.append(fraction)
        report.rows.append(
            [
                f"ds tune, {number + 1}",
                found.best_point.key,
                str(len(found.records)),
                f"{fraction:.0%}",
                f"{regret:.1%}",
            ]
        )
    report.checks += [
        Check("median regret", statistics.median(regrets), MAX_REGRET),
        Check("largest part of the grid that was run", max(fractions), MAX_RUNS),
    ]
    report.notes += [
        f"{len(points)} points: stage, micro-batch, prefetching; {NUM_RANKS} gloo ranks; a global "
        f"batch of {TRAIN_BATCH}",
        "cost: processor time of a step, all ranks together, which a busy machine does not disturb",
        "regret: how much dearer the chosen point is than the best, both by the exhaustive figures "
        f"(medians of steps in turns); they differ between turns by {_spread(seconds):.0%} (median "
        "of the points' interquartile ranges)",
        f"regrets of all searches: {', '.join(f'{regret:.1%}' for regret in regrets)}",
    ]
    report.raw = {"processor seconds of a step": seconds, "regrets": regrets}
    return report


def _search(name: str, sizes: int, *, strategy: str, runner: Any) -> TuningResult:
    with tempfile.TemporaryDirectory() as folder:
        document = _document() | {
            "autotuning": {
                "tuner_type": strategy,
                "tuner_early_stopping": 0,
                "num_tuning_micro_batch_sizes": sizes,
                "start_profile_step": WARMUP,
                "end_profile_step": WARMUP + STEPS,
                "results_dir": str(Path(folder) / name),
            }
        }
        return tune(f"{__file__}:example", document, nproc=NUM_RANKS, runner=runner)


def _document() -> dict[str, Any]:
    return {
        "train_batch_size": TRAIN_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
    }


def _outcome(name: str, config: Mapping[str, Any], steps: int) -> Outcome:
    return Outcome(statistics.median(_measure(config, steps)))


def _measure(config: Mapping[str, Any], steps: int) -> list[float]:
    """Processor seconds of each step, all ranks together: others on the machine do not count."""
    found = run_ranks(NUM_RANKS, trial.run, f"{__file__}:example", dict(config), WARMUP, steps)
    return [
        sum(ranks) for ranks in zip(*(each["processor_seconds"] for each in found), strict=True)
    ]


def _spread(seconds: Mapping[str, list[float]]) -> float:
    spreads = []
    for values in seconds.values():
        low, middle, high = statistics.quantiles(values, n=4)
        spreads.append((high - low) / middle)
    return statistics.median(spreads)


if __name__ == "__main__":
    main(run)
