"""`ds trace summary`, `ds trace plot` and `ds trace merge`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_core.cli.groups import command_group

Folder = Annotated[Path, typer.Argument(help="Folder that the recording wrote (output_path).")]


def add_to(app: typer.Typer) -> None:
    trace = command_group(
        "Time lines of training steps: compute, gathers, reductions and waits of every rank. "
        'Record some with "trace": {"enabled": true, "output_path": "trace"} in the config.'
    )
    trace.command("summary")(summary)
    trace.command("plot")(plot)
    trace.command("merge")(merge)
    app.add_typer(trace, name="trace")


def summary(
    folder: Folder,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show how much of the communication is hidden under compute, and what ranks wait for."""
    from ds_core.cli.trace_tables import as_json, render
    from ds_core.tracing import load_folder

    ranks = load_folder(folder)
    typer.echo(as_json(ranks) if json else render(ranks), nl=json)


def plot(
    folder: Folder,
    out: Annotated[Path, typer.Option("-o", "--out", help="PNG, SVG or PDF.")] = Path("trace.png"),
    step: Annotated[
        int | None, typer.Option(help="Which recorded step, 1 for the first (default: the last).")
    ] = None,
) -> None:
    """Draw one step: the lanes of every rank on one time line."""
    from ds_core.tracing import load_folder
    from ds_core.tracing.plot import draw

    draw(load_folder(folder), out, step=step)
    typer.echo(f"wrote {out}")


def merge(
    folder: Folder,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Default: trace.json in the folder.")
    ] = None,
) -> None:
    """Join the rank*.json of all ranks into one file for ui.perfetto.dev.

    A run does this itself where all ranks write to one folder; otherwise copy them together first.
    """
    from ds_core.tracing import load_folder
    from ds_core.tracing import merge as merge_ranks

    ranks = load_folder(folder)
    path = out or folder / "trace.json"
    merge_ranks(ranks, path)
    missing = sorted(set(range(ranks[0].world_size)) - {each.rank for each in ranks})
    told = f"; not there: ranks {', '.join(map(str, missing))}" if missing else ""
    typer.echo(f"wrote {path} ({len(ranks)} of {ranks[0].world_size} ranks{told})")
