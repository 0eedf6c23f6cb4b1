"""Every environment variable that ds-core reads; nothing else reads one.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT   torchrun's contract, for `comm.init`; it
    also looks for what Open MPI (OMPI_COMM_WORLD_*), MPICH and Intel MPI (PMI_*, MPI_LOCALRANKID),
    MVAPICH (MV2_COMM_WORLD_*), Slurm (SLURM_*), AzureML (AZ_BATCH_MASTER_NODE) and SageMaker
    (SM_HOSTS) set: `ds_core.comm.discovery`.
DEEPSPEED_TIMEOUT                                        minutes until a collective gives up.
DS_COMM_CHECK                                            1: check the order of collectives.
DS_ACCELERATOR                                           cpu: compute on the CPU, whatever else
    there is; or a kind of device that has to be there, such as cuda.
DS_ENV_FILE                                              the env file of `ds run`.
DS_OPS_IMPL                                              who computes an op: "op=name,*=name".
DS_OPS_FALLBACK                                          error: nothing slower in place of what
    cannot run here; warn, the default, says so once.

The launcher and the test kit hand the environment as a whole on to the processes they start; the
launcher also looks in it for what the user, Slurm, MPI or Kubernetes set, and `ds env` shows it.
"""

from __future__ import annotations

import os

from ds_core.errors import OpError


def whole() -> dict[str, str]:
    """A copy of the whole environment, for the launcher."""
    return dict(os.environ)


def env_file() -> str | None:
    """The env file that DS_ENV_FILE names for `ds run`."""
    return os.environ.get("DS_ENV_FILE") or None


def accelerator() -> str | None:
    """The kind of device that DS_ACCELERATOR asks for."""
    return os.environ.get("DS_ACCELERATOR") or None


def ops_implementations() -> dict[str, str]:
    """The implementation of each op that DS_OPS_IMPL names; "*" stands for all others."""
    named: dict[str, str] = {}
    for item in os.environ.get("DS_OPS_IMPL", "").split(","):
        op, equals, implementation = (part.strip() for part in item.partition("="))
        if item.strip() and not (op and equals and implementation):
            raise OpError(
                f"DS_OPS_IMPL: {item.strip()!r}: expected OP=IMPLEMENTATION pairs with commas "
                f"between them, such as rms_norm=torch,*=reference"
            )
        if op:
            named[op] = implementation
    return named


def ops_fallback() -> str:
    """Either "warn" or "error": what to do where the best implementation of an op cannot run."""
    chosen = os.environ.get("DS_OPS_FALLBACK", "warn")
    if chosen not in ("warn", "error"):
        raise OpError(f"DS_OPS_FALLBACK={chosen!r} in the environment: expected warn or error")
    return chosen
