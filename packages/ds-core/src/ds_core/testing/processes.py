"""The processes of a pool, seen from the test session that owns them."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from ds_core.errors import DsError
from ds_core.testing.task import Task
from ds_core.testing.worker import EXIT_NOTICE
from ds_core.testing.worker import __file__ as worker_file

#: How long a worker may take to start, or to become ready again after a test.
READY_S = 30.0


class Server:
    """The fork server process, seen from the pool."""

    def __init__(self) -> None:
        self._log_dir = tempfile.mkdtemp(prefix="ds-ranks-")
        self._control, far_end = socket.socketpair()
        self._exits: dict[int, int] = {}
        self._num_runs = 0
        preload = ["pytest"] if "pytest" in sys.modules else []
        with far_end, open(f"{self._log_dir}/server.log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    "import sys; from ds_core.testing.worker import main; main(sys.argv[1:])",
                    str(far_end.fileno()),
                    self._log_dir,
                    *preload,
                ],
                pass_fds=[far_end.fileno()],
                env=_server_environ(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in a terminal is for the test session alone, which then closes the pool.
                start_new_session=True,
            )

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def spawn(self) -> Worker:
        """A new worker; it reports by itself when it is ready."""
        near_end, far_end = socket.socketpair()
        with far_end, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [b"+"], [far_end.fileno()])
        return Worker(Connection(near_end.detach()), self._log_dir)

    def new_store_file(self) -> str:
        """Where the ranks of one run meet."""
        self._num_runs += 1
        return f"{self._log_dir}/{self._num_runs}.store"

    def exit_status(self, pid: int) -> int:
        """The wait status of a worker whose connection has closed."""
        while pid not in self._exits:
            if not self._read_notice(READY_S):
                raise DsError(f"run_ranks: the pool's server process is gone:\n{self.log()}")
        return self._exits.pop(pid)

    def forget_exits(self) -> None:
        """Read the notices that nobody asked for: the server blocks once they fill the socket."""
        while self._read_notice(0.0):
            pass
        self._exits.clear()

    def _read_notice(self, timeout_s: float) -> bool:
        """Take in one notice; False if none comes within the time."""
        readable, _, _ = select.select([self._control], [], [], timeout_s)
        notice = self._control.recv(EXIT_NOTICE.size, socket.MSG_WAITALL) if readable else b""
        if len(notice) < EXIT_NOTICE.size:
            return False
        pid, status = EXIT_NOTICE.unpack(notice)
        self._exits[pid] = status
        return True

    def log(self) -> str:
        return Path(self._log_dir, "server.log").read_text(errors="replace")

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._log_dir, ignore_errors=True)


class Worker:
    """One worker process, seen from the pool."""

    def __init__(self, connection: Connection, log_dir: str) -> None:
        self.connection = connection
        self.pid = 0
        self._log_dir = log_dir
        self._log_offset = 0
        self._is_ready = False

    def start(self, task: Task) -> None:
        self._is_ready = False
        self.connection.send_bytes(pickle.dumps(task))

    def tell(self, word: str) -> None:
        with contextlib.suppress(OSError):  # a worker that has died shows when it is awaited
            self.connection.send(word)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether the worker is idle, waiting for it up to `timeout_s`."""
        if self._is_ready:
            # An idle worker says nothing: something to read means that its end has closed.
            return not self.connection.poll()
        try:
            if not self.connection.poll(timeout_s):
                return False
            _, self.pid = self.connection.recv()
        except (EOFError, OSError):
            return False
        self._is_ready = True
        return True

    def kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.connection.close()

    def thread_dump(self) -> str:
        """The Python stacks of all threads of a worker that hangs."""
        self.new_output()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        text = ""
        for _ in range(20):  # the dump appears at once unless the machine is overloaded
            time.sleep(0.05)
            fresh = self.new_output()
            if text and not fresh:
                break
            text += fresh
        return _without_own_frames(text)

    def new_output(self) -> str:
        """What the worker printed since the last call."""
        log = Path(self._log_dir, f"{self.pid}.log")
        if not log.exists():
            return ""
        with log.open("rb") as file:
            file.seek(self._log_offset)
            data = file.read()
        self._log_offset += len(data)
        lines = data.decode(errors="replace").splitlines(keepends=True)
        # gloo announces every connection on stdout.
        return "".join(line for line in lines if not line.startswith("[Gloo]"))

    def last_output(self, num_lines: int = 40) -> str:
        return "\n".join(self.new_output().splitlines()[-num_lines:])

    def echo_output(self, rank: int) -> None:
        for line in self.new_output().splitlines():
            sys.stdout.write(f"[rank {rank}] {line}\n")


def _server_environ() -> dict[str, str]:
    """The server's environment: finds the same modules, one thread per library."""
    folders = [folder or os.getcwd() for folder in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}


def _without_own_frames(dump: str) -> str:
    """A thread dump without the frames below the function under test, which say nothing."""
    kept: list[str] = []
    is_own = False
    for line in dump.splitlines():
        is_own = (is_own and line.startswith("  File ")) or f'"{worker_file}"' in line
        if not is_own:
            kept.append(line)
    return "\n".join(kept).rstrip()
