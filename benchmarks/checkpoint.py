"""What a checkpoint costs: how long training waits for one, and how fast it is written.

Each rank trains a GPT at ZeRO stage 2. In turns that follow one another: some plain steps; an
asynchronous save and as many steps while it is written; torch's own `async_save` of tensors of the
same sizes; a save that training waits for; and a plain file of the same bytes, written and synced.

What training waits for is told without the copy to host memory, which no snapshot can do without:
ours tells how long its copy took, and from torch's call a bare copy of the same tensors is taken.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from models import QUICK, STANDARD, Shape, batches, make_gpt
from ranks import Ranks
from report import Check, Report, main, median, mib

#: Of a step: what an asynchronous save may make training wait, beyond the copy.
STALL_LIMIT = 0.05
#: Of the rate of a plain file: what a save must reach.
RATE_LIMIT = 0.9
_PIECE_BYTES = 16 * 1024 * 1024


class Worker:
    """Trains and saves in one rank."""

    def __init__(self, rank: int, world_size: int, shape: Shape, folder: str) -> None:
        import ds_core

        config = {
            "train_micro_batch_size_per_gpu": shape.micro_batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
            "zero_optimization": {"stage": 2},
            "progress": False,
        }
        self._rank, self._folder = rank, Path(folder)
        self._engine = ds_core.initialize(make_gpt(shape), config)
        self._batches = batches(shape, rank)
        self._count = 0
        self.steps(2)
        self._same: dict[str, torch.Tensor] = {}
        self._group = dist.new_group(backend="gloo")  # the thread of async_save needs its own

    def steps(self, count: int) -> list[float]:
        """Seconds of each of some steps."""
        return [_timed(self._step) for _ in range(count)]

    def _step(self) -> None:
        self._engine.backward(self._engine(*next(self._batches)))
        self._engine.step()

    def save_and_train(self, steps: int) -> dict[str, float]:
        """An asynchronous save, and steps while it is written."""
        self._new_folder()
        taken = _timed(lambda: self._engine.save_checkpoint(self._folder, asynchronous=True))
        pending = self._engine._pending
        meanwhile = 0.0
        count = 0
        while not self._all_done(pending.done) and count < steps:
            meanwhile += sum(self.steps(1))
            count += 1
        self._engine.wait_for_checkpoint()
        figures = pending.figures
        return {
            "call": taken,
            "copy": figures.copy_s,
            "write": figures.write_s,
            "bytes": figures.copied_bytes,
            "step": meanwhile / max(count, 1),
        }

    def torch_save_and_train(self, steps: int) -> dict[str, float]:
        """The same with torch's `async_save`, of tensors of the same sizes named by rank."""
        self._new_folder()
        state = self._tensors()
        twins = {name: torch.empty_like(tensor) for name, tensor in state.items()}
        copy = lambda: [twins[name].copy_(tensor) for name, tensor in state.items()]  # noqa: E731
        copy()  # into memory that is there
        copied = _timed(copy)
        futures: list[Any] = []
        call = _timed(
            lambda: futures.append(
                dcp.async_save(state, checkpoint_id=self._folder / "dcp", process_group=self._group)
            )
        )
        meanwhile = 0.0
        count = 0
        while not self._all_done(futures[0].done) and count < steps:
            meanwhile += sum(self.steps(1))
            count += 1
        futures[0].result()
        return {"call": call, "copy": copied, "step": meanwhile / max(count, 1)}

    def save(self) -> float:
        """Seconds of a save that training waits for."""
        self._new_folder()
        return _timed(lambda: self._engine.save_checkpoint(self._folder, asynchronous=False))

    def plain_write(self) -> float:
        """Seconds in which all ranks write files of the same bytes and sync them."""
        self._new_folder()
        piece = memoryview(torch.randint(0, 255, (_PIECE_BYTES,), dtype=torch.uint8).numpy())
        rest = sum(tensor.nbytes for tensor in self._tensors().values())

        def write() -> None:
            left = rest
            with open(self._folder / f"plain{self._rank}", "wb", buffering=0) as file:
                while left:
                    left -= file.write(piece[: min(left, _PIECE_BYTES)])
                os.fsync(file.fileno())
            dist.barrier()

        return _timed(write)

    def _tensors(self) -> dict[str, torch.Tensor]:
        if not self._same:
            state = self._engine.sharding.state_dict()["state"]
            shards = {**self._engine.sharding.model_state()}
            for key, values in state.items():
                shards |= {f"{key}.{name}": value for name, value in values.items()}
            self._same = {
                f"rank{self._rank}.{name}": torch.randn(shard.local.shape).to(shard.local.dtype)
                for name, shard in shards.items()
                if hasattr(shard, "local") and shard.local.numel()
            }
        return self._same

    def _all_done(self, done: Callable[[], bool]) -> bool:
        mine = torch.tensor([int(done())])
        dist.all_reduce(mine, dist.ReduceOp.MIN)
        return bool(mine.item())

    def _new_folder(self) -> None:
        dist.barrier()
        if self._rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            os.sync()  # what came before is not written at this turn's expense
        dist.barrier()


def _timed(work: Callable[[], Any]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin


def run(quick: bool = False) -> Report:
    """What saves cost one rank and two."""
    turns, shape = (3, QUICK) if quick else (7, STANDARD)
    report = Report(
        "checkpoint",
        "Checkpoints: what training waits for, and the rate of a save",
        ["ranks", "of a rank", "step", "save", "waited beyond the copy", "step meanwhile", "rate"],
    )
    for world_size in (1, 2):
        _measure(report, world_size, shape, turns)
    report.notes.append(
        "Waited beyond the copy: of a plain step. Step meanwhile: how long a step takes while "
        "files are written, in plain steps; with two ranks on two cores, the writers take from "
        "training what they need. Rate: of what a plain file of the same bytes "
        "is written and synced at."
    )
    report.notes.append(
        "The first asynchronous save, which also plans and allocates its buffers, is not counted."
    )
    return report


def _measure(report: Report, world_size: int, shape: Shape, turns: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        Ranks(world_size, Worker, shape, f"{folder}/run") as ranks,
    ):
        ranks.ask("save_and_train", 2)
        ranks.ask("torch_save_and_train", 2)
        found: list[dict[str, Any]] = []
        for _ in range(turns):
            steps = ranks.ask("steps", 5)
            found.append(
                {
                    "step": median(each for of_rank in steps for each in of_rank),
                    "ours": ranks.ask("save_and_train", 20),
                    "torch": ranks.ask("torch_save_and_train", 20),
                    "sync": max(ranks.ask("save")),
                    "plain": max(ranks.ask("plain_write")),
                }
            )
    step = median(turn["step"] for turn in found)
    rate = median(turn["plain"] / turn["sync"] for turn in found)
    waited = {name: _waited(found, name) for name in ("ours", "torch")}
    num_bytes = found[0]["ours"][0]["bytes"]
    for name, label in (("ours", "asynchronous"), ("torch", "torch async_save")):
        slower = median(max(rank["step"] for rank in turn[name]) / turn["step"] for turn in found)
        cells = [f"{step * 1e3:.0f} ms", label, f"{waited[name]:.1%}", f"{slower:.2f}", ""]
        report.rows.append([str(world_size), mib(num_bytes), *cells])
    report.rows.append(
        [
            str(world_size),
            mib(num_bytes),
            f"{step * 1e3:.0f} ms",
            "waited for",
            "",
            "",
            f"{rate:.2f}",
        ]
    )
    report.checks.append(
        Check(f"{world_size} ranks: waited, of a step", waited["ours"], STALL_LIMIT)
    )
    report.checks.append(
        Check(
            f"{world_size} ranks: rate of a plain file over that of a save",
            1 / rate,
            1 / RATE_LIMIT,
        )
    )
    report.raw[f"ranks{world_size}"] = found


def _waited(found: list[dict[str, Any]], name: str) -> float:
    return median(
        max(rank["call"] - rank["copy"] for rank in turn[name]) / turn["step"] for turn in found
    )


if __name__ == "__main__":
    main(run)
