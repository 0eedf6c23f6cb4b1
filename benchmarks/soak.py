"""Faults at random points of real runs on two and four ranks: does every run survive?

    python benchmarks/soak.py --faults 200 --seed 1 --at-once 3

Each fault befalls a job twice: without a launcher, where every survivor must end within the timeout
with an error that names the cause, and under `ds run --max-restarts`, which must go on by itself,
half of the time on fewer ranks, with the losses of an undisturbed run. The exit status is 1 if
anything was not as it must be.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from ds_core.testing.faults import KINDS, Kind, draw, small_disk
from report import Check, Report
from soak_job import OFFLOADS
from soak_trial import (
    BASE_STEPS,
    DISK_BYTES,
    STEPS,
    TOLERANCE,
    Outcome,
    Trial,
    reference,
    run_trial,
    start_server,
)

COLUMNS = ["#", "fault", "where", "ranks", "s", "survivors say", "newest", "went on", "verdict"]
#: More of what can strike at many points.
WEIGHTS: dict[Kind, int] = {
    "kill": 5, "stop": 5, "full disk": 2, "swap error": 2, "stopped writer": 2,
}  # fmt: skip


def plan(num_faults: int, seed: int) -> list[Trial]:
    """The trials that a seed stands for.

    Every kind comes before one comes for the second time, and so does every home of states.
    """
    source = random.Random(seed)
    first: list[Kind] = [*KINDS]
    source.shuffle(first)
    many = [kind for kind in KINDS for _ in range(WEIGHTS.get(kind, 1))]
    trials, homes = list[Trial](), list[str]()
    for number in range(num_faults):
        kind = first[number] if number < len(first) else source.choice(many)
        num_ranks = source.choice([2, 4])
        steps = range(BASE_STEPS + 1, STEPS)
        fault = draw(source, num_ranks=num_ranks, steps=steps, kinds=[kind])
        if fault.point == "save":  # after every other step; the last would leave nothing to do
            fault = replace(fault, step=BASE_STEPS + 2)
        fewer = source.choice([num_ranks, source.randrange(1, num_ranks)])
        homes = homes or source.sample(OFFLOADS, len(OFFLOADS))
        offload = "nvme" if kind == "swap error" else homes.pop()
        stage = source.choice([0, 1, 2, 3] if offload == "none" else [1, 2, 3])
        asynchronous = kind == "stopped writer" or source.random() < 0.5
        # A rank that returns a wrong shape is found where collectives are compared.
        checks = kind == "wrong shape" or source.random() < 0.3
        own_store = source.random() < 0.25
        trials.append(
            Trial(fault, num_ranks, stage, fewer, checks, own_store, offload, asynchronous)
        )
    return trials


def soak(
    trials: Sequence[Trial],
    folder: Path,
    *,
    goes_on_every: int = 1,
    tells: bool = False,
    at_once: int = 1,
) -> list[Outcome]:
    """What came of each trial, in order.

    Args:
        trials: to run.
        folder: empty; holds the runs.
        goes_on_every: 1 tries `ds run` after each fault, 3 after each third one.
        tells: whether each is printed once it and those before it are done.
        at_once: trials beside one another; much of each is waiting.
    """
    start_server()
    expected = reference(folder)
    outcomes = []
    with ThreadPoolExecutor(at_once) as pool:
        runs = [
            pool.submit(
                run_trial,
                trial,
                folder,
                expected,
                name=str(number),
                goes_on=number % goes_on_every == 0,
            )
            for number, trial in enumerate(trials)
        ]
        for number, run in enumerate(runs):
            outcome = run.result()
            outcomes.append(outcome)
            if tells:
                print(" | ".join(_row(number, outcome)), flush=True)
                for problem in outcome.problems:
                    print(f"    {problem}", flush=True)
    return outcomes


def report(outcomes: Sequence[Outcome], seed: int) -> Report:
    """The table of all trials, with the worst time per kind of fault."""
    rows = [_row(number, outcome) for number, outcome in enumerate(outcomes)]
    slowest: dict[str, float] = collections.defaultdict(float)
    for outcome in outcomes:
        kind = outcome.trial.fault.kind
        slowest[kind] = max(slowest[kind], outcome.error_s)
    counts = collections.Counter(outcome.trial.fault.kind for outcome in outcomes)
    told = ", ".join(f"{kind} {counts[kind]} ({slowest[kind]:.1f} s)" for kind in sorted(counts))
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    with tempfile.TemporaryDirectory() as place, small_disk(place, DISK_BYTES) as is_mounted:
        disk = "a small tmpfs" if is_mounted else "a limit to the size of files (RLIMIT_FSIZE)"
    return Report(
        "soak",
        f"{len(outcomes)} faults in runs on two and four ranks (seed {seed})",
        COLUMNS,
        rows,
        checks=[Check("runs that did not survive as they must", failed, 0)],
        notes=[
            f"by kind, with the longest time from fault to the last survivor's end: {told}",
            f"a full disk is {disk}; collectives time out after 5 s",
            f"`went on`: ranks of each attempt of `ds run`; losses within {TOLERANCE:g} of an "
            f"undisturbed run on one rank",
        ],
        raw={"outcomes": [asdict(outcome) for outcome in outcomes], "seed": seed},
    )


def _row(number: int, outcome: Outcome) -> list[str]:
    trial = outcome.trial
    words = collections.Counter(_short(text) for text in outcome.said.values())
    said = "; ".join(f"{count} x {text}" for text, count in words.most_common())
    return [
        str(number + 1),
        str(trial.fault),
        outcome.where,
        ", ".join(_settings(trial)),
        f"{outcome.error_s:.1f}",
        said.replace("|", "/"),
        outcome.newest,
        " -> ".join(map(str, outcome.attempts)) or "not tried",
        "**failed**" if outcome.problems else "survived",
    ]


def _settings(trial: Trial) -> Iterator[str]:
    yield str(trial.num_ranks)
    yield f"stage {trial.stage}"
    if trial.offload != "none":
        yield trial.offload
    if trial.asynchronous:
        yield "asynchronous"
    if trial.checks:
        yield "checked"


def _short(text: str, most: int = 110) -> str:
    for begin in ("failed on rank", "failed on ", ": "):
        if begin in text:
            text = text.partition(begin)[2].lstrip("0123456789: ")
            break
    return text if len(text) <= most else text[:most] + "..."


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200, help="how many (200)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--only", type=int, help="run one of them, by its number in the table")
    parser.add_argument(
        "--goes-on-every", type=int, default=1, help="try `ds run` after each N-th fault only (1)"
    )
    parser.add_argument("--at-once", type=int, default=1, help="beside one another (1)")
    parser.add_argument("--save", action="store_true", help="write results/soak.json")
    arguments = parser.parse_args()
    trials = plan(arguments.faults, arguments.seed)
    if arguments.only is not None:
        trials = [trials[arguments.only - 1]]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ds-soak-") as folder:
        outcomes = soak(
            trials,
            Path(folder),
            goes_on_every=arguments.goes_on_every,
            tells=True,
            at_once=arguments.at_once,
        )
    done = report(outcomes, arguments.seed)
    print(done.text())
    print(f"\n({len(outcomes)} faults in {time.perf_counter() - begin:.0f} s)")
    if arguments.save:
        print(done.save(quick=False))
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()
