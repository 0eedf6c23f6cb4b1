"""Binds this process to its local rank's cores, and becomes the rank's own program.

    python bound_rank.py CORES/THREADS/NODE ... -- PROGRAM ARGUMENT...

There is one CORES/THREADS/NODE per local rank: a list of logical processors, the value for
OMP_NUM_THREADS (empty: leave it), and the NUMA node whose memory numactl prefers (empty: leave
memory to the kernel). Imports nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import os
import sys


def main(words: list[str]) -> None:
    """Never returns: the process goes on as the program."""
    end = words.index("--")
    shares, command = words[:end], words[end + 1 :]
    cores, threads, node = shares[int(os.environ["LOCAL_RANK"])].split("/")
    if threads:
        os.environ["OMP_NUM_THREADS"] = threads
    if node:
        # Preferred, not only: a rank that outgrows its node slows down rather than dies.
        command = ["numactl", f"--physcpubind={cores}", f"--preferred={node}", *command]
    else:
        os.sched_setaffinity(0, _numbers(cores))
    os.execvp(command[0], command)


def _numbers(text: str) -> set[int]:
    numbers: set[int] = set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


if __name__ == "__main__":
    main(sys.argv[1:])
