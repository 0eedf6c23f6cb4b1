"""pdsh: one command that reaches all hosts over ssh."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from ds_core import _env
from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob, HostCommand
from ds_core.launcher.launchers.shell import shell_line
from ds_core.launcher.launchers.ssh import ssh_words

#: pdsh replaces this by the number of the host in its list.
_HOST_NUMBER = "%n"
#: The variable by which pdsh hands words on to ssh; the user's own are kept.
_SSH_ARGUMENTS = "PDSH_SSH_ARGS_APPEND"
#: What pdsh says when a connection ends badly; it goes on with the others.
_LOST_HOST = r"^pdsh@\S+: (?P<host>\S+): ssh exited with exit code \d+"
_STAND_IN = "DS-RUN-HOST-NUMBER"


class PdshLauncher:
    summary = "pdsh over ssh to every host of --hostfile; the same slots on each."
    shares_paths = True
    options: Mapping[str, str] = {
        "port": "port of sshd on the hosts",
        "user": "user name on the hosts",
        "setup": "shell command to run before, such as `. /opt/venv/bin/activate`",
    }

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        if not job.nodes:
            raise LaunchError("--launcher pdsh: needs --hostfile, with `HOST slots=N` per host")
        if job.min_nodes != job.num_nodes:
            raise LaunchError(
                f"--nnodes: got {job.spec.nnodes}, but pdsh starts the same command on every host "
                "and ends when one fails; use --launcher ssh for an elastic job"
            )
        words = job.agent_words(_STAND_IN, job.common_node("pdsh"), is_tied_to_stdin=True)
        # A percent sign is pdsh's own: doubled, it is one.
        line = shell_line(job, words).replace("%", "%%").replace(_STAND_IN, _HOST_NUMBER)
        _, *ssh_options = ssh_words(job.options, ())
        own = _env.whole().get(_SSH_ARGUMENTS, "")
        hosts = tuple(node.host for node in job.nodes)
        # -S: the agents' exit code; -b: no questions after Ctrl-C; -N: lines as they are.
        start = ("pdsh", "-S", "-b", "-N", "-R", "ssh", "-f", str(len(hosts)))
        return (
            HostCommand(
                hosts=hosts,
                argv=(*start, *job.arguments, "-w", ",".join(hosts), line),
                environment={_SSH_ARGUMENTS: f"{shlex.join(ssh_options)} {own}".strip()},
                is_tied=False,  # its own stdin goes nowhere; the agents' ends with it
                lost_host=_LOST_HOST,
            ),
        )
