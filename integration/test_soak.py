"""A sample of the soak's faults, and jobs whose ranks become fewer: the same losses go on."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_core.testing import Fault, free_port, run_ranks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
JOB = BENCHMARKS / "soak_job.py"
NUM_STEPS = 50


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    """The module `benchmarks/soak.py`."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("soak")
    finally:
        sys.path.remove(str(BENCHMARKS))


def ds_run(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ds_core.cli", "run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def told(folder: Path) -> list[dict[str, Any]]:
    """What the job noted of its steps."""
    path = folder / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def curve(folder: Path) -> list[float]:
    """Loss by step; of the last time, where it was done twice."""
    by_step = {line["step"]: line["loss"] for line in told(folder)}
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    return [by_step[step] for step in sorted(by_step)]


def run_job(arguments: list[str]) -> None:
    """The job in this process."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        importlib.import_module("soak_job").main(arguments)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one rank that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(1, run_job, [str(folder), "--steps", str(NUM_STEPS)], initialized=False)
    return curve(folder)


@pytest.fixture(scope="module")
def base(soak: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, float]]:
    """A folder with the run that is harmed, and the losses of one that is not."""
    folder = tmp_path_factory.mktemp("soak")
    soak.start_server()
    return folder, soak.reference(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_a_fault_of_the_soak_is_survived(
    soak: Any, base: tuple[Path, dict[int, float]], number: int
) -> None:
    folder, expected = base
    trial = replace(soak.plan(12, seed=11)[number], timeout_s=4.0)

    outcome = soak.run_trial(trial, folder, expected, name=str(number), goes_on=number % 6 == 0)

    assert not outcome.problems, outcome
    assert (len(outcome.attempts) > 1) == (number % 6 == 0)


def test_a_sample_has_every_kind_of_fault_and_every_home_of_states(soak: Any) -> None:
    sample = soak.plan(12, seed=11)
    assert {trial.fault.kind for trial in sample} == set(soak.KINDS)
    assert {trial.offload for trial in sample} == set(soak.OFFLOADS)
    assert {trial.asynchronous for trial in sample} == {False, True}
    assert all(trial.stage > 0 for trial in sample if trial.offload != "none")
    for trial in soak.plan(200, seed=11):
        assert trial.fault.kind != "swap error" or trial.offload == "nvme"
        assert trial.fault.kind != "stopped writer" or trial.asynchronous
    assert soak.plan(12, seed=11) == soak.plan(200, seed=11)[:12]


@pytest.mark.slow
def test_ranks_shrink_from_four_to_two_with_the_same_losses(
    tmp_path: Path, undisturbed: list[float]
) -> None:
    folder = tmp_path / "shrinking"
    folder.mkdir()
    faults = [Fault("kill", "backward", rank=3, step=5), Fault("kill", "step", rank=0, step=7)]
    words = [word for fault in faults for word in ("--fault", fault.to_json())]

    options = ("--nproc", "4", "--min-nproc", "2", "--max-restarts", "3")
    job = ds_run(*options, str(JOB), str(folder), "--timeout-s", "20", *words)
    output, _ = job.communicate(timeout=180)

    assert job.returncode == 0, output
    assert {(line["attempt"], line["ranks"]) for line in told(folder)} == {(0, 4), (1, 3), (2, 2)}
    assert curve(folder) == pytest.approx(undisturbed[:8], abs=1e-4)


@pytest.mark.slow
def test_elastic_job_goes_on_when_a_node_is_lost(tmp_path: Path, undisturbed: list[float]) -> None:
    folder = tmp_path / "nodes"
    folder.mkdir()
    endpoint = f"localhost:{free_port()}"
    quick = ("last_call_timeout=1", "keep_alive_interval=1", "keep_alive_max_attempt=5")
    conf = [word for setting in quick for word in ("--rdzv-conf", setting)]
    words = ["--nnodes", "1:2", "--nproc", "1", "--rdzv-endpoint", endpoint, *conf]
    words += ["--local-addr", "localhost", "--max-restarts", "3"]
    words += [str(JOB), str(folder), "--steps", str(NUM_STEPS), "--timeout-s", "20"]
    # The first holds the rendezvous: on one machine either could, and the second is killed.
    nodes = [
        ds_run("--rdzv-conf", f"is_host={int(is_first)}", *words) for is_first in (True, False)
    ]
    try:
        deadline = time.monotonic() + 90
        while not any(
            line["ranks"] == 2 and line["step"] < NUM_STEPS - 10 for line in told(folder)
        ):
            assert time.monotonic() < deadline, "the nodes did not train together"
            time.sleep(0.01)

        nodes[1].send_signal(signal.SIGKILL)
        output, _ = nodes[0].communicate(timeout=120)
    finally:
        for node in nodes:
            node.kill()
            node.communicate()

    assert nodes[0].returncode == 0, output
    assert told(folder)[-1]["ranks"] == 1
    assert curve(folder) == pytest.approx(undisturbed, abs=1e-4)
