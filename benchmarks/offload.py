"""Models larger than memory: what fits under a cap, and how fast the disk is used.

*Capacity*: the largest GPT that trains with full Adam in a process that may have so many bytes of
private memory (RLIMIT_DATA), found by bisection over its depth; fp32, one rank, one thread, no
disk, units updated in backward, no clipping. The limit for fp32 parameters and two fp32 moments
is cap / 12 bytes. DeepSpeed's peer is ZeRO-Offload at stage 2 with buckets of 2^24 elements.

*Disk*: three times as many parameters under the same cap, in bf16 with master weights and moments
on disk; the peak of resident memory, and the bytes swapped in a step.

*Rate*: bytes that `update()` reads and writes per second, beside fio with mixed reads and writes on
the same file system, with the same block and depth, in turns.

*Step*: a stage-3 step with parameters and states on disk beside DeepSpeed's, in turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from models import num_parameters
from offload_trial import Trial
from report import Check, Report, main, median, mib

CAP = 4 << 30
LIMIT_S = 900
BLOCK, DEPTH = 1 << 20, 32


class OutOfMemoryError(RuntimeError):
    """A trial needed more than its cap."""


def run(quick: bool = False) -> Report:
    """Measure everything; quick: a cap of 2 GiB."""
    cap = CAP // 2 if quick else CAP
    report = Report(
        "offload",
        f"Offload: full Adam under {cap >> 30} GiB, and on disk",
        ["what", "parameters", "of cap / 12 B", "peak", "s per step", "swapped per step"],
    )
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="offload_") as folder:
        largest = _capacity(report, cap)
        _on_disk(report, cap, largest, folder)
        _rate(report, folder, quick)
        _step(report, folder, quick)
    return report


def _capacity(report: Report, cap: int) -> int:
    """The largest depth that ours trains."""
    ours = _largest(Trial("ours", 1, cap=cap, early=True))
    theirs = _largest(Trial("deepspeed", 1, cap=cap))
    numel = [num_parameters(trial.shape) for trial in (ours, theirs)]
    for trial, told in ((ours, "no disk"), (theirs, "DeepSpeed ZeRO-Offload")):
        _add_row(report, told, trial, _trial(trial))
    fraction, ratio = numel[0] * 12 / cap, numel[0] / numel[1]
    report.checks.append(Check("parameters / (cap / 12)", fraction, 1.0, least=0.84))
    report.checks.append(Check("parameters / DeepSpeed's", ratio, float("inf"), least=1.5))
    return ours.depth


def _largest(trial: Trial) -> Trial:
    """The deepest model that trains; `trial` with that depth."""
    low, high = 1, 2
    while _fits(replace(trial, depth=high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _fits(replace(trial, depth=middle)) else (low, middle)
    return replace(trial, depth=low)


@cache
def _fits(trial: Trial) -> bool:
    try:
        _trial(trial)
    except OutOfMemoryError:
        return False
    return True


@cache
def _trial(trial: Trial) -> dict[str, Any]:
    """Run a trial in a process of its own.

    Raises OutOfMemoryError if it ended for want of memory, RuntimeError with its output otherwise.
    """
    done = _process(trial)
    for left in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"):
        left.unlink(missing_ok=True)  # DeepSpeed leaves 66 MiB of memory behind at each start
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    signs = ("allocate memory", "MemoryError", "cannot hold its part of the model")
    if any(sign in done.stderr for sign in signs):
        raise OutOfMemoryError(done.stderr[-500:])
    raise RuntimeError(f"{trial}: exit status {done.returncode}\n{done.stderr[-3000:]}")


def _process(trial: Trial, *flags: str) -> subprocess.CompletedProcess[str]:
    """A trial in a process of its own, which has ended."""
    script = Path(__file__).with_name("offload_trial.py")
    command = [sys.executable, str(script), json.dumps(asdict(trial)), *flags]
    environment = _environment(trial.cap)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False
    )


def _environment(cap: int) -> dict[str, str]:
    """One thread; under a cap memory that is freed goes back, as docs/guides/offload.md advises."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return {**found, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if cap else found


def _add_row(report: Report, told: str, trial: Trial, found: dict[str, Any]) -> None:
    part = found["parameters"] * 12 / trial.cap if trial.cap else None
    report.rows.append(
        [
            told,
            f"{found['parameters'] / 1e6:.0f} M",
            f"{part:.2f}" if part else "",
            mib(found["peak"]),
            f"{found['seconds']:.2f}",
            mib(found["swapped"]) if found["swapped"] else "",
        ]
    )


def _on_disk(report: Report, cap: int, depth: int, folder: str) -> None:
    trial = Trial(
        "ours",
        3 * depth,
        states="nvme",
        dtype="bf16",
        cap=cap,
        early=True,
        folder=folder,
    )
    found = _trial(trial)
    _add_row(report, "states on disk, bf16", trial, found)
    per_parameter = found["swapped"] / found["parameters"]
    report.checks += [
        Check("on disk: peak / cap", found["peak"] / cap, 1.0),
        Check("on disk: bytes swapped per parameter", per_parameter, 24.1, least=24.0),
    ]


def _rate(report: Report, folder: str, quick: bool) -> None:
    """GB/s of updates beside fio's, in turns."""
    if shutil.which("fio") is None:
        report.notes.append("fio is not installed: the rate of the disk was not measured")
        return
    trial = Trial("ours", 6 if quick else 12, states="nvme", folder=folder, dtype="bf16")
    ours, floors = [], []
    for _ in range(3 if quick else 5):
        floors.append(max(_fio(folder, engine) for engine in ("io_uring", "libaio")))
        ours.append(_update_rate(trial))
    pairs = zip(ours, floors, strict=True)
    shown = ", ".join(f"{rate / 1e9:.2f} of {floor / 1e9:.2f}" for rate, floor in pairs)
    report.notes.append(f"optimizer I/O, GB/s read and written, of fio's: {shown}")
    report.checks.append(
        Check("optimizer I/O / fio", median(ours) / median(floors), float("inf"), least=0.9)
    )


def _update_rate(trial: Trial) -> float:
    """Bytes per second that the updates of a run read and write: the best step's."""
    done = _process(trial, "--update-only")
    done.check_returncode()
    return float(json.loads(done.stdout.splitlines()[-1])["rate"])


def _fio(folder: str, engine: str) -> float:
    """Bytes per second of mixed sequential reads and writes around the page cache."""
    command = ["fio", "--name=offload", f"--filename={folder}/fio.bin", "--size=2G"]
    command += [f"--ioengine={engine}", "--rw=rw", "--direct=1", f"--bs={BLOCK}"]
    command += [f"--iodepth={DEPTH}", "--runtime=4", "--time_based", "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return 0.0
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])


def _step(report: Report, folder: str, quick: bool) -> None:
    """A stage-3 step with states on disk, beside DeepSpeed's, whose default for parameters it has.

    That is to keep 10**9 elements of them in memory; with none there it runs out of its buffers.
    """
    depth = 4 if quick else 8
    kinds = {"stage": 3, "states": "nvme", "parameters": "nvme", "dtype": "bf16", "steps": 5}
    kinds["most_in_cpu"] = 10**9
    quotients = []
    try:
        for turn in range(2 if quick else 3):
            # The field tells the turns apart, or the second would be the first's result.
            turned = Trial("ours", depth, folder=f"{folder}/{turn}", **kinds)
            ours = _trial(turned)
            theirs = _trial(replace(turned, name="deepspeed"))
            quotients.append(ours["seconds"] / theirs["seconds"])
    except RuntimeError as error:
        report.notes.append(f"DeepSpeed's NVMe step was not measured: {str(error)[-300:]}")
        return
    everything = replace(turned, most_in_cpu=0, folder=f"{folder}/all")
    _add_row(report, "stage 3, all on disk", everything, _trial(everything))
    _add_row(report, "stage 3, states on disk", turned, ours)
    _add_row(report, "the same, DeepSpeed", turned, theirs)
    report.checks.append(Check("NVMe step / DeepSpeed's", median(quotients), 0.7))


if __name__ == "__main__":
    main(run)
