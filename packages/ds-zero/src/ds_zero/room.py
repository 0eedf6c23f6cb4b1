"""`Room`: how much a rank may still allocate on its device, in host memory and on disk."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_core import accelerator

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
#: A limit of cgroup v1 beyond this means none.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Room:
    """Free bytes of each place; None where nothing bounds them, or where it cannot be known.

    Attributes:
        device: of its own accelerator.
        host: of host memory that all ranks of `host_name` share.
        process: of host memory that this process may still take (RLIMIT_DATA, RLIMIT_AS).
        disks: by folder, of the file system that it is on, which ranks may share.
        disk_ids: by folder, which file system that is.
        file: largest file that this process may write (RLIMIT_FSIZE).
        host_name: where this is.
    """

    device: int | None = None
    host: int | None = None
    process: int | None = None
    disks: tuple[tuple[str, int], ...] = ()
    disk_ids: tuple[tuple[str, str], ...] = ()
    file: int | None = None
    host_name: str = ""

    @property
    def memory(self) -> int | None:
        """Of host memory, for a process that is alone."""
        return least(self.host, self.process)

    @property
    def disk(self) -> int | None:
        """Of the fullest disk."""
        return min((size for _, size in self.disks), default=None)


def least(*sizes: int | None) -> int | None:
    """The smallest of the bounds that there are."""
    return min((size for size in sizes if size is not None), default=None)


def measure(device: torch.device, folders: Sequence[str] = ()) -> Room:
    """What is free now.

    Host memory is the least of what the kernel calls available and what is left of every cgroup
    above this process; page cache that can be dropped counts as free.

    Args:
        device: on which the model computes.
        folders: on the disks that matter; need not exist yet.
    """
    present = [(folder, _existing(Path(folder))) for folder in dict.fromkeys(folders)]
    disks, ids = [], []
    for folder, path in present:
        found = os.statvfs(path)
        disks.append((folder, found.f_bavail * found.f_frsize))
        ids.append((folder, str(os.stat(path).st_dev)))
    return Room(
        device=None if device.type == "cpu" else _device_free(),
        host=least(_available(), *_cgroup_rooms()),
        process=_process_room(),
        disks=tuple(disks),
        disk_ids=tuple(ids),
        file=_limit(resource.RLIMIT_FSIZE),
        host_name=socket.gethostname(),
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _device_free() -> int | None:
    """Free memory of the accelerator, with what torch's allocator keeps but nobody uses."""
    found = accelerator.current()
    memory = found.free_memory()
    if memory is None:
        return None
    kept = int(torch.accelerator.memory_reserved()) - int(torch.accelerator.memory_allocated())
    return memory[0] + max(0, kept)


def _available() -> int | None:
    return _kilobytes(_text(_PROC / "meminfo"), "MemAvailable")


def _process_room() -> int | None:
    """What the limits on this process leave: on its data, and on its addresses."""
    status = _text(_PROC / "self/status")
    rooms: list[int | None] = []
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        allowed, present = _limit(limit), _kilobytes(status, used)
        if allowed is not None and present is not None:
            rooms.append(max(0, allowed - present))
    return least(*rooms)


def _limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_rooms() -> Iterator[int]:
    """What each cgroup around this process leaves, of version 1 and of version 2."""
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", ("inactive_file", "active_file"))
            yield from _rooms_up(_CGROUPS, path, *names)
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cache = ("total_inactive_file", "total_active_file")
            yield from _rooms_up(_CGROUPS / "memory", path, *files, cache)


def _rooms_up(
    root: Path, path: str, limit: str, usage: str, cache: tuple[str, ...]
) -> Iterator[int]:
    """What is left of a cgroup and of each one above it.

    In a container the path is of the machine's tree, and its own cgroup is mounted as the root.
    """
    folder = root / path.lstrip("/")
    while True:
        allowed, used = _number(folder / limit), _number(folder / usage)
        if allowed is not None and used is not None and allowed < _NO_LIMIT:
            statistics = dict(
                line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines()
            )
            droppable = sum(int(statistics.get(name, 0)) for name in cache)
            yield max(0, allowed - used + droppable)
        if folder == root:
            return
        folder = folder.parent


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _kilobytes(text: str, name: str) -> int | None:
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
