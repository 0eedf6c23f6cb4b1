"""MPI: mpirun starts one agent on each host. The script need not use MPI.

The agents may use all cores of their host: left alone, mpirun would tie each to a single one.
"""

from __future__ import annotations

from collections.abc import Mapping

from ds_core.errors import LaunchError
from ds_core.launcher.cluster import ClusterJob, HostCommand


class OpenMpiLauncher:
    summary = "mpirun of Open MPI, one agent on every host of --hostfile."
    shares_paths = True
    options: Mapping[str, str] = {"program": "path of mpirun; default: mpirun"}

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        hosts = _hosts(job, "openmpi")
        words = ["-n", str(len(hosts)), "--host", ",".join(f"{host}:1" for host in hosts)]
        words += ["--map-by", "ppr:1:node", "--bind-to", "none", "--wdir", job.folder]
        return _command(job, "openmpi", "mpirun", words)


class MpichLauncher:
    summary = "mpiexec of MPICH or MVAPICH (hydra), one agent on every host of --hostfile."
    shares_paths = True
    options: Mapping[str, str] = {"program": "path of mpiexec; default: mpiexec"}

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        hosts = _hosts(job, "mpich")
        words = ["-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts)]
        words += ["-bind-to", "none", "-wdir", job.folder]
        return _command(job, "mpich", "mpiexec", words)


class IntelMpiLauncher:
    summary = "mpirun of Intel MPI, one agent on every host of --hostfile."
    shares_paths = True
    options: Mapping[str, str] = {"program": "path of mpirun; default: mpirun"}

    def commands(self, job: ClusterJob) -> tuple[HostCommand, ...]:
        hosts = _hosts(job, "impi")
        words = ["-n", str(len(hosts)), "-ppn", "1", "-hosts", ",".join(hosts)]
        words += ["-genv", "I_MPI_PIN", "0", "-wdir", job.folder]
        return _command(job, "impi", "mpirun", words)


def _hosts(job: ClusterJob, launcher: str) -> tuple[str, ...]:
    if not job.nodes:
        raise LaunchError(
            f"--launcher {launcher}: needs --hostfile, with a line `HOST slots=N` per host"
        )
    if job.min_nodes != job.num_nodes:
        raise LaunchError(
            f"--nnodes: got {job.spec.nnodes}, but an MPI job ends when one node does; use "
            "--launcher ssh for an elastic job"
        )
    return tuple(node.host for node in job.nodes)


def _command(
    job: ClusterJob, launcher: str, program: str, words: list[str]
) -> tuple[HostCommand, ...]:
    agent = job.agent_words("auto", job.common_node(launcher), is_tied_to_stdin=False)
    return (
        HostCommand(
            hosts=tuple(node.host for node in job.nodes),
            argv=(job.option("program", program), *words, *job.arguments, *agent),
            environment={},
            is_tied=False,
        ),
    )
