from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_core.errors import LaunchError
from ds_core.launcher import JobFailure, LaunchPlan, LaunchSpec, launch, make_plan
from ds_core.launcher.plan import without_process
from ds_core.testing import free_port

Script = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a script and returns its path."""

    def write(source: str) -> str:
        path = tmp_path / "job.py"
        path.write_text("import os, signal, sys, time\n" + textwrap.dedent(source))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where jobs put what they do not keep."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def plan(spec_script: str, **options: object) -> LaunchPlan:
    return make_plan(LaunchSpec(script=spec_script, **options))  # type: ignore[arg-type]


def process_ids(folder: Path) -> list[int]:
    texts = [path.read_text() for path in sorted(folder.glob("*.pid"))]
    return [int(text) for text in texts if text]  # a file is there before its content


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


# --- Jobs that succeed ----------------------------------------------------------------------------


def test_rank_0_streams_and_every_rank_has_its_files(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("""
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)
    """)

    launch(LaunchSpec(script=path, nproc=2, log_dir=str(tmp_path / "logs")))

    terminal = capfd.readouterr()
    assert terminal.out == "out 0\n"
    assert "err 0\n" in terminal.err
    assert "err 1" not in terminal.err
    assert (tmp_path / "logs/rank1.stdout.log").read_text() == "out 1\n"
    assert (tmp_path / "logs/rank1.stderr.log").read_text() == "err 1\n"


def test_processes_get_torchruns_environment_and_the_scripts_own_arguments(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
        print(*(os.environ[name] for name in names), int(os.environ["MASTER_PORT"]) > 0)
        print(sys.argv[1:])
    """)

    launch(LaunchSpec(script=path, nproc=1, args=("--nproc", "9", "--", "a b")))

    out = capfd.readouterr().out
    assert out == "0 0 1 1 localhost True\n['--nproc', '9', '--', 'a b']\n"


def test_ranks_can_form_a_process_group(script: Script, capfd: pytest.CaptureFixture[str]) -> None:
    path = script("""
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.ones(1)
        dist.all_reduce(total)
        print(total.item())
        dist.destroy_process_group()
    """)

    launch(LaunchSpec(script=path, nproc=2))

    assert capfd.readouterr().out == "2.0\n"


def test_a_successful_job_leaves_no_temporary_files_and_no_environment(
    script: Script, temporary_files: Path
) -> None:
    path = script("pass")
    before = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    launch(LaunchSpec(script=path, nproc=2))

    after = dict(os.environ), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert list(temporary_files.iterdir()) == []
    assert after == before


def test_threads_are_shared_out_and_this_is_said_once(
    script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("ds_core.launcher.plan.num_cores", lambda: 8)
    path = script("print(os.environ['OMP_NUM_THREADS'])")

    launch(LaunchSpec(script=path, nproc=2))

    terminal = capfd.readouterr()
    assert terminal.out == "4\n"
    assert terminal.err.count("OMP_NUM_THREADS=4 for each of 2 processes") == 1


def test_the_users_number_of_threads_is_kept_in_silence(
    script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    path = script("print(os.environ['OMP_NUM_THREADS'])")

    launch(LaunchSpec(script=path, nproc=2))

    assert capfd.readouterr() == ("3\n", "")


def test_handled_traceback_is_shown_like_other_output(
    script: Script, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = script("""
        import traceback
        try:
            1 / 0
        except ZeroDivisionError:
            traceback.print_exc()
    """)

    launch(LaunchSpec(script=path, nproc=1))

    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: division by zero\n")


def test_module_and_program_can_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/part.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)

    launch(LaunchSpec(script="package.part", args=("-x",), nproc=1, is_module=True))
    launch(LaunchSpec(script="echo", args=("-x", "$RANK"), nproc=1, with_python=False))

    assert capfd.readouterr().out == "__main__ ['-x']\n-x $RANK\n"


def test_restart_runs_all_processes_again(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("""
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        print("attempt", attempt)
        sys.exit(1 - attempt)
    """)

    launch(LaunchSpec(script=path, nproc=2, max_restarts=1, log_dir=str(tmp_path / "logs")))

    assert capfd.readouterr().out == "attempt 0\nattempt 1\n"
    assert (tmp_path / "logs/restart1/rank1.stdout.log").read_text() == "attempt 1\n"


def test_each_attempt_has_an_empty_store(script: Script, tmp_path: Path) -> None:
    path = script("""
        import torch.distributed as dist
        attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        dist.init_process_group("gloo")
        store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
        dist.barrier()
        found = store.check([f"left-{other}" for other in range(2)])
        print(os.environ["TORCHELASTIC_MAX_RESTARTS"], found, flush=True)
        store.set(f"left-{rank}", "by a dead rank")
        dist.barrier()
        os.kill(os.getpid(), 9) if attempt < 2 and rank == attempt else dist.barrier()
    """)

    launch(LaunchSpec(script=path, nproc=2, max_restarts=2, log_dir=str(tmp_path / "logs")))

    logs = [tmp_path / "logs" / folder for folder in ("", "restart1", "restart2")]
    assert [(log / "rank0.stdout.log").read_text() for log in logs] == ["2 False\n"] * 3


def test_job_goes_on_without_the_process_that_failed(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("""
        world, attempt = os.environ["WORLD_SIZE"], os.environ["TORCHELASTIC_RESTART_COUNT"]
        print("attempt", attempt, "of", world, flush=True)
        time.sleep(0.2 if os.environ["RANK"] == "1" else 30)
        sys.exit(3)
    """)

    with pytest.raises(JobFailure, match="rank 1 failed first: exit code 3"):
        launch(LaunchSpec(script=path, nproc=4, min_nproc=3, max_restarts=2))

    out, err = capfd.readouterr()
    assert out == "attempt 0 of 4\nattempt 1 of 3\nattempt 2 of 3\n"
    assert "rank 1 failed first: exit code 3" in err
    assert "ds run: attempt 2 of at most 3 begins with 3 processes" in err


def test_device_of_the_failed_process_is_left_out(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    spec = LaunchSpec(
        script=script("pass"), devices=(2, 5, 7), min_nproc=1, max_restarts=9, nproc=3
    )

    specs = [spec := without_process(spec, make_plan(spec), 1) for _ in range(3)]

    assert [(each.nproc, each.devices) for each in specs] == [(2, (2, 7)), (1, (2,)), (1, (2,))]


def test_stopped_process_does_not_hold_up_the_end(script: Script) -> None:
    path = script("""
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        sys.exit(3)
    """)
    began = time.monotonic()

    with pytest.raises(JobFailure, match="rank 1 failed first: exit code 3"):
        launch(LaunchSpec(script=path, nproc=2))

    assert time.monotonic() - began < 25  # the agent alone would wait for 30 seconds


def test_two_nodes_form_one_world(script: Script, tmp_path: Path) -> None:
    path = script("print(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['GROUP_RANK'])")
    endpoint = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "2", "--nnodes", "2"]

    nodes = [
        subprocess.Popen(
            [*command, "--rdzv-endpoint", endpoint, "--node-rank", str(number), path],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    printed = [node.communicate(timeout=120)[0] for node in nodes]

    assert printed == ["0 4 0\n", "2 4 1\n"]
    assert [node.returncode for node in nodes] == [0, 0]


# --- Jobs that fail -------------------------------------------------------------------------------


def test_first_failure_is_named_with_its_traceback_last_and_once(
    script: Script, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script(f"""
        marker = {str(tmp_path / "failing")!r}
        if os.environ["RANK"] == "0":
            while not os.path.exists(marker):
                time.sleep(0.001)
            time.sleep(0.05)  # soon enough for the agent to notice both at once
            raise RuntimeError("connection closed by peer")
        # The marker follows the traceback, however long this process is kept waiting.
        sys.excepthook = lambda *e: (sys.__excepthook__(*e), open(marker, "w").close())
        raise ValueError("the cause")
    """)

    with pytest.raises(JobFailure) as failure:
        launch(LaunchSpec(script=path, nproc=2))

    text = str(failure.value)
    assert text.startswith("rank 1 failed first: exit code 1, pid ")
    assert "ended with it: rank 0" in text
    assert text.endswith("ValueError: the cause")
    assert "connection closed" not in text + capfd.readouterr().err
    assert failure.value.exit_code == 1


def test_rank_0s_own_traceback_is_shown_once(
    script: Script, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script("""
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")
    """)

    with pytest.raises(JobFailure) as failure:
        launch(LaunchSpec(script=path, nproc=1))

    shown = capfd.readouterr().err + str(failure.value)
    assert shown.count("KeyError: 'inner'") == 1
    assert shown.count("ValueError: outer") == 1


def test_traceback_that_torchs_record_wrote_is_shown(script: Script) -> None:
    path = script("""
        from torch.distributed.elastic.multiprocessing.errors import record

        @record
        def main():
            if os.environ["RANK"] == "0":
                time.sleep(30)
            sys.stderr = open(os.devnull, "w")
            raise ValueError("recorded")

        main()
    """)

    with pytest.raises(JobFailure, match="ValueError: recorded"):
        launch(LaunchSpec(script=path, nproc=2))


@pytest.mark.parametrize(
    ("action", "exit_code", "words"),
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            r"killed by SIGKILL \(.*OOM killer",  # which of the causes: the machine's counters
            id="sigkill",
        ),
        pytest.param("os.abort()", 134, r"killed by SIGABRT \(native code gave up", id="sigabrt"),
        pytest.param("sys.exit(7)", 7, "failed first: exit code 7", id="exit-code"),
    ],
)
def test_way_of_ending_is_explained(
    script: Script, action: str, exit_code: int, words: str
) -> None:
    path = script(f"""
        if os.environ["RANK"] == "1":
            print("last words", file=sys.stderr)
            {action}
        time.sleep(30)
    """)

    with pytest.raises(JobFailure, match=words) as failure:
        launch(LaunchSpec(script=path, nproc=2))

    assert failure.value.exit_code == exit_code
    assert "rank 1 failed first" in str(failure.value)
    assert str(failure.value).endswith("last words")


def test_failed_jobs_output_is_kept_and_its_folder_named(
    script: Script, temporary_files: Path
) -> None:
    path = script("print('partial result'); sys.exit(3)")

    with pytest.raises(JobFailure) as failure:
        launch(LaunchSpec(script=path, nproc=1))

    (folder,) = temporary_files.glob("ds-run-*")
    assert f"output of every rank: {folder}" in str(failure.value)
    assert (folder / "rank0.stdout.log").read_text() == "partial result\n"


def test_no_process_outlives_a_failed_job(script: Script, tmp_path: Path) -> None:
    path = script(f"""
        from pathlib import Path
        rank = os.environ["RANK"]
        Path({str(tmp_path)!r}, rank + ".pid").write_text(str(os.getpid()))
        if rank == "1":
            while sum(p.stat().st_size > 0 for p in Path({str(tmp_path)!r}).glob("*.pid")) < 3:
                time.sleep(0.01)
            sys.exit(1)
        time.sleep(600)
    """)

    with pytest.raises(JobFailure, match="ended with it: ranks 0, 2"):
        launch(LaunchSpec(script=path, nproc=3))

    pids = process_ids(tmp_path)
    assert len(pids) == 3
    assert not any(is_running(pid) for pid in pids)


def test_time_limit_ends_the_job(script: Script) -> None:
    path = script("time.sleep(600)")

    with pytest.raises(JobFailure, match="ran longer than --timeout-s 1") as failure:
        launch(LaunchSpec(script=path, nproc=2, timeout_s=1))

    assert failure.value.exit_code == 124


@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_signal_to_the_launcher_ends_all_processes_cleanly(
    script: Script, tmp_path: Path, signum: int, exit_code: int
) -> None:
    path = script(f"""
        from pathlib import Path
        Path({str(tmp_path)!r}, os.environ["RANK"] + ".pid").write_text(str(os.getpid()))
        time.sleep(600)
    """)
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "2", path]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as launcher:
        wait_until(lambda: len(process_ids(tmp_path)) == 2)
        launcher.send_signal(signum)
        _, err = launcher.communicate(timeout=60)

    assert launcher.returncode == exit_code
    name = signal.Signals(signum).name
    assert f"ds: the job was ended by {name}; output of every rank: " in err
    assert err.count("\n") <= 2  # the number of threads, and this
    assert "Traceback" not in err
    assert not any(is_running(pid) for pid in process_ids(tmp_path))


# --- Plans ----------------------------------------------------------------------------------------


def test_plan_describes_command_and_environment_of_every_process(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = script("pass")

    head, first, second = plan(path, nproc=2, args=("--lr", "1 e")).describe().splitlines()

    assert head == f"# torchrun --nproc-per-node=2 --standalone {path} --lr '1 e'"
    assert first.startswith("RANK=0 LOCAL_RANK=0 GROUP_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ")
    assert second.startswith("RANK=1 LOCAL_RANK=1 ")
    assert second.endswith(f"{sys.executable} -u {path} --lr '1 e'")


def test_plan_of_several_numbered_nodes(script: Script) -> None:
    path = script("pass")

    made = plan(path, nproc=4, nnodes=3, node_rank=2, rdzv_endpoint="head:29500")

    assert made.rendezvous.backend == "static"
    assert made.environ(1)["RANK"] == "9"
    assert made.environ(1)["WORLD_SIZE"] == "12"
    assert made.environ(1)["MASTER_ADDR"] == "head"
    assert "--nnodes=3 --node-rank=2 --master-addr=head" in made.torchrun_command()


def test_plan_of_an_elastic_job_leaves_ranks_to_the_rendezvous(script: Script) -> None:
    made = plan(script("pass"), nproc=2, nnodes="1:4", rdzv_endpoint="head:29500")

    assert (made.min_nodes, made.max_nodes) == (1, 4)
    assert made.environ(0)["RANK"] == "<rank>"
    assert made.environ(0)["WORLD_SIZE"] == "<world size>"


def test_one_process_keeps_all_threads(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    assert plan(script("pass"), nproc=1).omp_num_threads is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"nproc": 0}, "--nproc: got 0, expected a number of at least 1", id="nproc"),
        pytest.param({"nnodes": "0"}, "--nnodes: got 0", id="nnodes-0"),
        pytest.param({"nnodes": "3:2"}, "--nnodes: got 3:2", id="nnodes-reversed"),
        pytest.param({"nnodes": 2}, "--rdzv-endpoint: 2 nodes need a host:port", id="no-endpoint"),
        pytest.param(
            {"nnodes": 2, "rdzv_endpoint": "head"},
            "--rdzv-endpoint: got 'head', expected host:port",
            id="endpoint-without-port",
        ),
        pytest.param(
            {"nnodes": 2, "rdzv_endpoint": "head:1", "node_rank": 2},
            "--node-rank: got 2, expected 0 to 1",
            id="node-rank-too-large",
        ),
        pytest.param(
            {"nnodes": "1:2", "rdzv_endpoint": "head:1", "node_rank": 0},
            "needs a fixed number of them, got 1:2",
            id="node-rank-of-elastic-job",
        ),
        pytest.param({"node_rank": 1}, "there is one node; give --nnodes", id="node-rank-alone"),
        pytest.param({"max_restarts": -1}, "--max-restarts: got -1", id="max-restarts"),
        pytest.param({"min_nproc": 2}, "--min-nproc: got 2, expected 1 to", id="min-nproc-high"),
        pytest.param({"min_nproc": 0}, "--min-nproc: got 0, expected 1 to", id="min-nproc-0"),
        pytest.param({"min_nproc": 1}, "started again without --max-restarts", id="min-nproc-once"),
        pytest.param(
            {"nnodes": 2, "rdzv_endpoint": "head:1", "min_nproc": 1, "max_restarts": 1},
            "--min-nproc: is for a job on one node",
            id="min-nproc-of-nodes",
        ),
        pytest.param({"timeout_s": 0.0}, "--timeout-s: got 0.0", id="timeout"),
        pytest.param({"timeout_s": float("inf")}, "--timeout-s: got inf", id="timeout-infinite"),
        pytest.param({"timeout_s": float("nan")}, "--timeout-s: got nan", id="timeout-nan"),
        pytest.param({"log_dir": __file__}, "exists and is not a folder", id="log-dir-is-file"),
        pytest.param(
            {"is_module": True, "with_python": False}, "exclude each other", id="module-and-program"
        ),
    ],
)
def test_impossible_job_is_refused(
    script: Script, options: dict[str, object], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        plan(script("pass"), **{"nproc": 1, **options})


def test_missing_script_is_refused_with_the_nearest_name(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script("pass")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(LaunchError, match=r"jop\.py: no such file .* did you mean job\.py\?"):
        plan("jop.py", nproc=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        pytest.param(".", {}, r"is a folder without a __main__\.py", id="folder"),
        pytest.param("no_such.module", {"is_module": True}, "no module no_such in", id="module"),
        pytest.param("no-such-program", {"with_python": False}, "no such program", id="program"),
    ],
)
def test_what_cannot_be_run_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: dict[str, bool],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(LaunchError, match=message):
        plan(name, nproc=1, **options)


def test_unreadable_script_is_refused(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script("pass")
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may read everything

    with pytest.raises(LaunchError, match="may not be read by this user"):
        plan(path, nproc=1)
