"""One command on every host at once, over ssh."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from ds_core.launcher.cluster import HostCommand
from ds_core.launcher.errors import JobFailure
from ds_core.launcher.host_process import HostProcess, end_all, wait_for_all
from ds_core.launcher.launchers.ssh import ssh_words

#: Longer than any command: until it ends by itself, or by Ctrl-C.
_FOREVER_S = float("inf")


def host_commands(
    hosts: Sequence[str],
    command: Sequence[str],
    *,
    options: Mapping[str, str],
    arguments: tuple[str, ...] = (),
) -> tuple[HostCommand, ...]:
    """The ssh command for each host.

    Args:
        hosts: their names.
        command: a program and its arguments; a single word is a line for the hosts' shell.
        options: of the ssh launcher.
        arguments: further words for ssh.
    """
    line = command[0] if len(command) == 1 else shlex.join(command)
    start = ssh_words(options, arguments)
    return tuple(
        HostCommand(hosts=(host,), argv=(*start, host, line), environment={}, is_tied=False)
        for host in hosts
    )


def run_everywhere(commands: Sequence[HostCommand]) -> None:
    """Run all commands at once, each line of output behind its host's name.

    Raises JobFailure, which names the hosts on which it failed, or says that it was interrupted.
    """
    processes: list[HostProcess] = []
    with ExitStack() as stack:
        try:
            for command in commands:
                process = HostProcess(
                    command,
                    sys.stdout.buffer,
                    sys.stderr.buffer,
                    prefix=f"[{', '.join(command.hosts)}] ",
                )
                processes.append(process)
                stack.callback(process.close)
            wait_for_all(processes, _FOREVER_S)
        except KeyboardInterrupt:
            end_all(processes, patience_s=0.0)
            raise JobFailure("ended by SIGINT", 128 + signal.SIGINT) from None
        codes = {", ".join(p.command.hosts): p.poll() or 0 for p in processes}
    failed = {host: code for host, code in codes.items() if code}
    if failed:
        listed = ", ".join(f"{host} (exit code {code})" for host, code in failed.items())
        text = f"the command failed on {len(failed)} of {len(codes)} hosts: {listed}"
        raise JobFailure(text, max(abs(code) for code in failed.values()))
