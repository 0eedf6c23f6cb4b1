"""`ds run`: its options. What it does is in `ds_core.launcher`."""

from __future__ import annotations

import shlex
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_core.cli.dropin import dropin_problems
from ds_core.cli.panels import PanelCommand
from ds_core.errors import DsError, LaunchError

if TYPE_CHECKING:
    from ds_core.launcher import LaunchSpec

_WHAT = "What to run"
_PROCESSES = "Processes and devices"
_ENVIRONMENT = "Environment of the processes"
_WATCH = "While it runs"
_HOSTS = "Several hosts, started from here"
_NODES = "Several nodes, each started by hand or by a cluster manager"


def add_to(app: typer.Typer) -> None:
    # Options end at the script's name: what follows is the script's, whatever it looks like.
    app.command("run", context_settings={"allow_interspersed_args": False}, cls=_RunHelp)(run)


class _RunHelp(PanelCommand):
    """Help that ends with the rules of the launcher, in the launcher's own words."""

    def closing_text(self) -> str:
        from ds_core.launcher.devices import PRECEDENCE
        from ds_core.launcher.environment import FORWARDING

        return "\n\n".join([_EXAMPLES, PRECEDENCE, textwrap.fill(FORWARDING, 96), _ENDINGS])


#: How long the agent of a node that has failed stays, so that the others can report as well.
_LAST_WORDS_S = 1.5
_EXAMPLES = """\
Examples:
  ds run --nproc 2 train.py --lr 1e-3
  ds run --hostfile hosts --include host1:0,1@host2 train.py
  ds run --launcher slurm --num-nodes 4 --nproc 8 train.py
  ds run --launcher kubernetes --num-nodes 2 --nproc 8 -O image=IMAGE train.py
  ds run --hostfile hosts --dry-run train.py      # the exact command for every host"""
_ENDINGS = """\
Exit codes: that of the process that failed first, or 128 + N if signal N ended it (130 after
Ctrl-C); 124 after --timeout-s; 2 if the job could not be started."""


def run(
    context: typer.Context,
    script: Annotated[
        str,
        typer.Argument(help="Python file; with --module, a module.", rich_help_panel=_WHAT),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments of the script, handed on untouched.", rich_help_panel=_WHAT),
    ] = None,
    module: Annotated[
        bool,
        typer.Option("--module", help="Run SCRIPT as `python -m SCRIPT`.", rich_help_panel=_WHAT),
    ] = False,
    no_python: Annotated[
        bool,
        typer.Option(
            "--no-python",
            help="SCRIPT is a program; run it without Python.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the commands, host by host, and start nothing.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    nproc: Annotated[
        str,
        typer.Option(
            help="Processes on each node. auto: one per slot of the hostfile, else one per visible "
            "accelerator, else one.",
            rich_help_panel=_PROCESSES,
        ),
    ] = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices to use on each node, such as 0,2 or 4-7. What this means for "
            "CUDA_VISIBLE_DEVICES is below.",
            rich_help_panel=_PROCESSES,
        ),
    ] = None,
    bind_cores: Annotated[
        str | None,
        typer.Option(
            help="auto, or cores such as 0-15,32-47: give each process its own share of them, "
            "within one NUMA node if possible, with memory of that node (if numactl is "
            "installed), and OMP_NUM_THREADS to match.",
            rich_help_panel=_PROCESSES,
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE to set a variable on every node, or NAME for its value here. Repeat "
            "for more.",
            rich_help_panel=_ENVIRONMENT,
        ),
    ] = None,
    env_file: Annotated[
        str | None,
        typer.Option(
            help="File of NAME=VALUE lines. Without: the file that DS_ENV_FILE names, else .ds_env "
            "or .deepspeed_env of the current folder, else of the home folder.",
            rich_help_panel=_ENVIRONMENT,
        ),
    ] = None,
    no_env_file: Annotated[
        bool, typer.Option("--no-env-file", help="Read none.", rich_help_panel=_ENVIRONMENT)
    ] = False,
    max_restarts: Annotated[
        int,
        typer.Option(
            help="How often to start all processes again after a failure.", rich_help_panel=_WATCH
        ),
    ] = 0,
    min_nproc: Annotated[
        int | None,
        typer.Option(
            help="Start again without the process that failed first, and its device, as long as so "
            "many are left; without this option, always with as many. For one node: nodes leave a "
            "job of --nnodes MIN:MAX.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    log_dir: Annotated[
        str | None,
        typer.Option(
            help="Folder for the output of every rank: rank<N>.stdout.log, rank<N>.stderr.log. "
            "Without: a temporary one, kept if the job fails.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(
            help="Whose output appears here: node (the first process of this node), job (rank 0 "
            "only), or all, each line with its rank. Default: node; with several hosts, job.",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(help="End the job after so many seconds.", rich_help_panel=_WATCH),
    ] = None,
    hostfile: Annotated[
        str | None,
        typer.Option(
            "--hostfile",
            "-H",
            help="File with a line `HOST slots=N` for each host; # begins a comment. None is read "
            "unless named.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    include: Annotated[
        str | None,
        typer.Option(
            "--include",
            "-i",
            help="Use these hosts and slots only: HOST[:SLOTS] joined by @, such as "
            "host1:0,2@host2:4-7@host3. Named slots are device numbers.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    exclude: Annotated[
        str | None,
        typer.Option(
            "--exclude", "-e", help="Use all but these, written alike.", rich_help_panel=_HOSTS
        ),
    ] = None,
    num_nodes: Annotated[
        int | None,
        typer.Option(
            help="Use the first so many hosts of the hostfile, or ask the cluster manager for so "
            "many.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="How to reach the hosts: ssh (default with --hostfile), pdsh, slurm, openmpi, "
            "mpich, impi, kubernetes, ray, or what a package adds.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    launcher_option: Annotated[
        list[str] | None,
        typer.Option(
            "--launcher-option",
            "-O",
            help="NAME=VALUE for the launcher; --list-launchers shows the names. Repeat for more.",
            rich_help_panel=_HOSTS,
        ),
    ] = None,
    launcher_args: Annotated[
        str,
        typer.Option(
            help="Further words for the program that it calls, such as '-i key' for ssh.",
            rich_help_panel=_HOSTS,
        ),
    ] = "",
    python: Annotated[
        str | None,
        typer.Option(
            help="Python on the hosts. Default: the path of this one.", rich_help_panel=_HOSTS
        ),
    ] = None,
    list_launchers: Annotated[
        bool,
        typer.Option(
            "--list-launchers",
            help="List the launchers and their options, and exit.",
            is_eager=True,
            callback=lambda is_asked: _list_launchers(is_asked),
            rich_help_panel=_HOSTS,
        ),
    ] = False,
    nnodes: Annotated[
        str,
        typer.Option(
            help="Number of nodes; MIN:MAX for an elastic job, whose nodes may come and go.",
            rich_help_panel=_NODES,
        ),
    ] = "1",
    node_rank: Annotated[
        str | None,
        typer.Option(
            help="This node's number, from 0, or auto: what Slurm, MPI or Kubernetes says. "
            "Without, nodes number themselves.",
            rich_help_panel=_NODES,
        ),
    ] = None,
    rdzv_endpoint: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT where nodes meet, the same on all: an address of the first node and a "
            "free port there. auto[:PORT]: the first host by Slurm or Kubernetes. With --hostfile: "
            "its first host, port 29500.",
            rich_help_panel=_NODES,
        ),
    ] = None,
    rdzv_conf: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, a setting of torchrun's rendezvous, such as timeout=60.",
            rich_help_panel=_NODES,
        ),
    ] = None,
    local_addr: Annotated[
        str | None,
        typer.Option(help="This node's address for the others.", rich_help_panel=_NODES),
    ] = None,
    as_node: Annotated[
        bool,
        typer.Option(
            "--as-node",
            help="Report a failure as one line of JSON; how `ds run` starts itself on a host.",
            rich_help_panel=_NODES,
        ),
    ] = False,
    tied_to_stdin: Annotated[
        bool,
        typer.Option(
            "--tied-to-stdin",
            help="End the job when stdin ends, as it does when ssh drops.",
            rich_help_panel=_NODES,
        ),
    ] = False,
) -> None:
    """Start a script in several processes, here or on many hosts, with torchrun's environment.

    Every process gets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and the rest of torchrun's
    variables, and no argument of ours. The first process prints here; all write to files. When
    one fails, all are ended, and its traceback is shown last and alone.
    """
    from ds_core.launcher import LaunchSpec
    from ds_core.launcher.devices import parse_devices

    spec = LaunchSpec(
        script=script,
        args=tuple(arguments or ()),
        nproc=number_or(nproc, "auto", "--nproc"),
        nnodes=nnodes,
        node_rank=None if node_rank is None else number_or(node_rank, "auto", "--node-rank"),
        rdzv_endpoint=rdzv_endpoint,
        rdzv_conf=tuple(_pair(text, "--rdzv-conf") for text in rdzv_conf or ()),
        local_addr=local_addr,
        devices=None if devices is None else parse_devices(devices),
        bind_cores=bind_cores,
        env=tuple(env or ()),
        env_file=env_file,
        reads_env_file=not no_env_file,
        max_restarts=max_restarts,
        min_nproc=min_nproc,
        log_dir=log_dir,
        show=_show(show),
        timeout_s=timeout_s,
        is_module=module,
        with_python=not no_python,
    )
    is_quiet = not context.find_root().params.get("debug", False)
    for problem in () if as_node else dropin_problems():
        typer.echo(f"warning: {problem}", err=True)
    with _interrupted_early():
        if hostfile is None and launcher is None:
            for name, value in (
                ("--include", include),
                ("--exclude", exclude),
                ("--num-nodes", num_nodes),
                ("--launcher-option", launcher_option or None),
                ("--launcher-args", launcher_args or None),
                ("--python", python),
            ):
                if value is not None:
                    raise LaunchError(
                        f"{name}: is for several hosts; give --hostfile or --launcher"
                    )
            _run_here(spec, dry_run, is_quiet, as_node, tied_to_stdin)
            return
        if min_nproc is not None:
            raise LaunchError(
                "--min-nproc: is for one node; on several hosts give --nnodes MIN:MAX"
            )
        from ds_core.launcher.cluster import ClusterSpec

        cluster = ClusterSpec(
            hostfile=hostfile,
            include=include,
            exclude=exclude,
            num_nodes=num_nodes,
            launcher=launcher or "ssh",
            options=dict(_pair(text, "--launcher-option") for text in launcher_option or ()),
            arguments=split_words(launcher_args, "--launcher-args"),
            python=python,
        )
        _run_on_hosts(spec, cluster, dry_run)


def _run_here(
    spec: LaunchSpec, dry_run: bool, is_quiet: bool, as_node: bool, tied_to_stdin: bool
) -> None:
    from ds_core.launcher import JobFailure, launch, make_plan

    if dry_run:
        typer.echo(make_plan(spec).describe())
        return
    try:
        launch(spec, quiet=is_quiet, is_tied_to_stdin=tied_to_stdin)
    except DsError as error:
        if not as_node:
            raise
        from ds_core.launcher.node_report import own_node_rank, report_line

        sys.stderr.buffer.write(report_line(error, own_node_rank(spec)))
        sys.stderr.flush()
        if not isinstance(error, JobFailure) or error.node_failure is not None:
            # srun and others end all nodes when one ends: let them have their say before.
            time.sleep(_LAST_WORDS_S)
        raise typer.Exit(error.exit_code if isinstance(error, JobFailure) else 2) from None


def _run_on_hosts(spec: LaunchSpec, cluster: Any, dry_run: bool) -> None:
    from ds_core.launcher.cluster import Manifest, describe, load_launcher, make_cluster_job
    from ds_core.launcher.head import launch_on_hosts

    launcher = load_launcher(cluster.launcher)
    job = make_cluster_job(spec, cluster, launcher)
    commands = launcher.commands(job)
    if dry_run or isinstance(commands, Manifest):
        typer.echo(describe(job, commands))
        return
    launch_on_hosts(job, commands, timeout_s=spec.timeout_s)


def _list_launchers(is_asked: bool) -> None:
    if not is_asked:
        return
    from ds_core import plugins
    from ds_core.launcher.cluster import load_launcher

    for name in sorted(plugins.registered("launchers")):
        launcher = load_launcher(name)
        typer.echo(f"{name}: {launcher.summary}")
        for option, meaning in launcher.options.items():
            typer.echo(f"    -O {option}=...  {meaning}")
    raise typer.Exit


def _interrupted_early() -> Any:
    """Report a Ctrl-C from before the job took charge of signals in one line, too."""
    import contextlib

    from ds_core.launcher import JobFailure

    @contextlib.contextmanager
    def block() -> Any:
        try:
            yield
        except KeyboardInterrupt:
            raise JobFailure("the job was ended by SIGINT before it began", 130) from None

    return block()


def number_or(text: str, word: str, option: str) -> Any:
    """The number that an option gives, or `word`. Raises LaunchError for anything else."""
    if text == word:
        return text
    try:
        return int(text)
    except ValueError:
        raise LaunchError(f"{option}: got {text!r}, expected a number or {word}") from None


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise LaunchError(f"{option}: got {text!r}, expected NAME=VALUE")
    return name, value


def split_words(text: str, option: str) -> tuple[str, ...]:
    """The words of an option, as a shell would split it. Raises LaunchError if it could not."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise LaunchError(f"{option}: got {text!r}: {error}") from None


def _show(text: str | None) -> Any:
    if text not in (None, "node", "job", "all"):
        raise LaunchError(f"--show: got {text!r}, expected node, job or all")
    return text or "node"
