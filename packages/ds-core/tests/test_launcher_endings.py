"""How jobs end: memory that is full, processes that stay behind, launchers that are killed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_core.launcher import JobFailure, LaunchSpec, launch
from ds_core.launcher.cluster import HostCommand
from ds_core.launcher.failure import NodeFailure, cause_in_words
from ds_core.launcher.host_process import HostProcess
from ds_core.launcher.memory_evidence import MemoryCounters, explain_kill, read_counters
from ds_core.launcher.node_report import MARKER, parse_report, report_line
from ds_core.launcher.reaper import MARK_VARIABLE, end_marked, marked_processes

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Writes a script whose ranks start a process in a session of its own, and note both."""

    def write(source: str) -> str:
        path = tmp_path / "job.py"
        path.write_text(
            textwrap.dedent(f"""
            import os, signal, subprocess, sys, time
            from pathlib import Path
            folder, rank = Path({str(tmp_path)!r}), os.environ["RANK"]
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            (folder / f"child{{rank}}.pid").write_text(str(child.pid))
            (folder / f"rank{{rank}}.pid").write_text(str(os.getpid()))
            """)
            + textwrap.dedent(source)
        )
        return str(path)

    return write


@pytest.fixture
def launchers() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers that a test starts; ended if the test does not."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def started(tmp_path: Path, count: int) -> list[int]:
    """The processes that the ranks have noted, once there are so many."""
    wait_until(lambda: len([path for path in tmp_path.glob("*.pid") if path.read_text()]) == count)
    return [int(path.read_text()) for path in tmp_path.glob("*.pid")]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


# --- No process stays behind ----------------------------------------------------------------------


@needs_proc
def test_grandchildren_in_sessions_of_their_own_end_with_a_failed_job(
    script: Callable[[str], str], tmp_path: Path
) -> None:
    path = script("sys.exit(3 if rank == '0' else time.sleep(600))")

    with pytest.raises(JobFailure, match="exit code 3"):
        launch(LaunchSpec(script=path, nproc=1))

    assert not any(is_running(pid) for pid in started(tmp_path, 2))


@needs_proc
def test_all_processes_end_when_the_launcher_is_killed(
    script: Callable[[str], str], tmp_path: Path, launchers: list[subprocess.Popen[str]]
) -> None:
    path = script("time.sleep(600)")
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "1", path]
    launchers.append(subprocess.Popen(command, text=True, stderr=subprocess.PIPE))
    pids = started(tmp_path, 2)

    launchers[0].kill()

    wait_until(lambda: not any(is_running(pid) for pid in pids))


@needs_proc
def test_job_tied_to_stdin_ends_with_it_and_reports(
    script: Callable[[str], str], tmp_path: Path, launchers: list[subprocess.Popen[str]]
) -> None:
    path = script("print(repr(sys.stdin.read())); time.sleep(600)")
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "1", "--as-node"]
    launchers.append(
        subprocess.Popen(
            [*command, "--tied-to-stdin", path],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    )
    pids = started(tmp_path, 2)

    out, err = launchers[0].communicate("\n\n", timeout=60)  # beats, then the end

    report = parse_report(err.encode())
    assert launchers[0].returncode == 128 + signal.SIGHUP
    assert out == "''\n"  # the job's processes do not read the beats
    assert report is not None
    assert (report.node_rank, report.failure, report.error) == (0, None, "")
    assert Path(report.log_dir).is_dir()
    assert not any(is_running(pid) for pid in pids)


@needs_proc
def test_marked_processes_end_even_if_they_ignore_the_request() -> None:
    mark = uuid.uuid4().hex  # nobody else's, should these tests run twice at once
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", stubborn],
        env=os.environ | {MARK_VARIABLE: f"outer,{mark}"},
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert marked_processes(mark) == [process.pid]
        assert marked_processes(mark[:-1]) == []

        assert end_marked(mark, grace_s=0.1) == 1

        assert process.wait() == -signal.SIGKILL


# --- Why a process was killed ---------------------------------------------------------------------


def counters(group: int | None, machine: int | None) -> MemoryCounters:
    return MemoryCounters(group, machine, 2 * 2**30, 8 * 2**30, 2**30)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        pytest.param(
            (1, 1), (2, 2), "the kernel's OOM killer ended it: memory was full", id="group"
        ),
        pytest.param((0, 5), (0, 6), "most likely the kernel's OOM killer", id="machine"),
        pytest.param(
            (0, 5), (0, 5), "not by the kernel's OOM killer, whose counters", id="neither"
        ),
        pytest.param((None, None), (None, None), "probably the kernel's OOM killer", id="unknown"),
    ],
)
def test_kill_is_explained_by_the_kernels_counters(
    before: tuple[int | None, int | None], after: tuple[int | None, int | None], words: str
) -> None:
    text = explain_kill(counters(*before), counters(*after), 3 * 2**30)

    assert text.startswith(words)
    assert text.endswith(
        "; largest process of the job 3.0 GiB, machine 8.0 GiB, available now 1.0 GiB, limit of "
        "the control group 2.0 GiB"
    )


@pytest.mark.parametrize("version", [1, 2])
def test_counters_are_read_from_the_control_group(tmp_path: Path, version: int) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 1024 kB\n")
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 9\noom_kill 7\n")
    group = tmp_path / ("sys/fs/cgroup/job" if version == 2 else "sys/fs/cgroup/memory/job")
    group.mkdir(parents=True)
    line = "0::/job\n" if version == 2 else "4:cpu:/\n3:memory:/job\n"
    (tmp_path / "proc/self/cgroup").write_text(line)
    events, limit = {
        1: ("memory.oom_control", "memory.limit_in_bytes"),
        2: ("memory.events", "memory.max"),
    }[version]
    (group / events).write_text("under_oom 0\noom_kill 3\n")
    (group / limit).write_text("1048576\n")

    assert read_counters(tmp_path) == MemoryCounters(3, 7, 2**20, 4 * 2**20, 2**20)


def test_counters_of_a_system_without_them_are_unknown(tmp_path: Path) -> None:
    assert read_counters(tmp_path) == MemoryCounters(None, None, None, None, None)


@pytest.mark.parametrize(
    ("exit_code", "words"),
    [
        pytest.param(7, "exit code 7", id="code"),
        pytest.param(-signal.SIGSEGV, "killed by SIGSEGV (a crash in native code)", id="segv"),
        pytest.param(-signal.SIGBUS, "often /dev/shm is full", id="bus"),
        pytest.param(-40, "killed by signal 40", id="unnamed"),
    ],
)
def test_ending_is_put_in_words(exit_code: int, words: str) -> None:
    assert words in cause_in_words(exit_code, counters(0, 0))


# --- What a node tells ----------------------------------------------------------------------------


def failure(**values: object) -> NodeFailure:
    known = {"rank": 3, "local_rank": 1, "pid": 9, "exit_code": -9, "cause": "killed by SIGKILL"}
    rest = {"spoke_ns": 5, "others": (2,), "log_dir": "/logs", "last_words": "Traceback\nError: é"}
    return NodeFailure(**{**known, **rest, **values})  # type: ignore[arg-type]


def test_report_of_a_node_survives_the_way() -> None:
    sent = JobFailure("text", 137, node_failure=failure(), log_dir="/logs")

    received = parse_report(b"host2: 50%|###  |" + report_line(sent, 1))

    assert received is not None
    assert received.failure == failure()
    assert (received.node_rank, received.log_dir) == (1, "/logs")
    assert received.age_s > 0
    assert parse_report(b"an ordinary line\n") is None
    assert parse_report(MARKER + b"{broken\n") is None


def test_report_for_people_ends_with_the_traceback() -> None:
    assert failure().report(" on host2").splitlines() == [
        "rank 3 failed first on host2: killed by SIGKILL, pid 9",
        "ended with it: rank 2",
        "output of every rank there: /logs",
        "Traceback",
        "Error: é",
    ]
    assert failure().shell_exit_code == 137


def output_of(source: str, *, prefix: str = "") -> tuple[bytes, list[bytes]]:
    """What a command's output becomes on the terminal, and the lines that were taken."""
    command = HostCommand(
        hosts=("h",), argv=(sys.executable, "-S", "-c", source), environment={}, is_tied=False
    )
    out, lines = io.BytesIO(), []
    process = HostProcess(command, out, out, prefix=prefix, take_line=lines.append)
    wait_until(lambda: process.poll() is not None)
    process.close()
    return out.getvalue(), lines


def test_reports_are_kept_from_the_terminal_wherever_they_begin() -> None:
    source = "import sys; sys.stdout.write('a\\n50%DS_NODE_REPORT {}\\nDS_NODE_REPORT {}\\nDS_NO')"

    shown, lines = output_of(source)

    assert shown == b"a\n50%\nDS_NO"
    assert lines == [b"a", b"50%DS_NODE_REPORT {}", b"DS_NODE_REPORT {}"]


def test_job_goes_on_when_nobody_reads_its_output_any_more() -> None:
    command = HostCommand(
        hosts=("h",),
        argv=(sys.executable, "-S", "-c", "for i in range(50000): print('line', i)"),
        environment={},
        is_tied=False,
    )
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        process = HostProcess(command, nobody, nobody)
        wait_until(lambda: process.poll() is not None)
        process.close()

    assert process.poll() == 0


def test_output_without_an_end_of_line_is_shown_at_once() -> None:
    shown, _ = output_of("print('10%', end='\\r20%', flush=True)")
    assert shown == b"10%\r20%"
    assert output_of("print('x\\ny', end='')", prefix="[h] ")[0] == b"[h] x\n[h] y\n"
