"""`ds run`: its options. What it does is in `ds_core.launcher`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ds_core.errors import LaunchError


def add_to(app: typer.Typer) -> None:
    # Options end at the script's name: what follows is the script's, whatever it looks like.
    app.command("run", context_settings={"allow_interspersed_args": False})(run)


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
