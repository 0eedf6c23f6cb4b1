"""Which rank of which world this process is: from what its starter put into the environment.

Looked for in this order: torchrun's variables (which `ds run` and most platforms set as well), Open
MPI, MPICH and Intel MPI, MVAPICH, Slurm. With none of them this process is a world of one.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from ds_core.errors import CommError

#: Where rank 0 listens when nobody says it: torch's own default.
DEFAULT_PORT = 29500


@dataclass(frozen=True)
class World:
    """This process's place in a job.

    Attributes:
        rank: from 0.
        size: number of ranks.
        local_rank: rank among those of this host.
        host: where rank 0 listens; None if the environment does not say.
        port: on which port.
        source: who says all this.
    """

    rank: int
    size: int
    local_rank: int
    host: str | None
    port: int | str
    source: str

    @property
    def master(self) -> str:
        """Host and port of rank 0."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class _Starter:
    """The variables of one MPI."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]


_MPIS = (
    _Starter(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    _Starter(
        "MVAPICH",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
        ("MV2_JOBID", "PMI_JOBID"),
    ),
    _Starter(
        "MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
        ("PMI_JOBID", "HYDRA_JOBID"),
    ),
)


def find_world(environment: Mapping[str, str], *, port: int | None = None) -> World | None:
    """The world that the environment describes, or None if it describes none.

    port: where rank 0 of a job of MPI or Slurm listens, unless MASTER_PORT says it.

    Raises CommError if what it says is incomplete or contradictory: the message names the
    variables, what they hold, and what to do.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _checked(_torchrun(environment), ("RANK", "WORLD_SIZE"))
    if port is not None:
        environment = {"MASTER_PORT": str(port), **environment}
    # A batch script that runs without srun has SLURM_PROCID too, but is no task of a step.
    is_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    for starter in _MPIS:
        # srun may offer PMI to programs that are no MPI's; mpirun says the local rank as well.
        by_mpirun = not is_step or any(name in environment for name in starter.local_rank)
        if by_mpirun and (starter.rank in environment or starter.size in environment):
            return _checked(_mpi(environment, starter), (starter.rank, starter.size))
    if is_step:
        return _checked(_slurm(environment), ("SLURM_PROCID", "SLURM_NTASKS"))
    return None


def _torchrun(environment: Mapping[str, str]) -> World:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        found = ", ".join(f"{n}={environment[n]!r}" for n in names if n in environment)
        raise CommError(
            f"the environment names only part of a world: {', '.join(missing)} not set (found "
            f"{found}); start the script with `ds run` or torchrun, or unset RANK and WORLD_SIZE "
            f"for a single process"
        )
    return World(
        _integer(environment, "RANK"),
        _integer(environment, "WORLD_SIZE"),
        _integer(environment, "LOCAL_RANK", default=0),
        environment["MASTER_ADDR"],
        environment["MASTER_PORT"],
        "torchrun",
    )


def _mpi(environment: Mapping[str, str], starter: _Starter) -> World:
    for name, other in ((starter.rank, starter.size), (starter.size, starter.rank)):
        if name not in environment:
            raise CommError(
                f"the environment names only part of a world: {name} not set (found {other}="
                f"{environment[other]!r}, as {starter.name} sets it); start the script with mpirun "
                f"and hand both on (mpirun -x), or unset {other} for a single process"
            )
    rank, size = _integer(environment, starter.rank), _integer(environment, starter.size)
    local_rank = _first_integer(environment, starter.local_rank)
    if local_rank is None:
        raise CommError(
            f"{starter.name} started rank {rank}, but none of {', '.join(starter.local_rank)} says "
            f"which rank of its host it is; set LOCAL_RANK's equivalent, or use `ds run`"
        )
    local_size = _first_integer(environment, starter.local_size)
    host = _known_host(environment)
    if host is None and (size == 1 or local_size == size):
        host = "127.0.0.1"
    port = environment.get("MASTER_PORT") or _port_of_job(environment, starter.job)
    return World(rank, size, local_rank, host, port, starter.name)


def _slurm(environment: Mapping[str, str]) -> World:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if tasks not in environment:
        raise CommError(
            "the environment names only part of a world: SLURM_NTASKS not set (found SLURM_PROCID="
            f"{environment['SLURM_PROCID']!r}); start the script with `srun --ntasks N`, or unset "
            f"SLURM_PROCID for a single process"
        )
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    host = _known_host(environment) or (first_host(nodes) if nodes else None)
    size = _integer(environment, tasks)
    return World(
        _integer(environment, "SLURM_PROCID"),
        size,
        _integer(environment, "SLURM_LOCALID", default=0),
        "127.0.0.1" if host is None and size == 1 else host,
        environment.get("MASTER_PORT") or _port_of_job(environment, ("SLURM_JOB_ID",)),
        "Slurm",
    )


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: "gpu[003-010,12],login1" begins with "gpu003"."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]+)\]([^,]*))?", nodes.strip())
    if match is None or not match[0]:
        raise CommError(
            f"the node list {nodes!r} of Slurm names no host; set MASTER_ADDR to the host of rank 0"
        )
    number = re.split(r"[-,]", match[2])[0] if match[2] else ""
    return f"{match[1]}{number}{match[3] or ''}"


def _known_host(environment: Mapping[str, str]) -> str | None:
    """The host of rank 0, as the user or a cloud's platform says."""
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"]
    azure = environment.get("AZ_BATCH_MASTER_NODE") or environment.get("AZ_BATCHAI_MPI_MASTER_NODE")
    if azure:
        return azure.partition(":")[0]
    if environment.get("SM_HOSTS"):
        try:
            return str(json.loads(environment["SM_HOSTS"])[0])
        except (ValueError, LookupError, TypeError):
            raise CommError(
                f"SM_HOSTS={environment['SM_HOSTS']!r} of SageMaker is not a list of hosts; set "
                f"MASTER_ADDR to the host of rank 0"
            ) from None
    return None


def _port_of_job(environment: Mapping[str, str], names: tuple[str, ...]) -> int:
    """A port that the ranks of a job agree on, and that two jobs on a host seldom share."""
    for name in names:
        if environment.get(name):
            return 20000 + zlib.crc32(environment[name].encode()) % 20000
    return DEFAULT_PORT


def _checked(world: World, names: tuple[str, str]) -> World:
    if not 0 <= world.rank < world.size:
        raise CommError(
            f"{names[0]}={world.rank} is outside 0..{names[1]}-1 with {names[1]}={world.size}"
        )
    return world


def _first_integer(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if name in environment:
            return _integer(environment, name)
    return None


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise CommError(f"{name}={text!r} in the environment is not an integer") from None
