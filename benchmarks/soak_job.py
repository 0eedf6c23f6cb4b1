"""The job that the soak harms: a small model, an elastic batch, a checkpoint every other step.

    ds run --nproc 4 benchmarks/soak_job.py FOLDER --stage 2

It is written as one that survives should be: it goes on from the newest checkpoint that is whole,
and its batch is chosen by the section `elasticity`, so that any number of ranks trains the same.
Faults come from the command line: the first in the first attempt, the second in the second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ds_core
from ds_core import checkpoint, comm
from ds_core.testing import Fault, FaultInjector

WIDTH, SAMPLES, SAVE_EVERY = 32, 240, 2
OFFLOADS = ("none", "cpu", "nvme", "speculative")


class Regression(nn.Module):
    """Squared errors of three blocks, one per sample."""

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x: `[B, WIDTH]`, y: `[B, 1]`; returns `[B]`."""
        return (self.head(self.blocks(x)) - y).square().mean(dim=1)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The config: 24 samples a step on 1, 2, 3, 4, 6 or 8 ranks."""
    return {
        "elasticity": {
            "enabled": True, "max_train_batch_size": 24, "micro_batch_sizes": [2, 3], "max_gpus": 8,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.stage, **offload(options)},
        "checkpoint": {"asynchronous": options.asynchronous},
        "comm": {"timeout_s": options.timeout_s, "check": options.checks},
        "seed": 7,
        "progress": False,
    }  # fmt: skip


def offload(options: argparse.Namespace) -> dict[str, Any]:
    """Keys of `zero_optimization` for where states live; at stage 3 parameters too."""
    if options.offload == "none":
        return {}
    if options.offload == "nvme":
        disk = {"device": "nvme", "nvme_path": str(options.folder / "swap")}
        shards = {"offload_param": {**disk, "max_in_cpu": 0}} if options.stage == 3 else {}
        return {"offload_optimizer": disk, **shards}
    ahead = options.offload == "speculative"
    return {"offload_optimizer": {"device": "cpu", "super_offload": ahead}}


def dataset() -> torch.utils.data.TensorDataset:
    """The same samples in every process."""
    source = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, WIDTH, generator=source)
    return torch.utils.data.TensorDataset(x, x[:, :4].sin().sum(1, keepdim=True))


def train(options: argparse.Namespace) -> None:
    """Go on from the newest checkpoint, if there is one, to the last step."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    comm.init()
    group = comm.Mesh.world().group("dp")
    folder, is_first = options.folder, group.rank == 0
    faults = [Fault.from_json(text) for text in options.fault]
    injector = FaultInjector(
        faults[attempt] if attempt < len(faults) else None,
        rank=group.rank,
        record=folder / "strike.json",
        fills_disk=options.fills_disk,
    )
    torch.manual_seed(1)
    config = settings(options)
    engine = ds_core.initialize(
        Regression(), config, training_data=dataset(), observers=(injector,)
    )
    checkpoints = folder / "checkpoints"
    if attempt > 0:
        (checkpoints / ".filler").unlink(missing_ok=True)
    if (checkpoints / "latest").exists():
        # After a failure, the newest may be what failed.
        tag = checkpoint.newest_intact(checkpoints) if attempt > 0 else None
        engine.load_checkpoint(checkpoints, tag)
    group = engine.mesh.group("dp")  # the one that the config's check covers
    batches = engine.dataloader.forever()
    while engine.global_step < options.steps:
        errors = []
        for _ in range(engine.accumulation):
            losses = engine(*next(batches))
            engine.backward(losses.mean())
            errors.append(losses.detach())
            engine.step()
        mean = torch.stack(errors).mean(0)
        comm.all_reduce(mean, group, caller="errors of the step")
        if is_first:
            told = {"step": engine.global_step, "loss": mean.mean().item() / group.size}
            append(folder / "losses.jsonl", {**told, "ranks": group.size, "attempt": attempt})
        if engine.global_step % SAVE_EVERY == 0:
            weights = engine.state_dict()
            if is_first:
                note(folder / f"digest-step{engine.global_step}.json", digest(weights))
            engine.save_checkpoint(checkpoints)
    engine.close()


def digest(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of the bytes of each tensor."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in weights.items()
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON; whole or not at all."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def note(path: Path, content: dict[str, str]) -> None:
    """Write a file that appears whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--timeout-s", type=float, default=5.0)
    parser.add_argument("--offload", choices=OFFLOADS, default="none")
    parser.add_argument("--asynchronous", action="store_true", help="save from a thread")
    parser.add_argument("--checks", action="store_true", help="compare collectives across ranks")
    parser.add_argument(
        "--fault", action="append", default=[], help="JSON of a ds_core.testing.Fault; repeatable"
    )
    parser.add_argument("--fills-disk", action="store_true", help="checkpoints/ is a small disk")
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
