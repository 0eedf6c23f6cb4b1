"""Ends every process of a job, however far down the tree: none outlives a job that failed.

A job's processes carry a mark in their environment, which children inherit; so a grandchild is
found when its parent is dead, and when it has left its process group.

As a program, `python reaper.py MARK`, it is a job's guard: it waits until its stdin ends. A
launcher that is done says so first; one that was killed could not, and the guard ends the job's
processes in its place. Imports nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

#: Variable that marks the processes of a job.
MARK_VARIABLE = "DS_RUN_ID"
#: How long processes may take to end after SIGTERM before SIGKILL.
GRACE_S = 2.0
POLL_S = 0.02
_DONE = b"done"


def marked_processes(mark: str) -> list[int]:
    """Ids of the running processes that carry a job's mark, without this one.

    Empty where the system has no /proc.
    """
    name = f"{MARK_VARIABLE}=".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or another user's
            continue
        marks = [v.removeprefix(name) for v in environment.split(b"\0") if v.startswith(name)]
        pid = int(entry.name)
        if any(mark.encode() in value.split(b",") for value in marks) and pid != os.getpid():
            found.append(pid)
    return found


def end_marked(mark: str, *, grace_s: float = GRACE_S) -> int:
    """End all processes that carry a mark: SIGTERM, then SIGKILL. Returns how many there were."""
    first = marked_processes(mark)
    _signal_all(first, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    left = first
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = marked_processes(mark)
    # Killed again and again: one may have started another just before it died.
    deadline = time.monotonic() + GRACE_S
    while left and time.monotonic() < deadline:
        _signal_all(left, signal.SIGKILL)
        time.sleep(POLL_S)
        left = marked_processes(mark)
    return len(first)


def wake_stopped_children() -> list[int]:
    """Have this process's children that are stopped take the SIGTERM that they were sent.

    Returns them; none where the system has no /proc. It is the first thing that they do.
    """
    term = 1 << (signal.SIGTERM - 1)
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in path.read_text().split()]
    stopped = []
    for pid in found:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        pending = int(facts.get("SigPnd", "0"), 16) | int(facts.get("ShdPnd", "0"), 16)
        if facts.get("State", "").strip().startswith("T") and pending & term:
            stopped.append(pid)
    _signal_all(stopped, signal.SIGCONT)
    return stopped


@contextlib.contextmanager
def guarded(mark: str) -> Iterator[None]:
    """Have the marked processes ended if this process is killed within the block.

    The guard is a process in a session of its own, where no signal to this one's group arrives.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},  # without the mark of a job around this one
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody ended the guard
            guard.communicate(_DONE)


def _signal_all(pids: list[int], signum: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


def _guard(mark: str) -> None:
    if sys.stdin.buffer.read() != _DONE:
        end_marked(mark, grace_s=0.0)


if __name__ == "__main__":
    _guard(sys.argv[1])
