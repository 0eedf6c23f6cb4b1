"""ssh: one connection per host, held by this machine while the job runs."""

from __future__ import annotations

from collections.abc import Mapping

from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob, HostCommand
from ds_core.launcher.launchers.shell import shell_line

#: No questions asked, and a dead connection noticed within 45 s.
SSH_OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=15",
    "-o",
    "ServerAliveInterval=15",
    "-o",
    "ServerAliveCountMax=3",
)


class SshLauncher:
    summary = "ssh to every host of --hostfile; keys and user names as in ~/.ssh/config."
    shares_paths = True
    options: Mapping[str, str] = {
        "port": "port of sshd on the hosts",
        "user": "user name on the hosts",
        "setup": "shell command to run before, such as `. /opt/venv/bin/activate`",
    }

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        if not job.nodes:
            raise LaunchError(
                "--launcher ssh: needs --hostfile, with a line `HOST slots=N` per host"
            )
        return tuple(
            HostCommand(
                hosts=(node.host,),
                argv=(
                    *ssh_words(job.options, job.arguments),
                    node.host,
                    shell_line(job, job.agent_words(rank, node, is_tied_to_stdin=True)),
                ),
                environment={},
                is_tied=True,
            )
            for rank, node in enumerate(job.nodes)
        )


def ssh_words(options: Mapping[str, str], arguments: tuple[str, ...]) -> tuple[str, ...]:
    """ssh and its options, up to the host's name."""
    words = ["ssh", *SSH_OPTIONS]
    if options.get("port"):
        words += ["-p", options["port"]]
    if options.get("user"):
        words += ["-l", options["user"]]
    return (*words, *arguments)
