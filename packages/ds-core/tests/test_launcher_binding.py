from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_core.errors import LaunchError
from ds_core.launcher import LaunchSpec, launch, make_plan
from ds_core.launcher.binding import bind_cores, bound_command, format_cores, parse_cores


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two NUMA nodes of four cores with two hardware threads each: core k has k and k + 8."""
    for node, cpus in ((0, "0-3,8-11"), (1, "4-7,12-15")):
        folder = tmp_path / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cpus + "\n")
    for cpu in range(16):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    return tmp_path


def shares(system: Path, nproc: int, asked: str = "auto", cpus: int = 16) -> list[str]:
    """Each rank's processors / threads / nodes."""
    return [
        f"{format_cores(share.processors)}/{share.num_threads}/{format_cores(share.nodes)}"
        for share in bind_cores(asked, nproc, set(range(cpus)), system)
    ]


@pytest.mark.parametrize(
    ("nproc", "expected"),
    [
        pytest.param(1, ["0-15/8/0-1"], id="1-rank"),
        pytest.param(2, ["0-3,8-11/4/0", "4-7,12-15/4/1"], id="2-ranks"),
        pytest.param(3, ["0-1,8-9/2/0", "2-3,10-11/2/0", "4-7,12-15/4/1"], id="3-ranks"),
        pytest.param(
            4, ["0-1,8-9/2/0", "2-3,10-11/2/0", "4-5,12-13/2/1", "6-7,14-15/2/1"], id="4-ranks"
        ),
        pytest.param(8, [f"{k},{k + 8}/1/{k // 4}" for k in range(8)], id="8-ranks"),
    ],
)
def test_ranks_share_cores_within_numa_nodes(system: Path, nproc: int, expected: list[str]) -> None:
    assert shares(system, nproc) == expected


def test_list_limits_the_cores(system: Path) -> None:
    assert shares(system, 2, asked="2-5") == ["2-3/2/0", "4-5/2/1"]


def test_processors_that_this_process_may_not_use_are_left_out(system: Path) -> None:
    assert shares(system, 2, cpus=4) == ["0-1/2/0", "2-3/2/0"]


def test_system_without_numa_nodes_is_one_node(tmp_path: Path) -> None:
    assert shares(tmp_path, 2, cpus=4) == ["0-1/2/0", "2-3/2/0"]


@pytest.mark.parametrize(
    ("asked", "nproc", "message"),
    [
        pytest.param("0-99", 1, "got 0-99, but this process may use 0-15", id="not-allowed"),
        pytest.param("0,8", 2, "2 processes need at least as many cores", id="too-few"),
        pytest.param("some", 1, "expected auto, or numbers and ranges", id="no-list"),
        pytest.param("", 1, "but this process may use 0-15", id="empty"),
    ],
)
def test_impossible_binding_is_refused(system: Path, asked: str, nproc: int, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        shares(system, nproc, asked=asked)


def test_list_survives_formatting() -> None:
    assert format_cores(parse_cores("0-3,8,10-11")) == "0-3,8,10-11"


@pytest.mark.parametrize("text", ["a", "0,3-1", "1-"])
def test_wrong_list_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="--bind-cores: got"):
        parse_cores(text)


def test_memory_is_taken_from_the_node_of_the_share(system: Path) -> None:
    made = bind_cores("auto", 2, set(range(16)), system)

    command = bound_command(["prog"], made, keeps_threads=True, sets_memory=True)

    assert command[-4:] == ("0-3,8-11//0", "4-7,12-15//1", "--", "prog")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot bind")
def test_each_rank_runs_on_its_own_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    script = tmp_path / "job.py"
    script.write_text(
        "import os\nprint(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    )
    logs = tmp_path / "logs"
    asked = f"{cores[0]},{cores[1]}"

    launch(LaunchSpec(script=str(script), nproc=2, bind_cores=asked, log_dir=str(logs)))

    assert capfd.readouterr().out == f"[{cores[0]}] 1\n"
    assert (logs / "rank1.stdout.log").read_text() == f"[{cores[1]}] 1\n"


def test_dry_run_shows_the_cores(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text("pass")

    text = make_plan(LaunchSpec(script=str(script), nproc=1, bind_cores="auto")).describe()

    assert f"# torchrun --nproc-per-node=1 --standalone {script}" in text
    assert "# local rank 0: cores " in text


def test_bound_program_keeps_the_users_threads() -> None:
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("the system cannot bind")
    shim = bound_command(["prog"], [], keeps_threads=True, sets_memory=False)[:4]

    ran = subprocess.run(
        [*shim, f"{core}//", "--", "sh", "-c", "echo $OMP_NUM_THREADS"],
        env={"LOCAL_RANK": "0", "OMP_NUM_THREADS": "7", "PATH": os.defpath},
        capture_output=True,
        text=True,
        check=True,
    )

    assert ran.stdout == "7\n"
    assert shim[0] == sys.executable
