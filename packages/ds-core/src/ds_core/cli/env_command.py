"""`ds env`: its options. What it does is in `ds_core.launcher.environment_report`."""

from __future__ import annotations

from typing import Annotated

import typer

from ds_core.cli.run_command import number_or


def add_to(app: typer.Typer) -> None:
    app.command("env")(env)


def env(
    nproc: Annotated[str, typer.Option(help="Processes on this node, as for `ds run`.")] = "auto",
    nnodes: Annotated[str, typer.Option(help="Number of nodes, as for `ds run`.")] = "1",
    node_rank: Annotated[
        str | None, typer.Option(help="This node's number, or auto, as for `ds run`.")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT where nodes meet, or auto, as for `ds run`.")
    ] = None,
    devices: Annotated[str | None, typer.Option(help="Devices, as for `ds run`.")] = None,
    set_env: Annotated[
        list[str] | None, typer.Option("--env", help="NAME=VALUE or NAME, as for `ds run`.")
    ] = None,
    env_file: Annotated[str | None, typer.Option(help="File of NAME=VALUE lines.")] = None,
    no_env_file: Annotated[bool, typer.Option("--no-env-file", help="Read none.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if there are problems.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show the environment that a job would get here, and where each variable comes from.

    Give the options that you would give `ds run`. Shown are the variables of the first process
    that concern a job; what is wrong or contradictory among them comes last, with what to do.
    """
    from ds_core.cli.tables import table
    from ds_core.launcher import LaunchSpec
    from ds_core.launcher.devices import parse_devices
    from ds_core.launcher.environment_report import report_environment

    report = report_environment(
        LaunchSpec(
            script="true",  # any program: only its environment is of interest
            with_python=False,
            nproc=number_or(nproc, "auto", "--nproc"),
            nnodes=nnodes,
            node_rank=None if node_rank is None else number_or(node_rank, "auto", "--node-rank"),
            rdzv_endpoint=rdzv_endpoint,
            devices=None if devices is None else parse_devices(devices),
            env=tuple(set_env or ()),
            env_file=env_file,
            reads_env_file=not no_env_file,
        )
    )
    if json:
        typer.echo(report.as_json())
    else:
        rows = [(each.name, each.value, each.origin) for each in report.variables]
        typer.echo(table("", rows, ("variable", "value", "from")), nl=False)
        typer.echo(f"\nenv file: {report.env_file or 'none'}")
        typer.echo("problems: none" if not report.problems else "problems:")
        for problem in report.problems:
            typer.echo(f"  - {problem}")
    if check and report.problems:
        raise typer.Exit(1)
