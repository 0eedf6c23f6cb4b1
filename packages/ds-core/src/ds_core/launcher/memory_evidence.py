"""Whether the kernel's out-of-memory killer ended a process: what its counters say.

No log of the kernel is needed: the control group of this process counts its kills, and so does
the machine as a whole. Each is read before the job and after a failure.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

_GIB = 2**30


@dataclass(frozen=True)
class MemoryCounters:
    """Kills by the kernel since it started, None where it does not say; memory in bytes."""

    group_kills: int | None
    machine_kills: int | None
    group_limit_bytes: int | None
    machine_bytes: int | None
    available_bytes: int | None


def read_counters(root: Path = Path("/")) -> MemoryCounters:
    """The counters now. `root` is where /proc and /sys are mounted."""
    group = _group_folder(root)
    memory = _table(root / "proc/meminfo")
    limit = None
    kills = None
    if group is not None:
        events = _table(group / "memory.events") or _table(group / "memory.oom_control")
        kills = events.get("oom_kill")
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
    total = memory.get("MemTotal")
    available = memory.get("MemAvailable")
    machine_bytes = None if total is None else total * 1024
    if limit is not None and machine_bytes is not None and limit >= machine_bytes:
        limit = None  # a limit beyond the machine's memory limits nothing
    return MemoryCounters(
        group_kills=kills,
        machine_kills=_table(root / "proc/vmstat").get("oom_kill"),
        group_limit_bytes=limit,
        machine_bytes=machine_bytes,
        available_bytes=None if available is None else available * 1024,
    )


def explain_kill(before: MemoryCounters, after: MemoryCounters, largest_bytes: int) -> str:
    """Why a process of the job was ended by SIGKILL, in words, with the memory figures.

    Args:
        before, after: counters from before the job and from after the failure.
        largest_bytes: peak resident memory of the job's largest process.
    """
    group = _difference(before.group_kills, after.group_kills)
    machine = _difference(before.machine_kills, after.machine_kills)
    if group:
        cause = "the kernel's OOM killer ended it: memory was full"
    elif machine:
        cause = "most likely the kernel's OOM killer, which ended a process on this machine"
    elif group == 0 or machine == 0:
        cause = (
            "not by the kernel's OOM killer, whose counters stand still: by another process, such "
            "as `kill -9` or a cluster manager at its limit"
        )
    else:
        cause = "probably the kernel's OOM killer; its counters cannot be read here"
    return f"{cause}; {_figures(after, largest_bytes)}"


def largest_child_bytes() -> int:
    """Peak resident memory of the largest process that this one has started and waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit


def _figures(counters: MemoryCounters, largest_bytes: int) -> str:
    words = [f"largest process of the job {largest_bytes / _GIB:.1f} GiB"]
    if counters.machine_bytes is not None:
        words.append(f"machine {counters.machine_bytes / _GIB:.1f} GiB")
    if counters.available_bytes is not None:
        words.append(f"available now {counters.available_bytes / _GIB:.1f} GiB")
    if counters.group_limit_bytes is not None:
        words.append(f"limit of the control group {counters.group_limit_bytes / _GIB:.1f} GiB")
    return ", ".join(words)


def _group_folder(root: Path) -> Path | None:
    """The memory control group of this process, version 2 or 1.

    In a container the path may be that of the host, while only the group itself is mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for mount, is_own in (
        ("sys/fs/cgroup", lambda names: names == ""),
        ("sys/fs/cgroup/memory", lambda names: "memory" in names.split(",")),
    ):
        for line in lines:
            _, names, path = line.split(":", 2)
            if not is_own(names):
                continue
            for folder in (root / mount / path.lstrip("/"), root / mount):
                if any(
                    (folder / name).is_file() for name in ("memory.events", "memory.oom_control")
                ):
                    return folder
    return None


def _table(path: Path) -> dict[str, int]:
    """A file of lines `name number` or `name: number kB`; empty if there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    rows = [line.replace(":", " ").split() for line in lines]
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # "max": no limit


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before
