"""One trial of the soak: a run is harmed, what its ranks say is read, and it has to go on.

First without a launcher, so that nobody ends a rank but itself: every survivor must end with an
error that names the cause. Then the same fault under `ds run --max-restarts`, which must finish by
itself, on as many ranks or on fewer, with the losses of a run that nothing happened to.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import soak_job
from ds_core import checkpoint
from ds_core.errors import CheckpointError
from ds_core.testing import free_port
from ds_core.testing.faults import DAMAGES, Fault, Strike, small_disk

JOB = Path(soak_job.__file__)
STEPS, BASE_STEPS, TOLERANCE = 8, 4, 1e-4
#: Beyond the timeout of a collective: two questions to the store, the roll call, the error's text.
SLACK_S = 20.0
#: A run of eight tiny steps, with its start, on a machine that has other work.
RUN_S = 180.0
DISK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Trial:
    """A fault and the run that it befalls.

    Attributes:
        num_ranks: before the fault.
        stage: of ZeRO.
        min_ranks: with how few `ds run` may go on; `num_ranks` to keep them all.
        checks: whether collectives are compared across ranks.
        own_store: whether rank 0 holds the rendezvous store, as under MPI; else this process does,
            as the agent of `ds run`.
        offload: where states live, one of `soak_job.OFFLOADS`.
        asynchronous: whether checkpoints are written by a thread.
        timeout_s: after which a collective that cannot complete is an error.
    """

    fault: Fault
    num_ranks: int
    stage: int
    min_ranks: int
    checks: bool
    own_store: bool = False
    offload: str = "none"
    asynchronous: bool = False
    timeout_s: float = 5.0


@dataclass
class Outcome:
    """What came of a trial; `problems` is empty if all was as it must be."""

    trial: Trial
    where: str = ""
    error_s: float = 0.0
    said: dict[int, str] = field(default_factory=dict)
    newest: str = ""
    attempts: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def start_server() -> None:
    """Have processes that have imported everything stand by to be forked into ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch.distributed.checkpoint", "torch.distributed.nn.functional", "torch._dynamo",
            "ds_core.assembly", "ds_core.checkpoint", "ds_core.config.sections", "ds_core.data",
            "ds_core.decisions", "ds_core.engine_state", "ds_core.lr_schedules",
            "ds_core.observers", "ds_core.profiling", "ds_core.tracing", "ds_zero",
        ]
    )  # fmt: skip


def reference(folder: Path) -> dict[int, float]:
    """Losses by step of a run that nothing happens to; leaves `BASE_STEPS` of it in `folder/base`.

    On one rank: that any number of ranks gives the same is a part of what is tested.
    """
    base = folder / "base"
    for steps in (BASE_STEPS, STEPS):
        target = base if steps == BASE_STEPS else folder / "whole"
        if steps == STEPS:
            shutil.copytree(base, target)
        target.mkdir(parents=True, exist_ok=True)
        ended = _Ranks(1, target, ["--steps", str(steps), "--stage", "0"]).wait(RUN_S)
        if ended != {0: 0}:
            raise RuntimeError(f"the run without a fault failed: {_words(target, 0)}")
    return _losses(folder / "whole")


def run_trial(
    trial: Trial, folder: Path, expected: dict[int, float], *, name: str, goes_on: bool
) -> Outcome:
    """Harm a run that goes on from `folder/base`, in folders of its own within `folder`.

    name: of the trial, for its folders.
    goes_on: whether `ds run` is tried as well.
    """
    # On a machine that is busy for seconds, ranks give up on one another before the fault strikes.
    for timeout_s in (trial.timeout_s, 3 * trial.timeout_s, 9 * trial.timeout_s):
        trial = replace(trial, timeout_s=timeout_s)
        outcome = Outcome(trial)
        with _job_folder(trial, folder, f"{name}-alone") as (place, options):
            has_struck = _run_alone(trial, place, options, expected, outcome)
            _check_newest(place / "checkpoints", trial.fault, outcome)
        if has_struck:
            break
    if goes_on:
        with _job_folder(trial, folder, f"{name}-launched") as (place, options):
            _run_launched(trial, place, options, expected, outcome)
    return outcome


# --- A folder to run in ---------------------------------------------------------------------------


@contextmanager
def _job_folder(trial: Trial, folder: Path, name: str) -> Iterator[tuple[Path, list[str]]]:
    """A copy of the base run, harmed if the fault befalls a file, and the job's options."""
    place, fault = folder / name, trial.fault
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in (folder / "base").glob("*.json*"):
        shutil.copy(path, place)
    (place / "checkpoints").mkdir()
    options = ["--steps", str(STEPS), "--stage", str(trial.stage)]
    options += ["--timeout-s", str(trial.timeout_s), "--fault", fault.to_json()]
    options += ["--offload", trial.offload, *["--asynchronous"] * trial.asynchronous]
    options += ["--checks"] * trial.checks
    with _disk(place / "checkpoints", is_small=fault.kind == "full disk") as is_small:
        options += ["--fills-disk"] * is_small
        shutil.copytree(folder / "base" / "checkpoints", place / "checkpoints", dirs_exist_ok=True)
        if fault.kind in DAMAGES:
            damaged = fault.damage(checkpoint.find(place / "checkpoints"))
            (place / "damaged").write_text(damaged.name)
        yield place, options
    shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _disk(folder: Path, *, is_small: bool) -> Iterator[bool]:
    if not is_small:
        yield False
        return
    with small_disk(folder, DISK_BYTES) as is_mounted:
        yield is_mounted


# --- Without a launcher ---------------------------------------------------------------------------


def _run_alone(
    trial: Trial, place: Path, options: list[str], expected: dict[int, float], outcome: Outcome
) -> bool:
    """Run and judge; returns whether the fault has struck."""
    fault = trial.fault
    begun = time.monotonic()
    ranks = _Ranks(trial.num_ranks, place, options, own_store=trial.own_store)
    is_silenced = fault.kind in ("kill", "stop", "stuck loader", "stopped writer")
    survivors = set(range(trial.num_ranks)) - ({fault.rank} if is_silenced else set())
    codes = ranks.wait(RUN_S, survivors, place / "strike.json", trial.timeout_s + SLACK_S)
    ended = time.monotonic()
    ranks.end()
    strike = Strike.read(place / "strike.json")
    if fault.kind in DAMAGES:
        outcome.where, outcome.error_s = (place / "damaged").read_text(), ended - begun
    elif strike is None:
        said = {rank: _words(place, rank) for rank in range(trial.num_ranks)}
        outcome.problems.append(f"the fault did not strike; exit codes {codes}, said {said}")
        return False
    else:
        outcome.where, outcome.error_s = strike.where, ended - strike.at_s
    is_harmless = fault.kind in DAMAGES and _is_noticed(place) and not _differences(place, expected)
    for rank in sorted(survivors):
        outcome.said[rank] = _words(place, rank)
        if rank not in codes:
            outcome.problems.append(f"rank {rank} hung for {outcome.error_s:.0f} s")
        elif codes[rank] == 0 and is_harmless:
            outcome.said[rank] = "nothing: the damage is to bytes that loading does not use"
        elif codes[rank] == 0:
            outcome.problems.append(f"rank {rank} ended as if nothing had happened")
        elif trial.own_store and rank and "and so did the rendezvous store" in outcome.said[rank]:
            continue  # it points to rank 0, which held the store and has to say more
        elif not _names_cause(fault, outcome.where, outcome.said[rank]):
            outcome.problems.append(
                f"rank {rank} (exit code {codes[rank]}) does not name the cause: "
                f"{outcome.said[rank] or 'nothing said'}"
            )
    return True


def _is_noticed(place: Path) -> bool:
    """Whether `verify` names the damaged file."""
    try:
        checkpoint.verify(place / "checkpoints", f"step{BASE_STEPS}")
    except CheckpointError as error:
        return (place / "damaged").read_text() in str(error)
    return False


def _names_cause(fault: Fault, where: str, words: str) -> bool:
    """Whether an error says which rank or file it was, and what befell it."""
    if fault.kind in DAMAGES:
        return where in words or (where == "index.json" and "not complete" in words)
    if fault.kind == "full disk":
        return "No space left on device" in words or "File too large" in words
    is_named = re.search(rf"\branks? (\d+, )*{fault.rank}\b", words) is not None
    if fault.kind == "stuck loader":
        return is_named and "loader" in words
    if fault.kind == "swap error" and ".swap" in words:
        return True  # the rank whose disk it is; others hear that it stopped answering
    if fault.kind == "wrong shape":
        return is_named and "[4]" in words
    return is_named and "stopped answering" in words


class _Ranks:
    """Processes that run the job without a launcher, each with files for what it says."""

    def __init__(
        self, num_ranks: int, place: Path, options: list[str], *, own_store: bool = False
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        port, self._store = free_port(), None
        if not own_store:
            self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            port = self._store.port
        self._processes: list[Any] = []
        for rank in range(num_ranks):
            environ = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks,
                "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
                "TORCHELASTIC_USE_AGENT_STORE": not own_store,
            }  # fmt: skip
            arguments = (place, rank, {k: str(v) for k, v in environ.items()}, options)
            process = context.Process(target=_be_rank, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)

    def wait(
        self,
        most_s: float,
        whom: set[int] | None = None,
        strike: Path | None = None,
        after_strike_s: float = 0.0,
    ) -> dict[int, int]:
        """Exit codes by rank, once all of `whom` have ended or their time is up.

        The time is `most_s`, or `after_strike_s` from when the file `strike` appears.
        """
        whom = set(range(len(self._processes))) if whom is None else whom
        deadline, has_struck = time.monotonic() + most_s, False
        while time.monotonic() < deadline:
            if all(self._processes[rank].exitcode is not None for rank in whom):
                break
            if strike is not None and not has_struck and strike.exists():
                deadline, has_struck = time.monotonic() + after_strike_s, True
            time.sleep(0.02)
        codes = {rank: process.exitcode for rank, process in enumerate(self._processes)}
        return {rank: code for rank, code in codes.items() if code is not None}

    def end(self) -> None:
        """Kill those that are left, as a launcher would."""
        for process in self._processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()


def _be_rank(place: Path, rank: int, environ: dict[str, str], options: list[str]) -> None:
    """Become a rank of the job: its environment, its output files."""
    os.environ.update(environ)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(place / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    soak_job.main([str(place), *options])


def _words(place: Path, rank: int) -> str:
    """The message of the error that a rank ended with, or the end of what it said."""
    path = place / f"rank{rank}.err"
    return last_error(path.read_text(errors="replace") if path.exists() else "")


def last_error(text: str) -> str:
    """From the line that names the last exception on; the last lines if there is none."""
    lines = text.strip().splitlines()
    named = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return " ".join(lines[named[-1] :] if named else lines[-3:])


# --- Under ds run ---------------------------------------------------------------------------------


def _run_launched(
    trial: Trial, place: Path, options: list[str], expected: dict[int, float], outcome: Outcome
) -> None:
    command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", str(trial.num_ranks)]
    command += ["--max-restarts", "3", "--log-dir", str(place / "logs")]
    if trial.min_ranks < trial.num_ranks:
        command += ["--min-nproc", str(trial.min_ranks)]
    command += [str(JOB), str(place), *options]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environ, timeout=RUN_S
        )
    except subprocess.TimeoutExpired:
        outcome.problems.append(f"ds run did not end within {RUN_S:.0f} s")
        return
    if done.returncode != 0:
        said = done.stderr.strip()[-1500:]
        outcome.problems.append(f"ds run ended with {done.returncode}: {said}")
        return
    lines = [json.loads(line) for line in (place / "losses.jsonl").read_text().splitlines()]
    outcome.attempts = [trial.num_ranks]
    by_attempt = {line["attempt"]: line["ranks"] for line in lines if line["attempt"] > 0}
    outcome.attempts += [by_attempt[attempt] for attempt in sorted(by_attempt)]
    if not by_attempt:
        outcome.problems.append("ds run did not start the job again")
    outcome.problems += _differences(place, expected)


def _differences(place: Path, expected: dict[int, float]) -> list[str]:
    """In what the losses of a run differ from those of the undisturbed one."""
    found = _losses(place)
    if found.keys() != expected.keys():
        return [f"steps {sorted(found)} of {sorted(expected)} were done"]
    return [
        f"loss of step {step}: {loss}, undisturbed {expected[step]}"
        for step, loss in found.items()
        if abs(loss - expected[step]) > TOLERANCE
    ]


def _losses(place: Path) -> dict[int, float]:
    """Loss by step; the last one told, where a step was done again."""
    lines = [json.loads(line) for line in (place / "losses.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


# --- Checkpoints ----------------------------------------------------------------------------------


def _check_newest(checkpoints: Path, fault: Fault, outcome: Outcome) -> None:
    """The newest complete checkpoint has the bytes that were saved."""
    try:
        if fault.kind in DAMAGES:
            tag = checkpoint.newest_intact(checkpoints)
        else:
            tag = checkpoint.latest(checkpoints)
        checkpoint.verify(checkpoints, tag)
        weights = checkpoint.full_state_dict(checkpoints, tag)
        found = soak_job.digest({name: weights[name] for name in weights})
    except CheckpointError as error:
        outcome.problems.append(f"the newest complete checkpoint does not load: {error}")
        return
    saved = json.loads((checkpoints.parent / f"digest-{tag}.json").read_text())
    outcome.newest = tag
    if found != saved:
        outcome.problems.append(f"checkpoint {tag!r} is not what was saved")
