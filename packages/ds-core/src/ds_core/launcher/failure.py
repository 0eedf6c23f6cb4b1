"""What a failed job says: which rank failed first, how, and with which traceback."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ds_core.launcher.tracebacks import last_traceback

if TYPE_CHECKING:
    from ds_core.launcher.rank_logs import RankLogs

#: What usually lies behind the death of a process by a signal.
SIGNAL_CAUSES: Mapping[int, str] = {
    signal.SIGKILL: "most likely out of memory: the system ends processes so when RAM is full "
    "(see `dmesg`), and so does a cluster manager at its limit",
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "a failed access to mapped memory: often /dev/shm is full, or a file that is "
    "mapped has been truncated",
    signal.SIGABRT: "native code gave up: a failed check, or the watchdog of a collective",
    signal.SIGILL: "an instruction that this processor lacks: a binary built for another one",
    signal.SIGFPE: "an arithmetic error in native code, such as an integer division by zero",
    signal.SIGTERM: "another process asked it to end, such as a cluster manager",
    signal.SIGINT: "interrupted",
    signal.SIGHUP: "its terminal was closed",
    signal.SIGXCPU: "its limit of processor time was reached (`ulimit -t`)",
    signal.SIGXFSZ: "its limit of file size was reached (`ulimit -f`)",
}
NUM_TAIL_LINES = 20


class Failure(Protocol):
    """The part of torch's ProcessFailure that is used here."""

    local_rank: int
    pid: int
    exitcode: int


@dataclass(frozen=True)
class FirstFailure:
    """The process that failed first. `exit_code` is negative for a signal."""

    rank: int
    local_rank: int
    pid: int
    exit_code: int

    def in_words(self) -> str:
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        number = -self.exit_code
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        cause = SIGNAL_CAUSES.get(number)
        return f"killed by {name}" + (f" ({cause})" if cause else "")


def first_failure(failures: Mapping[int, Failure], logs: RankLogs) -> FirstFailure:
    """The failure that caused the others, out of all by rank.

    Processes that the agent ended itself, by SIGTERM after the first failure, do not count.
    Among the rest the one whose last words are oldest was first: a process that fails because
    of another prints its own traceback later. The agent's timestamps are whole seconds.
    """
    own = {rank: f for rank, f in failures.items() if f.exitcode != -signal.SIGTERM}
    rank, failure = min(
        (own or failures).items(), key=lambda item: (_last_words_ns(item[1].local_rank, logs), item)
    )
    return FirstFailure(rank, failure.local_rank, failure.pid, failure.exitcode)


def report(
    first: FirstFailure,
    failures: Mapping[int, Failure],
    logs: RankLogs,
    *,
    is_shown: bool,
    num_nodes: int,
) -> str:
    """The text for the user.

    Args:
        first: which process failed first.
        failures: all failures by rank.
        logs: where the output of each rank is.
        is_shown: whether the terminal shows the traceback of `first` already.
        num_nodes: nodes of the job; each reports on its own processes only.
    """
    where = " on this node" if num_nodes > 1 else ""
    lines = [f"rank {first.rank} failed first{where}: {first.in_words()}, pid {first.pid}"]
    others = sorted(rank for rank in failures if rank != first.rank)
    if others:
        listed = ", ".join(map(str, others))
        lines.append(f"ended with it: rank{'s' if len(others) > 1 else ''} {listed}")
    lines.append(f"output of every rank: {logs.root_log_dir}")
    text = "" if is_shown else _last_words(first, logs)
    return "\n".join([*lines, text]).rstrip()


def exit_code(first: FirstFailure) -> int:
    """What a shell would report for the process: its code, or 128 + signal."""
    return first.exit_code if first.exit_code > 0 else 128 - first.exit_code


def _last_words_ns(local_rank: int, logs: RankLogs) -> int:
    files = (logs.stderr[local_rank], logs.error_file[local_rank])
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _last_words(first: FirstFailure, logs: RankLogs) -> str:
    """The traceback of a failed rank, or the end of what it wrote to stderr."""
    recorded = _recorded_traceback(logs.error_file[first.local_rank])
    if recorded:
        return recorded
    text = logs.stderr[first.local_rank].read_bytes()
    words = last_traceback(text) or b"\n".join(text.splitlines()[-NUM_TAIL_LINES:])
    return words.decode(errors="replace")


def _recorded_traceback(error_file: Path) -> str:
    """What torch's `@record` wrote, for scripts whose main function is decorated with it."""
    try:
        message = json.loads(error_file.read_text())["message"]
        return str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
