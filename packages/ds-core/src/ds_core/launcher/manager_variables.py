"""What a cluster manager tells a process about its place in a job.

Slurm, the MPI implementations, Kubernetes' training operator and indexed jobs each number their
nodes in a variable of their own. `--node-rank auto` and `--rdzv-endpoint auto` read them here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ds_core.errors import LaunchError

#: Variable that numbers the nodes -> (who sets it, variable with the number of nodes).
NODE_RANK_VARIABLES: Mapping[str, tuple[str, str]] = {
    "DS_NODE_RANK": ("a launcher of `ds run`", ""),
    "PET_NODE_RANK": ("Kubernetes' training operator", "PET_NNODES"),
    "OMPI_COMM_WORLD_RANK": ("Open MPI", "OMPI_COMM_WORLD_SIZE"),
    "PMIX_RANK": ("PMIx", "PMIX_SIZE"),
    "PMI_RANK": ("MPICH, Intel MPI or MVAPICH", "PMI_SIZE"),
    # After MPI's: mpirun within an allocation starts its daemons by srun, which numbers those.
    "SLURM_PROCID": ("Slurm", "SLURM_NTASKS"),
    "JOB_COMPLETION_INDEX": ("a Kubernetes indexed job", ""),
}
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class NodeRank:
    """This node's number, and the variable that says so."""

    number: int
    variable: str
    manager: str


def find_node_rank(environment: Mapping[str, str]) -> NodeRank | None:
    """The number that a cluster manager gave this node; None outside of one.

    One agent runs per node, so the number of a task is that of its node.

    Raises LaunchError for a value that is no number.
    """
    for variable, (manager, _) in NODE_RANK_VARIABLES.items():
        text = environment.get(variable)
        if text is None:
            continue
        if not text.isdecimal():
            raise LaunchError(f"{variable}={text!r}, set by {manager}, is not a number")
        return NodeRank(int(text), variable, manager)
    return None


def resolve_node_rank(environment: Mapping[str, str], num_nodes: int) -> int:
    """The number for `--node-rank auto`.

    Raises LaunchError without a cluster manager, or if it started another number of tasks.
    """
    found = find_node_rank(environment)
    if found is None:
        raise LaunchError(
            "--node-rank auto: no cluster manager numbers this node; expected one of "
            f"{', '.join(NODE_RANK_VARIABLES)} to be set. Give the number itself"
        )
    size_variable = NODE_RANK_VARIABLES[found.variable][1]
    size = environment.get(size_variable, "")
    if size.isdecimal() and int(size) != num_nodes:
        raise LaunchError(
            f"--node-rank auto: {found.manager} started {size} tasks ({size_variable}={size}), but "
            f"the job has {num_nodes} nodes; start one task per node, which starts the processes"
        )
    return found.number


def resolve_endpoint(text: str, environment: Mapping[str, str]) -> str:
    """`auto` or `auto:PORT` as host:port; any other text as it is.

    Raises LaunchError if nothing says which host is the first.
    """
    word, _, port = text.partition(":")
    if word != "auto":
        return text
    for host_name, port_name in (
        ("PET_MASTER_ADDR", "PET_MASTER_PORT"),
        ("MASTER_ADDR", "MASTER_PORT"),
    ):
        if host_name in environment:
            chosen = port or environment.get(port_name) or DEFAULT_PORT
            return f"{environment[host_name]}:{chosen}"
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if environment.get(name):
            return f"{expand_nodelist(environment[name])[0]}:{port or DEFAULT_PORT}"
    raise LaunchError(
        "--rdzv-endpoint auto: expected PET_MASTER_ADDR, MASTER_ADDR, SLURM_STEP_NODELIST or "
        "SLURM_JOB_NODELIST to be set, none is; give HOST:PORT, the same on all nodes"
    )


def expand_nodelist(text: str) -> list[str]:
    """The host names of a Slurm node list such as `node[01-03,7],login`.

    Raises LaunchError if it is not one.
    """
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        hosts.extend(_expand(part, text))
    if not hosts:
        raise LaunchError(f"got node list {text!r}, expected names such as node[01-03,7]")
    return hosts


def _expand(part: str, whole: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", part)
    if match is None:
        return [part]
    before, after = part[: match.start()], part[match.end() :]
    names = []
    for word in match[1].split(","):
        first, _, last = word.partition("-")
        last = last or first
        if not first.isdecimal() or not last.isdecimal():
            raise LaunchError(f"got node list {whole!r}: {word!r} is not a number or range")
        for number in range(int(first), int(last) + 1):
            names += [f"{before}{number:0{len(first)}d}{rest}" for rest in _expand(after, whole)]
    return names
