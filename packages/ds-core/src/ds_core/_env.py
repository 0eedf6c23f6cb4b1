"""Every environment variable that ds-core reads; nothing else reads one.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT   torchrun's contract, for `comm.init`.
DS_ENV_FILE                                              the env file of `ds run`.

The launcher and the test kit hand the environment as a whole on to the processes they start; the
launcher also looks in it for what the user, Slurm, MPI or Kubernetes set, and `ds env` shows it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ds_core.errors import CommError


@dataclass(frozen=True)
class World:
    """What torchrun tells a worker about the job."""

    rank: int
    size: int
    local_rank: int
    master: str


def torchrun_world() -> World | None:
    """The world that torchrun's variables describe, or None if none of them is set.

    Raises CommError if they are incomplete or contradictory.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name) for name in names}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return None
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise CommError(
            f"the environment names only part of a world: {', '.join(missing)} not set; start the "
            f"script with `ds run` or torchrun, or unset RANK and WORLD_SIZE for a single process"
        )
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    local_rank = _integer("LOCAL_RANK", default=0)
    if not 0 <= rank < size:
        raise CommError(f"RANK={rank} is outside 0..WORLD_SIZE-1 with WORLD_SIZE={size}")
    return World(rank, size, local_rank, f"{found['MASTER_ADDR']}:{found['MASTER_PORT']}")


def whole() -> dict[str, str]:
    """A copy of the whole environment, for the launcher."""
    return dict(os.environ)


def env_file() -> str | None:
    """The env file that DS_ENV_FILE names for `ds run`."""
    return os.environ.get("DS_ENV_FILE") or None


def _integer(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise CommError(f"{name}={text!r} in the environment is not an integer") from None
