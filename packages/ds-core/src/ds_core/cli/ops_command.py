"""`ds ops report`, `check`, `build` and `bench`: their options."""

from __future__ import annotations

from typing import Annotated

import typer

from ds_core.cli.groups import command_group

_JSON = typer.Option("--json", help="Print JSON instead of a table.")


def add_to(app: typer.Typer) -> None:
    group = command_group("See, check, build and measure what computes each op.")
    group.command("report")(ops_report)
    group.command("check")(ops_check)
    group.command("build")(ops_build)
    group.command("bench")(ops_bench)
    app.add_typer(group, name="ops")


def ops_report(json: Annotated[bool, _JSON] = False) -> None:
    """Show who computes each op here, why not something faster, and what was checked.

    Builds nothing, and computes nothing.
    """
    from ds_core.cli.ops_report import collect, render

    findings = collect()
    typer.echo(findings.as_json() if json else render(findings), nl=json)


def ops_check(
    names: Annotated[
        list[str] | None, typer.Argument(help="Ops; default: all.", metavar="[OP]...")
    ] = None,
    impl: Annotated[str, typer.Option(help="Only this implementation.")] = "",
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Compare implementations with the reference in float64 on small inputs, in seconds.

    Builds what is not built. Exits with 1 if one is wrong; `ds ops report` shows what was found.
    """
    from ds_core.cli.ops_checks import as_json, check, record, render

    found = check(names or [], impl)
    note = record(found)
    typer.echo(as_json(found) if json else render(found, note), nl=json)
    if any(row.problem for row in found):
        raise typer.Exit(1)


def ops_build(
    everything: Annotated[
        bool, typer.Option("--all", help="Also what this machine would not use.")
    ] = False,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Build for these, with commas between them; default: this machine. For a GPU such "
            "as sm_90 or gfx942, which need not be here, every kernel is compiled, once, in "
            "minutes."
        ),
    ] = None,
    into_package: Annotated[
        bool, typer.Option("--into-package", help="Beside the sources, to go into a wheel.")
    ] = False,
) -> None:
    """Build now what would be built at the first use of an op."""
    from ds_core.cli.ops_tools import tools

    architectures = [name.strip() for text in arch or [] for name in text.split(",")]
    for tool in tools():
        lines = tool.build(
            [name for name in architectures if name],
            everything=everything,
            into_package=into_package,
        )
        for line in lines:
            typer.echo(line)


def ops_bench(
    families: Annotated[
        list[str] | None, typer.Argument(help="Families; default: all.", metavar="[FAMILY]...")
    ] = None,
    seconds: Annotated[float, typer.Option(help="Per row.", min=0.0)] = 1.0,
    only: Annotated[str, typer.Option(help="Rows of ops whose name contains this.")] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a target is missed.")
    ] = False,
    json: Annotated[bool, _JSON] = False,
) -> None:
    """Measure ops beside their floor and a peer, all in the same interleaved run."""
    from ds_core.cli.ops_tools import tools_for

    reached = [
        tool.bench(chosen, seconds=seconds, only=only, as_json=json)
        for tool, chosen in tools_for(families or [])
    ]
    if check and not all(reached):
        raise typer.Exit(1)
