"""The README's main job, killed at will: it resumes on other ranks with the same loss curve."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_core.testing import run_ranks

GPT = Path(__file__).parent.parent / "examples" / "gpt"
TEXT = [argparse.__file__, inspect.__file__]
NUM_STEPS, SAVE_EVERY = 90, 10
RUN = ("--steps", str(NUM_STEPS), "--eval-every", "500", "--eval-windows", "8")
QUICK = (*RUN, "--save-every", str(SAVE_EVERY), "--sample-tokens", "2")
NEW = ("--size", "tiny", "--seq-tokens", "32", "--vocab", "400", "--data", *TEXT)


def train_in_rank(arguments: list[str]) -> int:
    """`train.py ARGUMENTS` in this process; returns its exit code."""
    sys.path.insert(0, str(GPT))
    try:
        return int(importlib.import_module("train").main(arguments))
    finally:
        sys.path.remove(str(GPT))


def curve(out: Path) -> list[float]:
    """Loss of each step; of the last time, where it was done twice."""
    by_step: dict[int, float] = {}
    for text in (out / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["event"] == "step":
            by_step[line["step"]] = line["loss"]
    assert sorted(by_step) == list(range(1, NUM_STEPS + 1))
    return [by_step[step] for step in sorted(by_step)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds all runs; the README's config, in fp32, with a batch for three ranks as well.

    And the same with all of ZeRO-3's state on disk.
    """
    folder = tmp_path_factory.mktemp("runs")
    settings = json.loads((GPT / "zero2.json").read_text())
    settings["bf16"]["enabled"] = False
    settings["train_batch_size"] = 12
    (folder / "config.json").write_text(json.dumps(settings))
    disk = {"device": "nvme", "nvme_path": str(folder / "disk")}
    zero = {"stage": 3, "offload_optimizer": disk, "offload_param": {**disk, "max_in_cpu": 0}}
    offloaded = {**settings, "zero_optimization": zero}
    (folder / "offload.json").write_text(json.dumps(offloaded))
    return folder


def options(folder: Path, out: Path, config: str = "config.json") -> list[str]:
    return ["--config", str(folder / config), "--out", str(out), *QUICK]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[float]:
    """The loss curve of a run on two ranks that nothing happens to."""
    out = folder / "undisturbed"
    assert run_ranks(2, train_in_rank, [*options(folder, out), *NEW], initialized=False) == [0, 0]
    return curve(out)


def start(
    folder: Path, out: Path, *launch_options: str, config: str = "config.json"
) -> subprocess.Popen[str]:
    """The README's command in the background."""
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", "2", *launch_options]
    return subprocess.Popen(
        [*command, str(GPT / "train.py"), *options(folder, out, config), *NEW],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_step(out: Path, step: int, job: subprocess.Popen[str]) -> None:
    """Return once a run has done that many steps."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "the job has not come that far"
        time.sleep(0.005)


def rank_processes(job: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks: the children of the launcher that run the script."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "config", "goes_on"),
    [
        ("rank", "config.json", ((1, "config.json"), (3, "offload.json"))),
        ("launcher", "offload.json", ((4, "config.json"), (1, "offload.json"))),
    ],
    ids=["kill-a-rank", "kill-the-launcher-of-a-run-on-disk"],
)
def test_killed_run_resumes_on_other_ranks_with_the_same_losses(
    folder: Path,
    undisturbed: list[float],
    victim: str,
    config: str,
    goes_on: tuple[tuple[int, str], ...],
) -> None:
    out = folder / f"killed-{victim}"
    job = start(folder, out, config=config)
    wait_for_step(out, 2 * SAVE_EVERY + 5, job)

    os.kill(rank_processes(job)[1] if victim == "rank" else job.pid, signal.SIGKILL)
    told, _ = job.communicate(timeout=60)

    if victim == "rank":
        assert job.returncode == 128 + signal.SIGKILL
        assert "rank 1 failed first: killed by SIGKILL" in told
    for ranks, its_config in goes_on:
        resumed = folder / f"{victim}-on-{ranks}"
        shutil.copytree(out, resumed)
        command = [*options(folder, resumed, its_config), "--resume"]
        codes = run_ranks(ranks, train_in_rank, command, initialized=False, timeout_s=120)
        assert codes == [0] * ranks
        assert curve(resumed) == pytest.approx(undisturbed, abs=1e-4)


@pytest.mark.slow
def test_killed_run_goes_on_by_itself(folder: Path, undisturbed: list[float]) -> None:
    out = folder / "restarted"
    job = start(folder, out, "--max-restarts", "2", "--min-nproc", "1")
    wait_for_step(out, SAVE_EVERY + 5, job)

    os.kill(rank_processes(job)[0], signal.SIGKILL)
    told, _ = job.communicate(timeout=120)

    assert job.returncode == 0, told
    assert "attempt 2 of at most 3 begins with 1 process" in told
    assert curve(out) == pytest.approx(undisturbed, abs=1e-4)
