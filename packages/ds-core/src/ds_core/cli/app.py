"""The `ds` command: its own commands, and those that installed packages add."""

from __future__ import annotations

from typing import Annotated

import typer

from ds_core._version import __version__
from ds_core.cli import (
    bench_command,
    checkpoint_command,
    config_command,
    elastic_command,
    env_command,
    hosts_command,
    ops_command,
    plan_command,
    report_command,
    run_command,
    trace_command,
    tune_command,
)
from ds_core.cli.groups import command_group
from ds_core.cli.plugin_commands import add_plugin_commands

#: Each has its options in a module `<name>_command`, and imports what it does when invoked.
OWN_COMMANDS = {
    "run": run_command,
    "hosts": hosts_command,
    "env": env_command,
    "report": report_command,
    "config": config_command,
    "checkpoint": checkpoint_command,
    "plan": plan_command,
    "tune": tune_command,
    "elastic": elastic_command,
    "trace": trace_command,
    "ops": ops_command,
    "bench": bench_command,
}


def make_app() -> typer.Typer:
    """The whole command line, with the commands that installed packages register."""
    app = command_group("Train large models with small packages.")
    app.callback(invoke_without_command=False)(_root)
    for command in OWN_COMMANDS.values():
        command.add_to(app)
    add_plugin_commands(app, taken=OWN_COMMANDS)
    return app


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"ds-core {__version__}")
        raise typer.Exit


def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version),
    ] = False,
) -> None:
    pass
