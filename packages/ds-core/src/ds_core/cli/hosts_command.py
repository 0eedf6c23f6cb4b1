"""`ds hosts list` and `ds hosts run`: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ds_core.cli.groups import command_group
from ds_core.cli.run_command import split_words

_Hostfile = Annotated[
    str, typer.Option("--hostfile", "-H", help="File with a line `HOST slots=N` for each host.")
]
_Include = Annotated[
    str | None, typer.Option("--include", "-i", help="These hosts only: HOST[:SLOTS] joined by @.")
]
_Exclude = Annotated[str | None, typer.Option("--exclude", "-e", help="All but these.")]


def add_to(app: typer.Typer) -> None:
    hosts = command_group("Work with the hosts of a hostfile.")
    hosts.command("list")(hosts_list)
    hosts.command("run", context_settings={"allow_interspersed_args": False})(hosts_run)
    app.add_typer(hosts, name="hosts")


def hosts_list(hostfile: _Hostfile, include: _Include = None, exclude: _Exclude = None) -> None:
    """Show which hosts and slots a job would use."""
    from ds_core.launcher.hostfile import read_hostfile
    from ds_core.launcher.selection import select_hosts

    for host in select_hosts(read_hostfile(Path(hostfile)), include=include, exclude=exclude):
        typer.echo(f"{host.name}: slots {','.join(map(str, host.slots))}")


def hosts_run(
    command: Annotated[
        list[str],
        typer.Argument(
            help="Program and its arguments; or one word in quotes, for the hosts' shell: "
            "'df -h /tmp | tail -1'.",
        ),
    ],
    hostfile: _Hostfile,
    include: _Include = None,
    exclude: _Exclude = None,
    user: Annotated[str, typer.Option(help="User name on the hosts.")] = "",
    port: Annotated[str, typer.Option(help="Port of sshd on the hosts.")] = "",
    ssh_args: Annotated[str, typer.Option(help="Further words for ssh, such as '-i key'.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, and run nothing.")
    ] = False,
) -> None:
    """Run a command on every host at once, over ssh.

        ds hosts run --hostfile hosts -- nvidia-smi -L

    Each line of output has its host before it. Exits with the largest exit code of all.
    """
    from ds_core.launcher.fan_out import host_commands, run_everywhere
    from ds_core.launcher.hostfile import read_hostfile
    from ds_core.launcher.selection import select_hosts

    chosen = select_hosts(read_hostfile(Path(hostfile)), include=include, exclude=exclude)
    commands = host_commands(
        [host.name for host in chosen],
        command,
        options={"user": user, "port": port},
        arguments=split_words(ssh_args, "--ssh-args"),
    )
    if dry_run:
        typer.echo("\n".join(each.describe() for each in commands))
        return
    run_everywhere(commands)
