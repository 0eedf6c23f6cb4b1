"""A job on several hosts: which hosts, and the command that starts the agent on each."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ds_core import _env, plugins
from ds_core.errors import LaunchError
from ds_core.launcher.devices import VISIBLE_VARIABLES
from ds_core.launcher.environment import Setting, forwarded, user_settings
from ds_core.launcher.hostfile import read_hostfile
from ds_core.launcher.manager_variables import DEFAULT_PORT
from ds_core.launcher.plan import LaunchSpec, check_limits, env_file_of, num_nodes
from ds_core.launcher.selection import SelectedHost, select_hosts


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """The hosts of a job as the user asks for them.

    Attributes:
        hostfile: path of a file of `HOST slots=N` lines. None: the launcher knows the hosts.
        include, exclude: filters of its hosts and slots (`ds_core.launcher.selection`).
        num_nodes: how many hosts; without a hostfile, how many to ask the cluster manager for.
        launcher: name of an entry point of group `ds_core.launchers`.
        options: what that launcher is told, by name.
        arguments: further words for the program that it calls, such as ssh or srun.
        python: path of Python on the hosts. None: the path of this one.
    """

    hostfile: str | None = None
    include: str | None = None
    exclude: str | None = None
    num_nodes: int | None = None
    launcher: str = "ssh"
    options: Mapping[str, str]
    arguments: tuple[str, ...] = ()
    python: str | None = None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host of a job. `devices`: numbers of those that it may use, None for all."""

    host: str
    nproc: int
    devices: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """A job on several hosts, checked; what a launcher turns into commands.

    Attributes:
        spec: what each agent runs, with the settings that are the same on all nodes.
        nodes: the hosts in the order of their node rank; empty if the cluster manager chooses.
        num_nodes: how many nodes there are, at most.
        environment: what is set on every host, with where it comes from.
        folder: the working directory on every host.
        python: path of Python on every host.
        options, arguments: for the launcher, see `ClusterSpec`.
    """

    spec: LaunchSpec
    nodes: tuple[Node, ...]
    num_nodes: int
    environment: Mapping[str, Setting]
    folder: str
    python: str
    options: Mapping[str, str]
    arguments: tuple[str, ...]

    @property
    def min_nodes(self) -> int:
        return num_nodes(self.spec.nnodes)[0]

    def agent_words(
        self,
        node_rank: int | str,
        node: Node | None,
        *,
        is_tied_to_stdin: bool,
        has_head: bool = True,
    ) -> tuple[str, ...]:
        """The command, with its environment, that runs one node's agent.

        Args:
            node_rank: the node's number, or "auto", or a placeholder of the launcher's program.
            node: its host; None if the cluster manager chooses.
            is_tied_to_stdin: whether the agent ends with its stdin, which the launcher holds.
            has_head: whether a `ds run` reads what the agent reports, and keeps the time.
        """
        spec = self.spec
        words = ["--nproc", str(node.nproc if node is not None else spec.nproc)]
        devices = node.devices if node is not None else spec.devices
        if devices is not None:
            words += ["--devices", ",".join(map(str, devices))]
        words += self._meeting_words(node_rank, node)
        if spec.bind_cores is not None:
            words += ["--bind-cores", spec.bind_cores]
        if spec.max_restarts:
            words += ["--max-restarts", str(spec.max_restarts)]
        if spec.log_dir is not None:
            words += ["--log-dir", spec.log_dir]
        if has_head:
            words += ["--show", "all" if spec.show == "all" else "job", "--as-node"]
        else:
            words += ["--show", spec.show]
            words += [] if spec.timeout_s is None else ["--timeout-s", f"{spec.timeout_s:g}"]
        words.append("--no-env-file")
        if is_tied_to_stdin:
            words.append("--tied-to-stdin")
        if spec.is_module:
            words.append("--module")
        if not spec.with_python:
            words.append("--no-python")
        start = (self.python, "-m", "ds_core.cli", "run")
        return (*self.environment_words(), *start, *words, spec.script, *spec.args)

    def environment_words(self) -> tuple[str, ...]:
        """`env NAME=VALUE ...`, or nothing without variables to set."""
        words = tuple(f"{name}={setting.value}" for name, setting in self.environment.items())
        return ("env", *words) if words else ()

    def common_node(self, launcher: str) -> Node | None:
        """What all nodes have in common, for a launcher that starts one command on all of them.

        Raises LaunchError if they differ.
        """
        kinds = {(node.nproc, node.devices) for node in self.nodes}
        if len(kinds) > 1:
            raise LaunchError(
                f"--launcher {launcher} starts the same command on every host, but the hosts of "
                "this job have different slots; select the same slots everywhere, or use "
                "--launcher ssh"
            )
        return self.nodes[0] if self.nodes else None

    def option(self, name: str, default: str = "") -> str:
        return self.options.get(name, default)

    def _meeting_words(self, node_rank: int | str, node: Node | None) -> list[str]:
        spec = self.spec
        if self.num_nodes == 1:
            return []
        words = ["--nnodes", str(spec.nnodes), "--rdzv-endpoint", str(spec.rdzv_endpoint)]
        conf = dict(spec.rdzv_conf)
        if self.min_nodes == self.num_nodes:
            words += ["--node-rank", str(node_rank)]
        elif node is not None:
            # Nodes may come and go: they number themselves, and the first one is the host.
            conf.setdefault("is_host", str(node_rank == 0).lower())
            words += ["--local-addr", node.host]
        for name, value in conf.items():
            words += ["--rdzv-conf", f"{name}={value}"]
        return words


@dataclass(frozen=True, kw_only=True)
class HostCommand:
    """One command of a launcher, as this machine executes it.

    Attributes:
        hosts: the hosts that it reaches, for people; empty if the cluster manager chooses.
        argv: the words of the command.
        environment: variables that are set for the command itself, here.
        is_tied: whether the agents it starts end with its stdin, which is then kept open.
        lost_host: pattern of the line on which it says that it lost a host, with a group `host`;
            for a command that goes on with the others then. Empty: it has none.
    """

    hosts: tuple[str, ...]
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    is_tied: bool
    lost_host: str = ""

    def describe(self) -> str:
        """The command as it can be pasted into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True)
class Manifest:
    """What the user hands to a cluster, instead of commands for this machine to run."""

    text: str


class Launcher(Protocol):
    """Starts one agent, `ds run --as-node`, on every host of a job.

    A class without arguments, registered in the entry-point group `ds_core.launchers`.
    Processes, rendezvous, restarts and logs are the agents' business (torchrun's, underneath);
    a launcher only reaches the hosts.
    """

    #: What it is, in one sentence.
    summary: str
    #: Whether the hosts have this machine's paths: Python, the folder, what PYTHONPATH names.
    shares_paths: bool
    #: Its options (`--launcher-option NAME=VALUE`), each with its meaning.
    options: Mapping[str, str]

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...] | Manifest:
        """The commands that start the job, or what the user hands to the cluster.

        Raises LaunchError if this launcher cannot start such a job.
        """
        ...


def load_launcher(name: str) -> Launcher:
    """The launcher that an installed package registered. Raises PluginError if none did."""
    launcher: Launcher = plugins.load("launchers", name)()
    return launcher


def make_cluster_job(spec: LaunchSpec, cluster: ClusterSpec, launcher: Launcher) -> ClusterJob:
    """The job of `spec` on the hosts of `cluster`.

    Raises LaunchError for what cannot be started.
    """
    check_limits(spec)
    _check_options(cluster, launcher)
    nodes = _nodes(spec, cluster)
    count = len(nodes) or cluster.num_nodes or num_nodes(spec.nnodes)[1]
    least, greatest = num_nodes(spec.nnodes)
    if least == greatest:
        least = count
    elif nodes and greatest > count:
        raise LaunchError(
            f"--nnodes: got {spec.nnodes}, but the job has {count} hosts; lower the maximum"
        )
    nnodes = str(count) if least == count else f"{least}:{count}"
    environment = _env.whole()
    passed_on = forwarded(environment) if launcher.shares_paths else {}
    settings = {name: Setting(value, "forwarded from here") for name, value in passed_on.items()}
    settings |= user_settings(spec.env, env_file_of(spec), environment)
    return ClusterJob(
        spec=_for_nodes(spec, nodes, nnodes),
        nodes=nodes,
        num_nodes=count,
        environment=settings,
        folder=str(Path.cwd()),
        python=cluster.python or (sys.executable if launcher.shares_paths else "python"),
        options=cluster.options,
        arguments=cluster.arguments,
    )


def describe(job: ClusterJob, commands: tuple[HostCommand, ...] | Manifest) -> str:
    """What would be run, command by command, for `--dry-run`."""
    if isinstance(commands, Manifest):
        return commands.text
    lines = []
    origins: dict[str, list[str]] = {}
    for name, setting in job.environment.items():
        origins.setdefault(setting.origin, []).append(name)
    for origin, names in origins.items():
        lines.append(f"# environment, {origin}: {', '.join(names)}")
    for command in commands:
        hosts = ", ".join(command.hosts) or f"{job.num_nodes} hosts of the cluster manager's choice"
        lines += [f"# {hosts}", command.describe()]
    return "\n".join(lines)


def ignored_devices(environment: Mapping[str, str], job: ClusterJob) -> str:
    """A remark if this machine's visible devices are set, which other hosts do not get."""
    for variable in VISIBLE_VARIABLES.values():
        value = environment.get(variable)
        if value is not None and variable not in job.environment:
            return (
                f"{variable}={value} of this machine is not sent to the hosts of the job; choose "
                f"their devices with --include HOST:0,1, --devices, or --env {variable}=..."
            )
    return ""


def _nodes(spec: LaunchSpec, cluster: ClusterSpec) -> tuple[Node, ...]:
    if spec.node_rank is not None:
        raise LaunchError("--node-rank: `ds run` numbers the hosts itself with --launcher")
    if cluster.hostfile is None:
        for name, value in (("--include", cluster.include), ("--exclude", cluster.exclude)):
            if value is not None:
                raise LaunchError(f"{name}: filters the hosts of a hostfile; give --hostfile")
        return ()
    chosen = select_hosts(
        read_hostfile(Path(cluster.hostfile)),
        include=cluster.include,
        exclude=cluster.exclude,
        num_nodes=cluster.num_nodes,
        nproc=None if spec.nproc == "auto" else spec.nproc,
    )
    if len(chosen) > 1:
        for host in chosen:
            if host.name == "localhost" or host.name.startswith("127."):
                raise LaunchError(
                    f"--hostfile: {host.name} means another machine on each host; give the name "
                    "or address by which the other hosts reach it"
                )
    return tuple(_node(host, spec) for host in chosen)


def _node(host: SelectedHost, spec: LaunchSpec) -> Node:
    if spec.devices is not None and host.has_named_slots:
        raise LaunchError(
            f"--devices: the slots of {host.name} are named by --include or --exclude already; "
            "give one of them"
        )
    if spec.devices is not None:
        count = len(spec.devices) if spec.nproc == "auto" else len(host.slots)
        return Node(host=host.name, nproc=count, devices=spec.devices)
    named = host.slots if host.has_named_slots else None
    return Node(host=host.name, nproc=len(host.slots), devices=named)


def _check_options(cluster: ClusterSpec, launcher: Launcher) -> None:
    for name in cluster.options:
        if name not in launcher.options:
            known = ", ".join(launcher.options) or "none"
            raise LaunchError(
                f"--launcher-option: {cluster.launcher} has no option {name!r}; it has {known}"
            )


def _for_nodes(spec: LaunchSpec, nodes: tuple[Node, ...], nnodes: str) -> LaunchSpec:
    endpoint = spec.rdzv_endpoint
    if endpoint is None:
        endpoint = f"{nodes[0].host}:{DEFAULT_PORT}" if nodes else "auto"
    return dataclasses.replace(spec, nnodes=nnodes, rdzv_endpoint=endpoint)
