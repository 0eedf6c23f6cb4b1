"""`ds report`: its options. What it does is in `ds_core.cli.reporting`."""

from __future__ import annotations

from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show this machine, torch, what is installed and works, what is missing, and what hurts.

    Paste it into a bug report: secrets in the environment are left out.
    """
    from ds_core.cli.reporting import collect, render

    findings = collect()
    typer.echo(findings.as_json() if json else render(findings), nl=json)
