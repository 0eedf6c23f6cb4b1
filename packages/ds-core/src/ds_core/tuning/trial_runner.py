"""Trials in processes of their own: one that runs out of memory or hangs ends only itself."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        step_s: median seconds of an optimizer step; None if it failed.
        reason: why it failed, empty if it did not.
        memory: bytes held between steps by kind.
        peak_bytes: the most that torch's allocator held on the device; 0 on a CPU.
    """

    step_s: float | None
    reason: str = ""
    memory: Mapping[str, int] | None = None
    peak_bytes: int = 0


@dataclass(frozen=True)
class TrialRunner:
    """Starts trials on this node.

    Attributes:
        target: MODULE:FUNCTION or FILE.py:FUNCTION that returns (model, batch).
        nproc: processes.
        warmup: steps before time is taken.
        folder: gets a folder per trial.
        timeout_s: after which a trial has failed.
    """

    target: str
    nproc: int
    warmup: int
    folder: Path
    timeout_s: float = 600.0

    def run(self, name: str, config: Mapping[str, Any], steps: int) -> Outcome:
        """Run one trial to its end; a failure is an outcome, not an error."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").unlink(missing_ok=True)
        task = {"target": self.target, "config": config, "warmup": self.warmup, "steps": steps}
        file = place / "trial.json"
        file.write_text(json.dumps(task, indent=2), encoding="utf-8")
        command = [sys.executable, "-m", "ds_core.cli", "run", "--nproc", str(self.nproc)]
        command += ["--log-dir", str(place / "logs"), "--timeout-s", str(self.timeout_s)]
        command += ["--tied-to-stdin", "--module", "ds_core.tuning.trial", str(file)]
        done = _run_tied(command)
        (place / "output.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        return _outcome(place / "result.json", done)


def _run_tied(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command whose stdin ends with this process, however that ends."""
    read, write = os.pipe()
    try:
        return subprocess.run(command, stdin=read, capture_output=True, text=True, check=False)
    finally:
        os.close(read)
        os.close(write)


def _outcome(result: Path, done: subprocess.CompletedProcess[str]) -> Outcome:
    found: dict[str, Any] = {}
    if result.exists():
        found = json.loads(result.read_text(encoding="utf-8"))
    if "failed" in found:
        return Outcome(None, found["failed"])
    if done.returncode != 0 or not found:
        return Outcome(None, _reason(done))
    step_s = statistics.median(found["seconds"])
    return Outcome(step_s, "", found["memory"], found["peak_bytes"])


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of the output that says most: the last error, else the last line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(":")[0]]
    told = (named or lines or ["no output"])[-1]
    return f"exit code {done.returncode}: {told}"
