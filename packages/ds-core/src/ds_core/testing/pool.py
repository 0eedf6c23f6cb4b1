"""A pool of gloo worker processes that tests share.

`run_ranks(2, fn, x)` runs `fn(x)` in two processes with `torch.distributed` initialised and
returns both results. The processes outlive the call: the second run costs milliseconds.
"""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import random
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from multiprocessing.connection import wait
from typing import Any

from ds_core.errors import DsError
from ds_core.testing.outcome import (
    Died,
    Hung,
    Outcome,
    Raised,
    RankFailure,
    Returned,
    failed_at,
    signal_name,
    summarize,
)
from ds_core.testing.processes import READY_S, Server, Worker
from ds_core.testing.task import Task, dumps, reference
from ds_core.testing.worker import RELEASE, STARTED

#: How long the peers of a rank that failed may take to notice before they are killed.
GRACE_S = 15.0
MAX_WORLD_SIZE = 16


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    deaths: Collection[int] | Mapping[int, int] = (),
    initialized: bool = True,
    **kwargs: Any,
) -> list[Any]:
    """What `fn(*args, **kwargs)` returns in each rank of a gloo world, in rank order.

    Every rank is a process of its own with one thread, torchrun's environment (`RANK`,
    `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) on top of the caller's, the
    caller's working directory, seed 0 and default dtype float32. Output of the ranks is
    printed here when the run ends, so that pytest shows it with a failure.

    Args:
        world_size: number of ranks, 1 to 16.
        fn: a function at the top level of a module or test file; no lambda, no closure.
        *args, **kwargs: its arguments, pickled; tensors arrive by value.
        timeout_s: seconds after which ranks that have not finished are dumped and killed.
        deaths: ranks that `fn` is to kill. As a mapping, the signal that must have killed each.
        initialized: whether the default process group exists when `fn` starts. If False, `fn`
            may call `torch.distributed.init_process_group("gloo")` itself.

    Returns:
        One result per rank. With `deaths`, `Died(signum)` for each of these ranks, and for a
        survivor its result, or `Raised(type, message)` if it raised.

    Raises:
        RankFailure: a rank raised, died or hung (and `deaths` does not allow it), or a rank of
            `deaths` lived. Names the ranks, with the traceback or thread dump of each.
        TaskError: `fn` cannot be loaded by name in another process.
    """
    __tracebackhide__ = True
    pool = shared_pool()
    return pool.run(
        world_size,
        fn,
        *args,
        timeout_s=timeout_s,
        deaths=deaths,
        initialized=initialized,
        **kwargs,
    )


@functools.cache
def shared_pool() -> RankPool:
    """This process's pool, made on first use and closed when the process ends."""
    pool = RankPool()
    atexit.register(pool.close)
    return pool


class RankPool:
    """Worker processes that run one function at a time in a fresh world of ranks.

    Nothing starts before the first `run`. Workers are added up to the largest world asked for,
    and serve one run after the other; those of a run that failed are replaced.
    `close` ends all of them; they also end when the process that owns the pool does, however
    it dies.
    """

    def __init__(self) -> None:
        self._server: Server | None = None
        self._workers: list[Worker] = []

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        timeout_s: float = 60.0,
        deaths: Collection[int] | Mapping[int, int] = (),
        initialized: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """See `run_ranks`."""
        __tracebackhide__ = True
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"run_ranks: world_size: got {world_size}, expected 1 to 16")
        if any(not 0 <= rank < world_size for rank in deaths):
            raise ValueError(
                f"run_ranks: deaths: got ranks {sorted(deaths)}, expected 0 to {world_size - 1}"
            )
        function, arguments = reference(fn), dumps((args, kwargs))
        server, workers = self._ready(world_size)
        store_file, master_port = server.new_store_file(), free_port()
        for rank, worker in enumerate(workers):
            worker.start(
                Task(
                    rank=rank,
                    world_size=world_size,
                    store_file=store_file,
                    master_port=master_port,
                    timeout_s=timeout_s,
                    initialized=initialized,
                    function=function,
                    arguments=arguments,
                    environ=dict(os.environ),
                    sys_path=list(sys.path),
                    cwd=os.getcwd(),
                )
            )
        outcomes = self._finish(workers, timeout_s, patient=bool(deaths), initialized=initialized)
        return _judge(fn.__qualname__, outcomes, deaths)

    def close(self) -> None:
        """End all processes of the pool. It may be used again: a new run starts new ones."""
        for worker in self._workers:
            worker.connection.close()
        self._workers.clear()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _ready(self, count: int) -> tuple[Server, list[Worker]]:
        """The server, started if need be, and `count` workers that wait for a task."""
        if self._server is not None and not self._server.is_alive():
            self.close()
        if self._server is None:
            self._server = Server()
        for worker in self._workers[:count]:
            if not worker.wait_ready(READY_S):  # it died, or hangs in its own clean-up
                self._discard(worker)
        self._server.forget_exits()
        missing = range(count - len(self._workers))
        self._workers += [self._server.spawn() for _ in missing]
        for worker in self._workers[:count]:
            if not worker.wait_ready(READY_S):
                text = self._server.log() + worker.new_output()
                self.close()
                raise DsError(f"run_ranks: a worker process did not start:\n{text}")
        return self._server, self._workers[:count]

    def _finish(
        self, workers: list[Worker], timeout_s: float, *, patient: bool, initialized: bool
    ) -> list[Outcome]:
        """Every rank's outcome; afterwards all workers are becoming idle, or discarded."""
        try:
            outcomes = self._collect(workers, timeout_s, patient=patient)
        except BaseException:
            for worker in workers:
                self._discard(worker)
            raise
        is_sound = initialized and all(isinstance(outcome, Returned) for outcome in outcomes)
        for rank, worker in enumerate(workers):
            worker.echo_output(rank)
            if is_sound:
                # It tears its process group down on its own time; the next run waits for that.
                worker.tell(RELEASE)
            else:
                # A broken process group leaves traces that would make the next one hang.
                self._discard(worker)
        return outcomes

    def _collect(self, workers: list[Worker], timeout_s: float, *, patient: bool) -> list[Outcome]:
        patience = _Patience(timeout_s, ends_at_failure=not patient)
        outcomes: dict[int, Outcome] = {}
        self._await(dict(enumerate(workers)), outcomes, patience)
        started = {rank: worker for rank, worker in enumerate(workers) if rank not in outcomes}
        for worker in started.values():
            worker.tell(STARTED)
        self._await(started, outcomes, patience)
        return [outcomes[rank] for rank in range(len(workers))]

    def _await(
        self, awaited: dict[int, Worker], outcomes: dict[int, Outcome], patience: _Patience
    ) -> None:
        """Wait until each worker has started or ended; enter the outcome of those that ended."""
        pending: dict[Any, int] = {worker.connection: rank for rank, worker in awaited.items()}
        while pending:
            for ready in wait(list(pending), patience.left_s()):
                rank = pending.pop(ready)
                answer = self._receive(awaited[rank])
                if answer != STARTED:
                    outcomes[rank] = answer
                    patience.note(answer)
            if patience.left_s() == 0.0:
                for rank in pending.values():
                    where = awaited[rank].thread_dump()
                    outcomes[rank] = Hung(patience.used_s(), where)
                return

    def _receive(self, worker: Worker) -> Any:
        """What a worker says: that it has started, or its rank's outcome."""
        try:
            return pickle.loads(worker.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            assert self._server is not None  # a worker exists, so its server does
            status = self._server.exit_status(worker.pid)
            signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
            exit_code = None if signum else os.waitstatus_to_exitcode(status)
            return Died(signum, exit_code, worker.last_output())

    def _discard(self, worker: Worker) -> None:
        """Kill a worker and take it out of the pool; its place is refilled by the next run."""
        if worker in self._workers:
            self._workers.remove(worker)
        worker.kill()


class _Patience:
    """How long to wait for the ranks of one run: less once one of them has failed."""

    def __init__(self, timeout_s: float, *, ends_at_failure: bool) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + timeout_s
        self._ends_at_failure = ends_at_failure

    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def used_s(self) -> float:
        return round(time.monotonic() - self._started, 1)

    def note(self, outcome: Outcome) -> None:
        if self._ends_at_failure and not isinstance(outcome, Returned):
            self._deadline = min(self._deadline, time.monotonic() + GRACE_S)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now, for a program that takes a number.

    Below those that systems give to outgoing connections, of which many come and go in tests: one
    of them could get the port before the ranks do.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def _judge(
    name: str, outcomes: list[Outcome], deaths: Collection[int] | Mapping[int, int]
) -> list[Any]:
    """The results of a run, or the failure that it was."""
    __tracebackhide__ = True
    failed = [
        rank for rank, outcome in enumerate(outcomes) if not _is_allowed(rank, outcome, deaths)
    ]
    if failed:
        # The first to fail is the cause: its peers only lose their connection to it.
        failed.sort(key=lambda rank: failed_at(outcomes[rank]))
        listed = "; ".join(f"rank {rank} {summarize(outcomes[rank])}" for rank in failed)
        expected = f" (expected to die: {_describe(deaths)})" if deaths else ""
        raise RankFailure(f"{name} in {len(outcomes)} ranks: {listed}{expected}", outcomes)
    return [outcome.value if isinstance(outcome, Returned) else outcome for outcome in outcomes]


def _is_allowed(rank: int, outcome: Outcome, deaths: Collection[int] | Mapping[int, int]) -> bool:
    if rank not in deaths:
        return isinstance(outcome, Returned) or (bool(deaths) and isinstance(outcome, Raised))
    signum = deaths[rank] if isinstance(deaths, Mapping) else None
    return isinstance(outcome, Died) and signum in (None, outcome.signum)


def _describe(deaths: Collection[int] | Mapping[int, int]) -> str:
    if isinstance(deaths, Mapping):
        return ", ".join(f"rank {rank} by {signal_name(num)}" for rank, num in deaths.items())
    return ", ".join(f"rank {rank}" for rank in sorted(deaths))
