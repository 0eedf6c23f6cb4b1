from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.testing import Died, Raised, RankFailure, RankPool, TaskError, free_port, run_ranks

Ranks = Callable[..., list[Any]]


@dataclass(frozen=True)
class Point:
    """A class of this file, to be pickled both ways."""

    x: int


def sum_of_ranks(offset: torch.Tensor) -> torch.Tensor:
    total = torch.full((3,), float(dist.get_rank()))
    dist.all_reduce(total)
    return total + offset


def environment() -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "FLAVOUR")
    return {name: os.environ[name] for name in names}


def state_then_disturb(folder: str) -> tuple[bool, float, str, torch.dtype, int, str]:
    seen = (
        dist.is_initialized(),
        torch.rand(1).item(),
        os.environ.get("LEFT_OVER", "none"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        os.getcwd(),
    )
    os.environ["LEFT_OVER"] = "yes"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    return seen


def pid() -> int:
    return os.getpid()


def move(point: Point, *, by: int) -> Point:
    return Point(point.x + by + dist.get_rank())


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} is unhappy")
    dist.all_reduce(torch.ones(1))


def raise_own_number() -> None:
    raise KeyError(f"number {dist.get_rank()}")


def assert_equal(left: int, right: int) -> None:
    assert left == right


def kill_self_on(rank: int) -> str:
    if dist.get_rank() == rank:
        print("goodbye", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.get_world_size() > 2 and dist.get_rank() == 0:
        return "not involved"
    dist.broadcast(torch.ones(1), src=rank)
    return "survived"


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        sleep_here()
    dist.barrier()


def sleep_here() -> None:
    time.sleep(600)


def print_rank() -> None:
    print("hello from", os.environ["RANK"])


def unpicklable() -> Any:
    return lambda: None


def init_by_hand() -> int:
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return dist.get_world_size()


def one_of_many() -> torch.Tensor:
    return torch.zeros(1_000_000)[3:5]


class Namespace:
    @staticmethod
    def static() -> int:
        return dist.get_rank()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_runs_the_function_in_one_world(ranks: Ranks, world_size: int) -> None:
    results = ranks(world_size, sum_of_ranks, torch.tensor([0.0, 1.0, 2.0]))

    expected = sum(range(world_size)) + torch.tensor([0.0, 1.0, 2.0])
    assert len(results) == world_size
    for result in results:
        torch.testing.assert_close(result, expected)


def test_ranks_see_torchruns_environment_and_the_callers(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAVOUR", "sour")

    _, second = ranks(2, environment)

    assert second == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "FLAVOUR": "sour",
    }


def test_a_run_leaves_nothing_behind_for_the_next(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    first = ranks(2, state_then_disturb, "")
    second = ranks(2, state_then_disturb, "")

    assert first == second
    assert first[0] == first[1]
    assert first[0][2:] == ("none", torch.float32, 1, str(tmp_path))


def test_processes_are_reused_and_quick(ranks: Ranks) -> None:
    first = ranks(4, pid)

    started = time.monotonic()
    again = [ranks(2, pid) for _ in range(10)]
    seconds = time.monotonic() - started

    assert all(pids == first[:2] for pids in again)
    assert seconds < 5.0  # about 0.4 s on an idle machine


def test_arguments_and_results_may_be_of_the_test_files_own_classes(ranks: Ranks) -> None:
    assert ranks(2, move, Point(3), by=10) == [Point(13), Point(14)]


def test_static_method_can_be_run(ranks: Ranks) -> None:
    assert ranks(2, Namespace.static) == [0, 1]


def test_result_view_does_not_carry_its_whole_storage(ranks: Ranks) -> None:
    (result,) = ranks(1, one_of_many)

    assert result.untyped_storage().nbytes() == 8


def test_function_may_initialise_the_world_itself(ranks: Ranks) -> None:
    assert ranks(2, init_by_hand, initialized=False) == [2, 2]


def test_exception_names_the_cause_first_and_carries_tracebacks(ranks: Ranks) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks(2, raise_on, 1)

    text = str(failure.value)
    assert text.startswith("raise_on in 2 ranks: rank 1 raised ValueError: rank 1 is unhappy; ")
    assert 'raise ValueError(f"rank {rank} is unhappy")' in text
    assert "dist.all_reduce(torch.ones(1))" in text
    assert failure.value.outcomes[1] == Raised("ValueError", "rank 1 is unhappy")


def test_exceptions_that_differ_are_all_shown_and_equal_ones_once(ranks: Ranks) -> None:
    with pytest.raises(RankFailure) as differ:
        ranks(2, raise_own_number)
    with pytest.raises(RankFailure) as equal:
        ranks(2, assert_equal, 3, 4)

    assert "KeyError: 'number 0'" in str(differ.value)
    assert "KeyError: 'number 1'" in str(differ.value)
    assert "--- ranks 0, 1:" in str(equal.value)


def test_failed_assert_shows_the_values_compared(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="AssertionError: assert 3 == 4"):
        ranks(1, assert_equal, 3, 4)


@pytest.mark.parametrize("rank", [0, 1])
def test_workers_of_a_failed_run_are_replaced(ranks: Ranks, rank: int) -> None:
    before = ranks(2, pid)

    with pytest.raises(RankFailure):
        ranks(2, raise_on, rank)

    assert not set(ranks(2, pid)) & set(before)


def test_killed_rank_is_named_with_its_last_words(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="rank 1 was killed by SIGKILL; rank 0 raised") as failure:
        ranks(2, kill_self_on, 1)

    assert "goodbye" in str(failure.value)
    assert failure.value.outcomes[1] == Died(signal.SIGKILL)


def test_expected_death_returns_what_the_survivors_saw(ranks: Ranks) -> None:
    bystander, survivor, victim = ranks(3, kill_self_on, 2, deaths={2: signal.SIGKILL})

    assert bystander == "not involved"
    assert survivor.type == "RuntimeError"
    assert victim == Died(signal.SIGKILL)


@pytest.mark.parametrize(
    ("deaths", "message"),
    [
        pytest.param({0}, "rank 1 was killed by SIGKILL", id="another-rank"),
        pytest.param(
            {1: signal.SIGTERM}, "expected to die: rank 1 by SIGTERM", id="another-signal"
        ),
        pytest.param({0, 1}, "expected to die: rank 0, rank 1", id="one-lives"),
    ],
)
def test_death_that_was_not_expected_is_a_failure(
    ranks: Ranks, deaths: set[int], message: str
) -> None:
    with pytest.raises(RankFailure, match=message):
        ranks(2, kill_self_on, 1, deaths=deaths)


def test_hang_is_reported_with_the_line_that_hangs_and_replaced(ranks: Ranks) -> None:
    before = ranks(2, pid)

    with pytest.raises(RankFailure, match=r"rank 1 did not finish within") as failure:
        ranks(2, sleep_on, 1, timeout_s=1.0)

    text = str(failure.value)
    assert "in sleep_here" in text
    assert "in barrier" in text
    assert "worker.py" not in text
    assert not set(ranks(2, pid)) & set(before)


def test_output_of_ranks_appears_in_the_callers(
    ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(2, print_rank)

    assert capsys.readouterr().out == "[rank 0] hello from 0\n[rank 1] hello from 1\n"


def test_result_that_cannot_be_pickled_is_an_error_of_the_rank(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        ranks(1, unpicklable)


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda: None, id="lambda"),
        pytest.param(dict, id="class"),
        pytest.param([].append, id="builtin-method"),
    ],
)
def test_function_without_a_name_in_a_file_is_refused(ranks: Ranks, fn: Any) -> None:
    with pytest.raises(TaskError, match="top level of a module"):
        ranks(1, fn)


@pytest.mark.parametrize("world_size", [0, 17, -1])
def test_world_size_out_of_range_is_refused(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world_size: got {world_size}"):
        run_ranks(world_size, pid)


def test_death_of_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"deaths: got ranks \[2\], expected 0 to 1"):
        run_ranks(2, pid, deaths={2})


def test_pool_restarts_after_close() -> None:
    pool = RankPool()
    first = pool.run(1, pid)
    pool.close()

    second = pool.run(1, pid)
    pool.close()

    assert first != second
    assert not _is_running(first[0])
    assert not _is_running(second[0])


_OWNER = """
import os, signal, sys
sys.path[:0] = {path!r}
from ds_core.testing import RankPool
from pool_functions import report_then_sleep
RankPool().run(2, report_then_sleep, sys.argv[1])
"""

_FUNCTIONS = """
import os, time
from pathlib import Path

def report_then_sleep(folder):
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
"""


def test_workers_end_with_the_process_that_owns_them(tmp_path: Path) -> None:
    (tmp_path / "pool_functions.py").write_text(_FUNCTIONS)
    source = _OWNER.format(path=[str(tmp_path), *sys.path])
    reports = [tmp_path / "0", tmp_path / "1"]
    with subprocess.Popen([sys.executable, "-c", source, str(tmp_path)]) as owner:
        _wait_until(lambda: all(report.exists() and report.read_text() for report in reports))
        owner.send_signal(signal.SIGKILL)

    pids = [int(report.read_text()) for report in reports]
    _wait_until(lambda: not any(_is_running(number) for number in pids))


def _is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.05)


def test_a_free_port_is_below_those_of_outgoing_connections_and_can_be_bound():
    ports = {free_port() for _ in range(20)}
    assert all(10_000 <= port < 32_768 for port in ports)
    assert len(ports) > 10
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports.pop()))
