"""Commands that bind a process to cores and to memory near them."""

from __future__ import annotations

import os

from ds_core.launcher.binding import bind_cores, format_cores, parse_cores


def get_numactl_cmd(
    bind_core_list: str | None, num_local_procs: int, local_rank: int
) -> tuple[int, list[str]]:
    """Cores per rank, and the `numactl` words to put before the command of one local rank.

    Raises LaunchError if there are fewer cores than processes. `ds run --bind-cores` does the same
    without numactl, which containers may forbid.
    """
    share = bind_cores(bind_core_list or "auto", num_local_procs, os.sched_getaffinity(0))[
        local_rank
    ]
    memory = ["-m", str(share.nodes[0])] if len(share.nodes) == 1 else []
    return share.num_threads, ["numactl", *memory, "-C", format_cores(share.processors)]


def parse_range_list(range_str: str) -> list[int]:
    """The numbers of a list such as "0-3,8"."""
    return list(parse_cores(range_str))
