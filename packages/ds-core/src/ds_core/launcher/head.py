"""Running a job on several hosts from one: start the agents, and report the first failure."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, BinaryIO

from ds_core import _env
from ds_core.launcher.cluster import ClusterJob, HostCommand, ignored_devices
from ds_core.launcher.errors import JobFailure
from ds_core.launcher.host_process import HostProcess, end_all, wait_for_all
from ds_core.launcher.leash import BEAT_INTERVAL_S
from ds_core.launcher.node_report import NodeReport, parse_report

#: After a first failure, how long the other nodes may take to find out by themselves.
GRACE_S = 5.0
#: The same where a cluster manager ends the other nodes itself.
MANAGED_GRACE_S = 12.0
#: How long agents may take to end their processes after they were asked to.
PATIENCE_S = 20.0
POLL_S = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class HeadEndedError(Exception):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def launch_on_hosts(
    job: ClusterJob, commands: tuple[HostCommand, ...], *, timeout_s: float | None = None
) -> None:
    """Run a job's commands to their end. Must be called from the main thread.

    What rank 0 prints appears here; what other hosts print about the job has their name before it.

    Args:
        job: the job.
        commands: what its launcher made of it.
        timeout_s: seconds after which the job is ended. None: no limit.

    Raises:
        LaunchError: a command cannot be run here.
        JobFailure: a process failed, a host was lost, or the job was interrupted or ran into its
            time limit. All agents have been told to end their processes, and most have.
    """
    remark = ignored_devices(_env.whole(), job)
    if remark:
        _say(remark)
    with _signals_raise():
        _Head(job, commands).run(timeout_s)


class _Head:
    """The processes of one job, and what their agents have reported."""

    def __init__(self, job: ClusterJob, commands: tuple[HostCommand, ...]) -> None:
        self._job = job
        self._commands = commands
        self._processes: list[HostProcess] = []
        self._reports: list[tuple[float, str, int, NodeReport]] = []
        self._released_at: float | None = None
        self._given_up: set[int] = set()
        self._lost_hosts: list[str] = []

    def run(self, timeout_s: float | None) -> None:
        try:
            for number, command in enumerate(self._commands):
                self._processes.append(self._start(number, command))
            self._wait(None if timeout_s is None else time.monotonic() + timeout_s)
        except HeadEndedError as error:
            self._end()
            name = signal.Signals(error.signum).name
            text = f"the job was ended by {name}{self._log_folders()}"
            raise JobFailure(text, 128 + error.signum) from None
        except _TimeLimitReached:
            self._end()
            text = f"the job was ended: it ran longer than --timeout-s {timeout_s:g}"
            raise JobFailure(text + self._log_folders(), 124) from None
        finally:
            self._end()
            for process in self._processes:
                process.close()

    def _start(self, number: int, command: HostCommand) -> HostProcess:
        host = ", ".join(command.hosts)

        def take_line(line: bytes) -> None:
            report = parse_report(line)
            if report is None:
                self._note_lost_host(command, line)
            else:
                self._reports.append(
                    (time.monotonic(), self._host_of(report, host), number, report)
                )

        return HostProcess(
            command,
            _binary(sys.stdout),
            _binary(sys.stderr),
            prefix=f"[{host}] " if number > 0 else "",
            take_line=take_line,
        )

    def _wait(self, deadline: float | None) -> None:
        """Until the job has ended. Raises JobFailure when it has failed."""
        needed = self._job.min_nodes if len(self._processes) == self._job.num_nodes else 1
        next_beat = 0.0
        while True:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + BEAT_INTERVAL_S
                self._beat()
            codes = [process.poll() for process in self._processes]
            # One command may reach many hosts: it runs on when the agent of one has failed.
            gave_up = {number for _, _, number, report in self._reports if self._is_failure(report)}
            if self._first_lost_host():
                gave_up.add(0)
            failed = [number for number, code in enumerate(codes) if code or number in gave_up]
            if len(codes) - len(failed) < needed:
                self._fail(failed)
            self._note_lost(failed, needed)
            if all(code is not None for code in codes):
                return
            if deadline is not None and now > deadline:
                raise _TimeLimitReached
            time.sleep(POLL_S)

    def _beat(self) -> None:
        # In a thread of its own, because a connection that hangs makes its pipe full.
        for process in self._processes:
            threading.Thread(target=process.beat, daemon=True).start()

    def _note_lost(self, failed: list[int], needed: int) -> None:
        for number in failed:
            if number not in self._given_up:
                self._given_up.add(number)
                left = len(self._processes) - len(self._given_up)
                _say(
                    f"{self._name(number)} has left the job, which goes on with {left} of at least "
                    f"{needed} hosts"
                )

    def _fail(self, failed: list[int]) -> None:
        """Find the first failure, end the job, and raise JobFailure."""
        lost = self._without_report(failed)
        if not lost:
            # pdsh is no manager: it only tells which host it lost.
            is_managed = not any(each.is_tied or each.lost_host for each in self._commands)
            wait_for_all(self._processes, MANAGED_GRACE_S if is_managed else GRACE_S)
            # Who ends badly before being asked to does so by itself.
            failed = [number for number, p in enumerate(self._processes) if p.poll()]
            lost = self._without_report(failed)
        reports = [entry for entry in self._reports if self._is_failure(entry[3])]
        self._end()
        host = self._first_lost_host()
        if host:
            text = f"{host} was lost: its connection or its `ds run` ended; what was said is above"
            raise JobFailure(text + self._log_folders(), 255)
        if lost:
            raise self._lost_host(lost[0])
        if not reports:
            number = failed[0] if failed else 0
            code = self._processes[number].poll() or 1
            raise JobFailure(
                f"{self._name(number)} ended before the job did{self._log_folders()}",
                code if code > 0 else 128 - code,
            )
        _, host, _, report = min(reports, key=lambda entry: entry[0] - entry[3].age_s)
        if report.failure is None:
            same = sorted({name for _, name, _, other in reports if other.error == report.error})
            raise JobFailure(f"{', '.join(same)}: {report.error}", 2)
        where = f" on {host}" if self._job.num_nodes > 1 or host else ""
        raise JobFailure(report.failure.report(where), report.failure.shell_exit_code)

    def _note_lost_host(self, command: HostCommand, line: bytes) -> None:
        if command.lost_host and self._released_at is None:
            match = re.search(command.lost_host, line.decode(errors="replace"))
            if match is not None:
                self._lost_hosts.append(match["host"])

    def _first_lost_host(self) -> str:
        """The host that a command said it lost, if its agent did not say why; else empty."""
        explained = {host for _, host, _, _ in self._reports}
        return next((host for host in self._lost_hosts if host not in explained), "")

    def _without_report(self, numbers: list[int]) -> list[int]:
        """Those whose agent did not say why it ended, the first to end first.

        A host that is lost is never the consequence of a failure elsewhere.
        """
        with_report = {number for _, _, number, _ in self._reports}
        lost = [number for number in numbers if number not in with_report]
        return sorted(lost, key=lambda number: self._processes[number].ended_at or 0.0)

    def _lost_host(self, number: int) -> JobFailure:
        process = self._processes[number]
        code = process.poll() or 0
        program = process.command.argv[0]
        ended = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        text = f"{self._name(number)} was lost: {program} ended with {ended}"
        if program == "ssh" and code == 255:
            text += (
                ": it could not connect, the connection broke, or `ds run` there was killed; what "
                f"ssh said is above, if anything. Try `ssh -o BatchMode=yes "
                f"{process.command.hosts[0]} true`"
            )
        elif code in (126, 127):
            text += ": a program was not found there; what was said is above"
        else:
            text += "; what it said is above"
        return JobFailure(text + self._log_folders(), code if code > 0 else 128 - code)

    def _end(self) -> None:
        if self._released_at is not None:
            return
        self._released_at = time.monotonic()
        try:
            end_all(self._processes, patience_s=PATIENCE_S)
        except HeadEndedError:  # asked a second time: at once, then
            end_all(self._processes, patience_s=0.0)

    def _name(self, number: int) -> str:
        hosts = self._commands[number].hosts
        return ", ".join(hosts) or f"the job's {self._commands[number].argv[0]}"

    def _host_of(self, report: NodeReport, hosts: str) -> str:
        """The host's name as the user wrote it, where that is known."""
        rank = report.node_rank
        if rank is not None and rank < len(self._job.nodes):
            return self._job.nodes[rank].host
        return report.host if "," in hosts or not hosts else hosts

    def _is_failure(self, report: NodeReport) -> bool:
        return report.failure is not None or bool(report.error)

    def _log_folders(self) -> str:
        folders = {host: report.log_dir for _, host, _, report in self._reports if report.log_dir}
        listed = ", ".join(f"{host}:{folder}" for host, folder in sorted(folders.items()))
        return f"; output of every rank: {listed}" if listed else ""


class _TimeLimitReached(Exception):  # noqa: N818 - a signal between two functions
    """The job's time is up."""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Have the signals that end a program raise HeadEndedError in the block."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise HeadEndedError(signum)

    before = {signum: signal.signal(signum, stop) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _binary(stream: Any) -> BinaryIO:
    """The byte stream under a text stream, which is flushed first to keep the order."""
    stream.flush()
    buffer: BinaryIO = stream.buffer
    return buffer


def _say(text: str) -> None:
    sys.stderr.write(f"ds run: {text}\n")
    sys.stderr.flush()
