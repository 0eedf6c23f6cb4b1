"""Run the benchmarks: all, or those named.

    python benchmarks/run.py                            # everything; an hour on two cores
    python benchmarks/run.py memory parity --quick      # a first look
    python benchmarks/run.py --update-readme            # only renew the README's tables

Each writes `benchmarks/results/NAME.json` and prints a table with its targets; `--update-readme`
puts the tables of all results that exist into README.md. The exit status is 0 whatever the verdicts
are, unless `--strict` is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path

from report import RESULTS, Report

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- results begin -->", "<!-- results end -->"

BENCHMARKS = {
    "train_step": "time, processor time, losses and memory of a training step",
    "wire_bytes": "bytes that a rank sends in a step",
    "memory": "bytes that a rank holds between steps, and the peak of stage 3",
    "parity": "losses against one process; bit-identity of stages 1 to 3",
    "data_efficiency": "FLOPs that curricula and dropping need for a baseline's loss, on real text",
    "host_overhead": "what a step costs where the model costs nothing",
    "observers": "what observers add to a step",
    "checkpoint": "what training waits for a checkpoint, and how fast it is written",
    "trainer_step": "a step of transformers' Trainer, and the import, beside the original",
    "import_time": "what importing a package adds to `import torch`",
    "offload": "the largest model under a memory cap, states on disk, the rate of the disk",
    "twin_flow": "a step of the optimizer by the share that the host takes; ratio auto",
    "autotuning": "`ds tune` against an exhaustive search of the same grid",
}


def main() -> None:
    """Parse the command line and do what it says."""
    arguments = _parse()
    missed = 0
    for name in arguments.names:
        begin = time.perf_counter()
        report: Report = importlib.import_module(name).run(arguments.quick)
        report.save(quick=arguments.quick)
        print(report.text())
        print(f"\n({name}: {time.perf_counter() - begin:.0f} s)\n", flush=True)
        missed += sum(not check.is_met for check in report.checks)
    if arguments.names:
        print(f"targets missed: {missed}" if missed else "all targets met")
    if arguments.update_readme:
        update_readme()
    if missed and arguments.strict:
        raise SystemExit(1)


def _parse() -> argparse.Namespace:
    listed = "\n".join(f"  {name:15}{about}" for name, about in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        description="Run the benchmarks.",
        epilog=f"benchmarks:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="which (default: all; see below)")
    parser.add_argument("--quick", action="store_true", help="few repetitions, a smaller model")
    parser.add_argument("--strict", action="store_true", help="fail if a target is missed")
    parser.add_argument(
        "--update-readme",
        action="store_true",
        help="put the saved results into README.md; with no names, run nothing",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if not arguments.names and not arguments.update_readme:
        arguments.names = list(BENCHMARKS)
    return arguments


def update_readme() -> None:
    """Replace what stands between the README's markers by the tables of the saved results."""
    saved = [
        json.loads(path.read_text())
        for path in (RESULTS / f"{name}.json" for name in BENCHMARKS)
        if path.exists()
    ]
    if not saved:
        sys.exit(f"there are no results in {RESULTS}: run the benchmarks first")
    parts = [f"{each['text']}\n\n{_origin(each)}" for each in saved]
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}")
    print(f"{README}: {len(saved)} tables")


def _origin(saved: dict[str, object]) -> str:
    machine = saved["machine"]
    assert isinstance(machine, dict)
    quick = ", `--quick`: a small model, few repetitions" if saved["quick"] else ""
    processor = re.sub(r"\s+", " ", machine["processor"])
    return (
        f"*{machine['date']}, {machine['cores']} cores ({processor}), torch {machine['torch']}, "
        f"Python {machine['python']}{quick}*"
    )


if __name__ == "__main__":
    main()
