"""What a failed job says: which rank failed first, how, and with which traceback."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ds_core.launcher.memory_evidence import (
    MemoryCounters,
    explain_kill,
    largest_child_bytes,
    read_counters,
)
from ds_core.launcher.tracebacks import last_traceback

if TYPE_CHECKING:
    from ds_core.launcher.rank_logs import RankLogs

#: What usually lies behind the death of a process by a signal.
SIGNAL_CAUSES: Mapping[int, str] = {
    signal.SIGSEGV: "a crash in native code",
    signal.SIGBUS: "a failed access to mapped memory: often /dev/shm is full, or a file that is "
    "mapped has been truncated",
    signal.SIGABRT: "native code gave up: a failed check, the watchdog of a collective, or gloo "
    "sent more than was asked for (DS_COMM_CHECK=1 finds the call)",
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
class NodeFailure:
    """The process of one node that failed first, and all that a report needs to say of it.

    Attributes:
        exit_code: negative for a signal.
        cause: the way it ended, in words.
        spoke_ns: when it had its last words, by this node's clock.
        others: ranks of this node that ended with it.
        log_dir: folder with the output of every rank of this node.
        last_words: its traceback, or the end of its stderr; empty if the terminal has it.
    """

    rank: int
    local_rank: int
    pid: int
    exit_code: int
    cause: str
    spoke_ns: int
    others: tuple[int, ...]
    log_dir: str
    last_words: str

    @property
    def shell_exit_code(self) -> int:
        """What a shell would report for the process: its code, or 128 + signal."""
        return self.exit_code if self.exit_code > 0 else 128 - self.exit_code

    def report(self, where: str = "") -> str:
        """The text for the user, the traceback last. `where` follows "failed first"."""
        lines = [f"rank {self.rank} failed first{where}: {self.cause}, pid {self.pid}"]
        if self.others:
            listed = ", ".join(map(str, self.others))
            lines.append(f"ended with it: rank{'s' if len(self.others) > 1 else ''} {listed}")
        lines.append(f"output of every rank{where and ' there'}: {self.log_dir}")
        return "\n".join([*lines, self.last_words]).rstrip()


def node_failure(
    failures: Mapping[int, Failure], logs: RankLogs, memory: MemoryCounters
) -> NodeFailure:
    """The failure that caused the others, out of all of this node by rank.

    Processes that the agent ended itself, by SIGTERM after the first failure, do not count.
    Among the rest the one whose last words are oldest was first: a process that fails because
    of another prints its own traceback later. The agent's timestamps are whole seconds.

    Args:
        failures: all failures by rank.
        logs: where the output of each rank is.
        memory: the kernel's counters from before the job.
    """
    own = {rank: f for rank, f in failures.items() if f.exitcode != -signal.SIGTERM}
    rank, failure = min(
        (own or failures).items(), key=lambda item: (_last_words_ns(item[1].local_rank, logs), item)
    )
    return NodeFailure(
        rank=rank,
        local_rank=failure.local_rank,
        pid=failure.pid,
        exit_code=failure.exitcode,
        cause=cause_in_words(failure.exitcode, memory),
        spoke_ns=_last_words_ns(failure.local_rank, logs),
        others=tuple(sorted(other for other in failures if other != rank)),
        log_dir=logs.root_log_dir,
        last_words=_last_words(failure.local_rank, logs),
    )


def cause_in_words(exit_code: int, memory: MemoryCounters) -> str:
    """How a process ended. `exit_code` is negative for a signal, `memory` from before the job."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    number = -exit_code
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        cause = explain_kill(memory, read_counters(), largest_child_bytes())
    else:
        cause = SIGNAL_CAUSES.get(number, "")
    return f"killed by {name}" + (f" ({cause})" if cause else "")


def _last_words_ns(local_rank: int, logs: RankLogs) -> int:
    files = (logs.stderr[local_rank], logs.error_file[local_rank])
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _last_words(local_rank: int, logs: RankLogs) -> str:
    """The traceback of a failed rank, or the end of what it wrote to stderr."""
    recorded = _recorded_traceback(logs.error_file[local_rank])
    if recorded:
        return recorded
    text = logs.stderr[local_rank].read_bytes()
    words = last_traceback(text) or b"\n".join(text.splitlines()[-NUM_TAIL_LINES:])
    return words.decode(errors="replace")


def _recorded_traceback(error_file: Path) -> str:
    """What torch's `@record` wrote, for scripts whose main function is decorated with it."""
    try:
        message = json.loads(error_file.read_text())["message"]
        return str(message["extraInfo"]["py_callstack"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
