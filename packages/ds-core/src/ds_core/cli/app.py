"""The commands and their options. What they do is imported when they are invoked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ds_core._version import __version__
from ds_core.cli.plugin_commands import add_plugin_commands
from ds_core.errors import LaunchError

OWN_COMMANDS = frozenset({"run", "report", "config"})


def make_app() -> typer.Typer:
    """The whole command line, with the commands that installed packages register."""
    app = _group("Train large models with small packages.")
    app.callback(invoke_without_command=False)(_root)
    # Options end at the script's name: what follows is the script's, whatever it looks like.
    app.command("run", context_settings={"allow_interspersed_args": False})(run)
    app.command("report")(report)
    config = _group("Check and document config files.")
    config.command("check")(config_check)
    config.command("schema")(config_schema)
    app.add_typer(config, name="config")
    add_plugin_commands(app, taken=OWN_COMMANDS)
    return app


def _group(summary: str) -> typer.Typer:
    return typer.Typer(
        help=summary,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


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


def run(
    context: typer.Context,
    script: Annotated[str, typer.Argument(help="Python file; with --module, a module.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments of the script, handed on untouched.")
    ] = None,
    nproc: Annotated[
        str, typer.Option(help="Processes on this node; auto: one per accelerator, or one.")
    ] = "auto",
    nnodes: Annotated[str, typer.Option(help="Number of nodes, or MIN:MAX.")] = "1",
    node_rank: Annotated[
        int | None, typer.Option(help="This node's number, to number nodes by hand.")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option(help="HOST:PORT where nodes meet, the same on all nodes.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(help="Restarts after a failure.")] = 0,
    log_dir: Annotated[
        str | None, typer.Option(help="Folder for the output of every rank.")
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="End the job after so many seconds.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and their environment only.")
    ] = False,
    module: Annotated[
        bool, typer.Option("--module", help="Run SCRIPT as `python -m SCRIPT`.")
    ] = False,
    no_python: Annotated[
        bool, typer.Option("--no-python", help="SCRIPT is a program; run it without Python.")
    ] = False,
) -> None:
    """Start a script in several processes, with torchrun's environment.

    Every process gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and the rest of torchrun's
    variables, and no argument of ours. The first process prints here; all write to files.
    """
    from ds_core.launcher import LaunchSpec, launch, make_plan

    spec = LaunchSpec(
        script=script,
        args=tuple(arguments or ()),
        nproc=_num_processes(nproc),
        nnodes=nnodes,
        node_rank=node_rank,
        rdzv_endpoint=rdzv_endpoint,
        max_restarts=max_restarts,
        log_dir=log_dir,
        timeout_s=timeout_s,
        is_module=module,
        with_python=not no_python,
    )
    if dry_run:
        typer.echo(make_plan(spec).describe())
        return
    root = context.find_root().params
    launch(spec, quiet=not root.get("debug", False))


def _num_processes(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"--nproc: got {text!r}, expected a number or auto") from None


def report(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show this machine, torch, the packages of the suite and what they provide."""
    from ds_core.cli.reporting import collect, render

    findings = collect()
    typer.echo(findings.as_json() if json else render(findings), nl=json)


def config_check(
    file: Annotated[Path, typer.Argument(help="JSON file.")],
    world_size: Annotated[int, typer.Option(help="Data-parallel ranks to solve it for.")] = 1,
    meanings: Annotated[
        bool, typer.Option("--meanings", help="Say for every key what it does.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check a config file, and show every value in effect with its origin.

    A file with problems lists all of them, and exits with 2.
    """
    from ds_core.cli.config_table import as_json, render
    from ds_core.config import explain, load

    rows = explain(load(file, world_size=world_size))
    typer.echo(as_json(rows) if json else render(rows, with_meanings=meanings), nl=json)


def config_schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    import json

    from ds_core.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
