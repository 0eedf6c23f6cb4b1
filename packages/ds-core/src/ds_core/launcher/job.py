"""Running a job: torchrun's agent without its noise, and a report where it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO

from ds_core.errors import LaunchError
from ds_core.launcher.errors import JobFailure
from ds_core.launcher.failure import NodeFailure, node_failure
from ds_core.launcher.follower import Follower
from ds_core.launcher.leash import Leash, hang_up
from ds_core.launcher.memory_evidence import MemoryCounters, read_counters
from ds_core.launcher.plan import LaunchPlan, LaunchSpec, make_plan, num_cores, without_process
from ds_core.launcher.reaper import MARK_VARIABLE, end_marked, guarded, wake_stopped_children

if TYPE_CHECKING:
    from ds_core.launcher.rank_logs import RankLogs

#: How long processes may take to end after they were asked to, before they are killed.
SHUTDOWN_S = 10
#: How often to look for processes that were asked to end while they are stopped.
STOPPED_POLL_S = 0.5
_AGENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def launch(spec: LaunchSpec, *, quiet: bool = True, is_tied_to_stdin: bool = False) -> None:
    """Run a job, or this node's part of it, to its end.

    What local rank 0 prints appears on this process's stdout and stderr; everything that any
    rank prints is in a file of its own. Must be called from the main thread, which is where
    Ctrl-C and SIGTERM arrive: they end the job.

    Args:
        spec: the job.
        quiet: keep the log messages of torchrun's agent to itself.
        is_tied_to_stdin: end the job when stdin ends (see `ds_core.launcher.leash`).

    Raises:
        LaunchError: the job cannot be started as it is asked for.
        JobFailure: a process failed, or the job was interrupted or ran into its time limit. All
            its processes have ended.
    """
    if threading.current_thread() is not threading.main_thread():
        raise LaunchError("ds run: a job can be launched from the main thread only")
    if is_tied_to_stdin:
        Leash(hang_up)
    plan = make_plan(spec)
    from ds_core.launcher.rank_logs import RankLogs  # imports torch, which a plan can do without

    folder, is_temporary = _log_folder(plan)
    logs = RankLogs(folder)
    if plan.omp_num_threads is not None and not is_tied_to_stdin:
        _say(
            f"OMP_NUM_THREADS={plan.omp_num_threads} for each of {plan.nproc} processes on "
            f"{num_cores()} cores (set it yourself to choose otherwise)"
        )
    mark = uuid.uuid4().hex
    is_kept = not is_temporary
    with guarded(mark), _silence(quiet), _stopped_can_end():
        try:
            _run_attempts(spec, plan, logs, mark)
        except BaseException as error:
            is_kept = is_kept or not isinstance(error, LaunchError)
            with _signals_ignored():
                end_marked(mark)
            raise
        finally:
            if not is_kept:
                shutil.rmtree(folder, ignore_errors=True)


def _run_attempts(spec: LaunchSpec, plan: LaunchPlan, logs: RankLogs, mark: str) -> None:
    """Run a job, and again after a failure as often as may be.

    Nodes that restart together need their agents for it. On one node each attempt has an agent of
    its own: it may have fewer processes, and finds an empty rendezvous store, where torch's agent
    would hand on that of the attempt before, with the addresses of the dead in it.
    """
    if plan.max_nodes > 1:
        with _environ(plan, mark):
            _run(plan, logs, plan.timeout_s)
        return
    ends_at = None if plan.timeout_s is None else time.monotonic() + plan.timeout_s
    logs.max_restarts = plan.max_restarts
    while True:
        left_s = None if ends_at is None else max(ends_at - time.monotonic(), 0.001)
        try:
            with _environ(plan, mark):
                _run(plan, logs, left_s)
            return
        except JobFailure as failure:
            failed = failure.node_failure
            if failed is None or logs.earlier_attempts == plan.max_restarts:
                raise
            end_marked(mark)  # whatever a rank has started
            spec = without_process(spec, plan, failed.local_rank)
            plan = make_plan(spec)
            logs.begin_next_attempt()
            processes = "1 process" if plan.nproc == 1 else f"{plan.nproc} processes"
            _say(
                f"{failure}\nds run: attempt {logs.earlier_attempts + 1} of at most "
                f"{plan.max_restarts + 1} begins with {processes}"
            )


def _run(plan: LaunchPlan, logs: RankLogs, left_s: float | None) -> None:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    memory = read_counters()
    follower = Follower(logs, _binary(sys.stdout), _binary(sys.stderr), show=plan.show)
    follower.start()
    failures: dict[int, Any] = {}
    ended_by: JobFailure | None = None
    try:
        with _time_limit(left_s):
            _run_agent(plan, logs)
    except ChildFailedError as error:
        failures = error.failures
    except (RendezvousError, DistError) as error:
        raise LaunchError(_no_meeting(plan, error)) from error
    except _TimeLimitReached:
        text = f"the job was ended: it ran longer than --timeout-s {plan.timeout_s:g}"
        ended_by = JobFailure(_with_logs(text, logs), 124, log_dir=logs.root_log_dir)
    except (SignalException, KeyboardInterrupt) as error:
        signum = getattr(error, "sigval", signal.SIGINT)
        text = f"the job was ended by {signal.Signals(signum).name}"
        ended_by = JobFailure(_with_logs(text, logs), 128 + signum, log_dir=logs.root_log_dir)
    finally:
        held = follower.stop()
    if failures:
        raise _failure(failures, logs, memory, held, plan)
    if ended_by is not None:
        raise ended_by  # a traceback of rank 0 only says that it was interrupted
    for data in held.values():
        follower.show_now(data)


def _failure(
    failures: dict[int, Any],
    logs: RankLogs,
    memory: MemoryCounters,
    held: dict[int, bytes],
    plan: LaunchPlan,
) -> JobFailure:
    found: NodeFailure = node_failure(failures, logs, memory)
    is_shown = logs.is_shown(found.local_rank, plan.show) and found.local_rank not in held
    if is_shown:
        found = dataclasses.replace(found, last_words="")
    where = " on this node" if plan.max_nodes > 1 else ""
    return JobFailure(
        found.report(where), found.shell_exit_code, node_failure=found, log_dir=found.log_dir
    )


def _no_meeting(plan: LaunchPlan, error: Exception) -> str:
    meeting = plan.rendezvous
    text = str(error).strip().partition("\n")[0]
    is_host = meeting.node_rank == 0
    remedy = (
        "another job may hold the port: choose another with --rdzv-endpoint HOST:PORT"
        if is_host
        else "check that its host name and port can be reached from here, and that the job was "
        "started on every node"
    )
    nodes = f"the {plan.max_nodes} nodes of the job"
    return f"{nodes} did not meet at {meeting.endpoint}: {text}; {remedy}"


def _run_agent(plan: LaunchPlan, logs: RankLogs) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    meeting = plan.rendezvous
    options: dict[str, Any] = {
        "min_nodes": plan.min_nodes,
        "max_nodes": plan.max_nodes,
        "nproc_per_node": plan.nproc,
        "logs_specs": logs,
        "run_id": meeting.run_id,
        "rdzv_backend": meeting.backend,
        "rdzv_endpoint": meeting.endpoint,
        "rdzv_configs": dict(meeting.conf)
        | ({} if meeting.node_rank is None else {"rank": meeting.node_rank}),
        "max_restarts": plan.max_restarts if plan.max_nodes > 1 else 0,  # else they are ours
        "monitor_interval": 0.1,
        "local_addr": meeting.local_addr,
        "shutdown_timeout": SHUTDOWN_S,
    }
    known = {field.name for field in dataclasses.fields(LaunchConfig)}  # older ones have fewer
    config = LaunchConfig(**{name: value for name, value in options.items() if name in known})
    program, *arguments = plan.command
    elastic_launch(config, program)(*arguments)


def _log_folder(plan: LaunchPlan) -> tuple[Path, bool]:
    """The folder for logs, and whether it goes when the job succeeds."""
    if plan.log_dir is None:
        return Path(tempfile.mkdtemp(prefix="ds-run-")), True
    folder = Path(plan.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"--log-dir: {folder} cannot be made: {error.strerror}") from error
    return folder.resolve(), False


def _with_logs(text: str, logs: RankLogs) -> str:
    return f"{text}; output of every rank: {logs.root_log_dir}"


@contextlib.contextmanager
def _environ(plan: LaunchPlan, mark: str) -> Iterator[None]:
    """This process's environment as the job's processes inherit it.

    Afterwards it is put back, and so are the handlers of the signals that the agent takes over.
    """
    before = dict(os.environ)
    handlers = {signum: signal.getsignal(signum) for signum in _AGENT_SIGNALS}
    os.environ.update({name: setting.value for name, setting in plan.settings.items()})
    # A job within a job carries both marks: what ends the outer one ends it, too.
    os.environ[MARK_VARIABLE] = ",".join(filter(None, [before.get(MARK_VARIABLE), mark]))
    if plan.max_nodes > 1 and (plan.max_restarts or plan.min_nodes < plan.max_nodes):
        # Else the agents hand the rendezvous store of one attempt on to the next, whose ranks find
        # the addresses of dead ones in it.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Let nothing interrupt the end of a job's processes, which takes two seconds at most."""
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _AGENT_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Drop the agent's log records: what matters in them is in the report, in fewer words.

    The agent also leaves its log files to the garbage collector, which would warn of each.
    """
    before = logging.root.manager.disable
    if quiet:
        logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                yield
            finally:
                gc.collect()
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _stopped_can_end() -> Iterator[None]:
    """Have the agent's processes that are stopped (SIGSTOP) end when it asks them to.

    Such a process does not see SIGTERM, and the agent would wait for it for half a minute.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(STOPPED_POLL_S):
            wake_stopped_children()

    thread = threading.Thread(target=watch, name="ds-run-stopped", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class _TimeLimitReached(Exception):  # noqa: N818 - a signal between two functions
    """The job's time is up."""


@contextlib.contextmanager
def _time_limit(timeout_s: float | None) -> Iterator[None]:
    """Raise _TimeLimitReached in the block, which is where the agent ends its processes."""
    if timeout_s is None:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TimeLimitReached

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _binary(stream: Any) -> BinaryIO:
    """The byte stream under a text stream, which is flushed first to keep the order."""
    stream.flush()
    buffer: BinaryIO = stream.buffer
    return buffer


def _say(text: str) -> None:
    sys.stderr.write(f"ds run: {text}\n")
    sys.stderr.flush()
