"""The processes behind the pool: a fork server that has torch imported, and its workers.

Importing torch takes more than a second per process. The server pays it once; each worker is a
fork of it, so that starting four, or replacing one that a test has killed, takes milliseconds.
The server starts no thread and touches no device, which is what makes forking it safe.

Wire format. Pool to server: one byte per worker wanted, with the worker's socket attached.
Server to pool: `EXIT_NOTICE` records. Pool and worker: pickled objects over that socket.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import os
import pickle
import random
import selectors
import shutil
import signal
import socket
import struct
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from ds_core.testing.outcome import Raised, Returned
from ds_core.testing.task import Task, dumps, resolve

#: (pid, wait status) of a worker that has ended.
EXIT_NOTICE = struct.Struct("!qq")
#: Sent by a worker whose rank is set up, and by the pool once all are: no rank may fail or die
#: while a peer still connects to it, or what the peer sees would be a matter of luck.
STARTED = "started"
#: Sent by the pool once no rank needs its peers any more.
RELEASE = "release"
#: Sent by a worker that is ready for another task.
READY = "ready"

#: Imported once in the server, so that no worker imports them again.
PRELOADED = (
    "numpy",
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
)


def serve(control_fd: int, log_dir: str, *modules: str) -> None:
    """Fork a worker for every socket that arrives; end, with all workers, when the pool does."""
    for name in (*PRELOADED, *modules):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported never dies: a worker's collections skip it
    try:
        with socket.socket(fileno=control_fd) as control:
            _ForkServer(control, log_dir).run()
    finally:
        # Here, because the pool's own process may have been killed; a worker never gets here.
        shutil.rmtree(log_dir, ignore_errors=True)


class _ForkServer:
    def __init__(self, control: socket.socket, log_dir: str) -> None:
        self._control = control
        self._log_dir = log_dir
        self._workers: set[int] = set()

    def run(self) -> None:
        """Serve until the pool's end of the control socket closes."""
        wakeup_read, wakeup_write = socket.socketpair()
        for end in (wakeup_read, wakeup_write):
            end.setblocking(False)
        signal.set_wakeup_fd(wakeup_write.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(wakeup_read, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if wakeup_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        wakeup_read.recv(4096)
                    self._report_exits()
                if self._control in ready and not self._spawn():
                    break
        self._kill_all()

    def _spawn(self) -> bool:
        """Fork one worker; False if the pool is gone."""
        message, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        if not message:
            return False
        pid = os.fork()
        if pid == 0:
            self._control.close()
            _become_worker(fds[0], self._log_dir)
        # Closed here at once: a later worker must not hold its sibling's socket open.
        os.close(fds[0])
        self._workers.add(pid)
        return True

    def _report_exits(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._workers.discard(pid)
            with contextlib.suppress(BrokenPipeError):
                self._control.sendall(EXIT_NOTICE.pack(pid, status))

    def _kill_all(self) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _become_worker(fd: int, log_dir: str) -> None:
    """Run tasks from `fd` until it closes; never returns."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(f"{log_dir}/{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # The pool asks a rank that hangs for its stacks; the dump lands in the log.
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    exit_code = 1
    try:
        with Connection(fd) as connection, contextlib.suppress(EOFError, BrokenPipeError):
            connection.send((READY, os.getpid()))
            while _serve_task(connection):
                connection.send((READY, os.getpid()))
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(ValueError, OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)


def _serve_task(connection: Connection) -> bool:
    """Run one task; whether this process is fit for another."""
    task: Task = pickle.loads(connection.recv_bytes())
    reply = _outcome(task, connection)
    if isinstance(reply, Raised):
        # Ends here: closing its connections is what releases the peers, and a process group
        # that failed half-way cannot be told from a sound one.
        connection.send_bytes(dumps(reply))
        return False
    connection.send_bytes(reply)
    connection.recv()  # peers may still talk to this rank until all have returned
    _clean_up()
    return True


def _outcome(task: Task, connection: Connection) -> bytes | Raised:
    """The pickled `Returned` of the task's function, or what it raised."""
    try:
        _prepare(task)
        fn = resolve(task.function)
        args, kwargs = pickle.loads(task.arguments)
        if task.initialized:
            _init_process_group(task)
        connection.send(STARTED)
        connection.recv()
        value = fn(*args, **kwargs)
        return dumps(Returned(value))
    except BaseException as error:
        return _raised(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _raised(error: BaseException) -> Raised:
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    # The first frame is this module's own.
    shown = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(kind, error, shown)).rstrip()
    return Raised(name, str(error), text, time.monotonic())


def _prepare(task: Task) -> None:
    import numpy as np
    import torch

    os.chdir(task.cwd)
    sys.path[:] = task.sys_path
    os.environ.clear()
    os.environ.update(task.environ)
    os.environ.update(_rank_environ(task))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    if torch.are_deterministic_algorithms_enabled():  # setting it imports the compiler
        torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _rank_environ(task: Task) -> dict[str, str]:
    """The environment that torchrun gives a worker, as far as a single node needs it."""
    return {
        "RANK": str(task.rank),
        "LOCAL_RANK": str(task.rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_WORLD_SIZE": str(task.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(task.master_port),
        # torch's TCP store asks for the name of every peer: one lost packet must not cost 5 s.
        "RES_OPTIONS": "timeout:1 attempts:1",
    }


def _init_process_group(task: Task) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        # A file, because torch's TCP store asks for the name of every peer, which stalls where
        # name servers do. No world size: with one, the store deletes its file after as many
        # closings, and a copy that torch makes counts too; ranks that come later find it empty.
        store=dist.FileStore(task.store_file),
        rank=task.rank,
        world_size=task.world_size,
        # Longer than the pool's own patience, which ends with a dump of every stack.
        timeout=timedelta(seconds=2 * task.timeout_s),
    )


def _clean_up() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_exception()
    gc.collect()
    sys.stdout.flush()
    sys.stderr.flush()


def _forget_exception() -> None:
    for name in ("last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            delattr(sys, name)


def main(argv: list[str]) -> Any:
    """Entry of the server process: control file descriptor, log folder, modules to preload."""
    control_fd, log_dir, *modules = argv
    serve(int(control_fd), log_dir, *modules)
