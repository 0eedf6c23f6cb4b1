"""transformers' Trainer on our `deepspeed` and on the original, each in its own environment.

Both run alive together and take turns step by step, in an order that rotates; a ratio is the median
over turns of the quotient within the turn. `nox -s integrations` makes the two environments; the
variables OURS_PYTHON and ORIGINAL_PYTHON name the interpreters of others.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import tempfile
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

from ds_core.testing import free_port
from import_time import PROBE
from report import Check, Report, main, median

ROOT = Path(__file__).parent.parent
STEP_LIMIT, IMPORT_LIMIT = 0.75, 1 / 3
WARMUP = 3
STANDARD = {"width": 256, "layers": 6, "vocabulary": 4096, "tokens": 128, "micro_batch": 4}
QUICK = {"width": 128, "layers": 2, "vocabulary": 1024, "tokens": 64, "micro_batch": 2}
ZERO: dict[int, dict[str, Any]] = {
    2: {"stage": 2, "reduce_bucket_size": "auto"},
    3: {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


@dataclass
class Side:
    """One of the two environments: its interpreter, and the variables of its processes."""

    name: str
    python: str
    variables: dict[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Of a process: offline, one thread, nothing of the environment that measures."""
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = os.pathsep.join([str(Path(self.python).parent), kept["PATH"]])
        own = {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return kept | own | self.variables


def sides() -> tuple[Side, Side]:
    """Ours and the original. Raises SystemExit if an environment is missing."""
    found = []
    for name, variable, folder in (
        ("ours", "OURS_PYTHON", "integrations"),
        ("original", "ORIGINAL_PYTHON", "original"),
    ):
        python = os.environ.get(variable, str(ROOT / ".nox" / folder / "bin" / "python"))
        if not Path(python).exists():
            raise SystemExit(
                f"{python} is not there: run `nox -s integrations`, or name an interpreter in "
                f"{variable}"
            )
        found.append(Side(name, python))
    ours, original = found
    if ours_path := os.environ.get("OURS_PYTHONPATH"):
        ours.variables["PYTHONPATH"] = ours_path
    # Its way to a CPU, and to shared memory between the ranks of one machine.
    original.variables = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    return ours, original


class Pair:
    """Two ranks of a Trainer in one environment, waiting for their turns."""

    def __init__(self, side: Side, stage: int, shape: dict[str, int], steps: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        config = folder / "ds_config.json"
        batch = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
        auto = dict.fromkeys((*batch, "gradient_accumulation_steps"), "auto")
        config.write_text(json.dumps({**auto, "zero_optimization": ZERO[stage]}))
        key = secrets.token_hex(8)
        port = str(free_port())
        with Listener(("127.0.0.1", 0), authkey=key.encode()) as listener:
            address = ":".join(map(str, listener.address))
            command = [
                *(side.python, str(Path(__file__).with_name("trainer_job.py"))),
                *("--address", address, "--deepspeed", str(config), "--steps", str(steps)),
                *("--shape", json.dumps(shape), "--out", str(folder)),
            ]
            self._log = (folder / "log.txt").open("w")
            ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TURNS_KEY": key}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._processes = [
                subprocess.Popen(
                    command,
                    env=side.environment() | ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                )
                for rank in range(2)
            ]
            self._lines: list[Connection] = [listener.accept() for _ in range(2)]
        for line in self._lines:
            line.recv()

    def step(self) -> tuple[float, float]:
        """Seconds of the slower rank, and the loss."""
        for line in self._lines:
            line.send("go")
        try:
            answers = [line.recv() for line in self._lines]
        except EOFError:
            self._log.flush()
            raise SystemExit(Path(self._log.name).read_text()[-4000:]) from None
        return max(seconds for seconds, _ in answers), answers[0][1]

    def __enter__(self) -> Pair:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            process.wait()
        self._log.close()
        self._folder.cleanup()


def measure(stage: int, shape: dict[str, int], steps: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, loss) of each turn of each side."""
    ours, original = sides()
    took: dict[str, list[tuple[float, float]]] = {ours.name: [], original.name: []}
    with Pair(ours, stage, shape, steps) as a, Pair(original, stage, shape, steps) as b:
        pairs = [(ours.name, a), (original.name, b)]
        for turn in range(steps):
            for name, pair in pairs if turn % 2 else reversed(pairs):
                took[name].append(pair.step())
    return took


def imports(turns: int) -> dict[str, list[float]]:
    """Seconds that `import deepspeed` adds to `import torch`, the sides taking turns."""
    found: dict[str, list[float]] = {}
    for turn in range(turns + 1):
        for side in sides():
            done = subprocess.run(
                [side.python, "-W", "ignore", "-c", PROBE, "deepspeed"],
                env=side.environment(),
                check=True,
                capture_output=True,
                text=True,
            )
            if turn:  # the first one may have to compile
                added = json.loads(done.stdout.splitlines()[-1])[1]
                found.setdefault(side.name, []).append(added)
    return found


def run(quick: bool = False) -> Report:
    """Time of a Trainer's step and of the import, beside the original's."""
    shape, steps = (QUICK, 8) if quick else (STANDARD, 25 + WARMUP)
    report = Report(
        "trainer_step",
        "transformers' Trainer on `import deepspeed`: ours and the original, two gloo ranks",
        ["what", "ours", "original", "ours / original", "largest difference of losses"],
    )
    for stage in ZERO:
        took = measure(stage, shape, steps)
        mine, other = ([each[0] for each in took[name][WARMUP:]] for name in took)
        ratio = median(a / b for a, b in zip(mine, other, strict=True))
        losses = zip(*([each[1] for each in series] for series in took.values()), strict=True)
        apart = max(abs(a - b) for a, b in losses)
        row = [f"a step at stage {stage}", f"{median(mine):.3f} s", f"{median(other):.3f} s"]
        report.rows.append([*row, f"{ratio:.3f}", f"{apart:.1e}"])
        report.checks.append(Check(f"stage {stage}: time / original's", ratio, STEP_LIMIT))
        report.raw[f"stage {stage}"] = took
    added = imports(3 if quick else 10)
    mine, other = added["ours"], added["original"]
    ratio = median(a / b for a, b in zip(mine, other, strict=True))
    row = ["`import deepspeed` over `import torch`", f"{median(mine):.3f} s"]
    report.rows.append([*row, f"{median(other):.3f} s", f"{ratio:.3f}", "-"])
    report.checks.append(Check("import: time / original's", ratio, IMPORT_LIMIT))
    report.raw["import"] = added
    report.notes.append(
        f"A random Llama of {shape['layers']} layers of width {shape['width']}, "
        f"{shape['micro_batch']} x {shape['tokens']} tokens per rank, fp32, AdamW of torch; "
        f"{steps} steps, the first {WARMUP} not counted. What transformers and "
        f"accelerate do themselves is on both sides."
    )
    return report


if __name__ == "__main__":
    main(run)
