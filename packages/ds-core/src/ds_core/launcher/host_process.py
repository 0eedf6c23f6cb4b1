"""One command of a launcher while it runs here: its output, its stdin, its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

from ds_core import _env
from ds_core.errors import LaunchError
from ds_core.launcher.cluster import HostCommand
from ds_core.launcher.leash import BEAT
from ds_core.launcher.node_report import MARKER
from ds_core.launcher.writers import LineWriter, Writer

CHUNK_BYTES = 65536
#: Takes each line of output, among them the agents' reports.
LineTaker = Callable[[bytes], None]


class HostProcess:
    """A running command, whose output is copied to the terminal as it comes.

    It is the leader of a session of its own: a Ctrl-C at the terminal reaches this process only,
    which ends it in order.

    Args:
        command: what to run.
        stdout, stderr: where its output goes.
        prefix: put before each line; with an empty one, output is copied as it comes.
        take_line: called with each line. An agent's report is not shown.
    """

    def __init__(
        self,
        command: HostCommand,
        stdout: BinaryIO,
        stderr: BinaryIO,
        *,
        prefix: str = "",
        take_line: LineTaker | None = None,
    ) -> None:
        self.command = command
        self.ended_at: float | None = None
        try:
            self._process = subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE if command.is_tied else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_env.whole() | dict(command.environment),
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"{command.argv[0]}: cannot be run: {error.strerror}; install it, or choose "
                "another --launcher (`ds run --list-launchers`)"
            ) from error
        out, err = self._process.stdout, self._process.stderr
        assert out is not None  # pipes were asked for
        assert err is not None
        mark = prefix.encode()
        self._threads = [
            threading.Thread(target=_copy, args=(*streams, mark, take_line), daemon=True)
            for streams in ((out, stdout), (err, stderr))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code once the command has ended and all its output is copied."""
        code = self._process.poll()
        if code is not None and self.ended_at is None:
            for thread in self._threads:
                # A process that it left behind may hold its output open.
                thread.join(timeout=2.0)
            self.ended_at = time.monotonic()
        return code

    def beat(self) -> None:
        """Tell the agents that this process is alive."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(OSError, ValueError):
                stdin.write(BEAT)
                stdin.flush()

    def release(self) -> None:
        """Ask the command to end: by the end of its stdin if its agents watch it, or SIGTERM."""
        if self._process.stdin is None:
            self.signal(signal.SIGTERM)
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def signal(self, signum: int) -> None:
        """Send a signal to the command and what it started here."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)

    def close(self) -> None:
        """Give back what an ended command held."""
        self._process.wait()
        for thread in self._threads:
            thread.join(timeout=2.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def end_all(processes: list[HostProcess], *, patience_s: float) -> None:
    """Have all commands end: asked first, then SIGTERM, then SIGKILL.

    Args:
        processes: what runs.
        patience_s: how long they may take after they were asked.
    """
    for process in processes:
        process.release()
    if wait_for_all(processes, patience_s):
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            process.signal(signum)
        if wait_for_all(processes, 3.0):
            return


def wait_for_all(processes: list[HostProcess], timeout_s: float) -> bool:
    """Wait until all have ended. Returns whether they have."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _copy(source: BinaryIO, target: BinaryIO, prefix: bytes, take: LineTaker | None) -> None:
    writer = LineWriter(target, prefix) if prefix else Writer(target)
    pending = b""
    while chunk := os.read(source.fileno(), CHUNK_BYTES):
        *lines, pending = (pending + chunk).split(b"\n")
        shown = b"".join(_without_report(line, take) for line in lines)
        # A progress bar has no end of line: only what may become a report has to wait.
        begin = _report_begin(pending)
        writer.write(shown + pending[:begin])
        pending = pending[begin:]
    writer.write(pending)
    writer.close()


def _without_report(line: bytes, take: LineTaker | None) -> bytes:
    if take is None:
        return line + b"\n"
    take(line)
    before, marker, _ = line.partition(MARKER)
    if not marker:
        return line + b"\n"
    return before + b"\n" if before else b""


def _report_begin(text: bytes) -> int:
    """Where in an unfinished line a report begins, or may begin; its length if nowhere."""
    found = text.find(MARKER)
    if found >= 0:
        return found
    for length in range(min(len(MARKER) - 1, len(text)), 0, -1):
        if text.endswith(MARKER[:length]):
            return len(text) - length
    return len(text)
