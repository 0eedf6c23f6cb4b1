"""`ds tune`: its options. What it does is in `ds_core.tuning`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("tune")(tune)


def tune(
    target: Annotated[
        str,
        typer.Argument(
            metavar="FUNCTION",
            help="FILE.py:FUNCTION or MODULE:FUNCTION that returns (model, batch). It may take "
            "micro_batch_size. The model is called with the batch and returns its loss.",
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", help="JSON config to start from; it stays as it is."),
    ],
    nproc: Annotated[int, typer.Option(help="Processes on this node.")] = 1,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE,VALUE",
            help="A key and the values to try, such as zero_optimization.stage=1,2. Repeatable; "
            "replaces the default space, which is stage, micro-batch and prefetching.",
        ),
    ] = None,
    max_runs: Annotated[
        int | None,
        typer.Option(help="Runs at most; default: a quarter of the points that fit, 4 or more."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="Kind of device, as for `ds plan`; default: what this machine has."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the best config; default: best_config.json in "
            "autotuning.results_dir."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take up the results of an interrupted search.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a trial may take.")] = 600.0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Find the config that trains fastest here: short trials, and none for what cannot fit.

    Every point of the space is predicted as by `ds plan`. The most promising run for a few steps
    each in processes of their own, the better half of them again for longer. The config's
    "autotuning" section says what is best (metric), how long to search and where results go; all
    runs are in results.json, their output in autotuning.exps_dir.
    """
    from ds_core.cli.tune_report import as_json, render
    from ds_core.config.document import read
    from ds_core.planning import find_device
    from ds_core.tuning.records import write_best
    from ds_core.tuning.space import parse_knob
    from ds_core.tuning.tuner import tune as search

    document = read(file).data
    section = document.get("autotuning", {})
    if resume and isinstance(section, dict):  # what else it is, is refused below
        document["autotuning"] = {**section, "overwrite": False}
    result = search(
        target,
        document,
        nproc=nproc,
        space=dict(parse_knob(text) for text in set_ or ()),
        device=None if gpu is None else find_device(gpu),
        max_runs=max_runs,
        timeout_s=timeout_s,
        report=lambda line: typer.echo(line, err=True),
    )
    if output is not None:
        write_best(output, result.best)
    typer.echo(as_json(result, output) if json else render(result, output), nl=json)
