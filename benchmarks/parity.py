"""Does sharding change what is learnt? Losses against one process, and stages against each other.

One process trains on the global batch with a plain loop; two ranks train on its halves. Stages 1, 2
and 3 must give the same bits: every loss of every rank, and every parameter at the end.
"""

from __future__ import annotations

import hashlib

import torch

from implementations import build
from models import QUICK, STANDARD, Batch, Shape, batches, make_gpt
from ranks import Ranks
from report import Check, Report, main

LIMIT = 1e-5
SHARDED = ("shard-1", "shard-2", "shard-3", "engine-1", "engine-2", "engine-3")
OTHERS = ("engine-0", "ddp")
PEERS = ("fsdp2", "deepspeed-1", "deepspeed-2", "deepspeed-3")


class Worker:
    """Trains one implementation in one rank; alone, on the batches of `num_parts` ranks at once."""

    def __init__(
        self, rank: int, world_size: int, name: str, shape: Shape, num_parts: int = 1
    ) -> None:
        self._trainer = build(name, make_gpt(shape), micro_batch=shape.micro_batch)
        self._parts = [batches(shape, rank + part) for part in range(num_parts)]

    def train(self, steps: int) -> tuple[list[float], str]:
        """The losses, and a digest of the parameters at the end (if they can be had)."""
        losses = [float(self._trainer.step(*self._batch())) for _ in range(steps)]
        if self._trainer.full_state is None:
            return losses, ""
        digest = hashlib.sha256()
        for name, value in sorted(self._trainer.full_state().items()):
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        return losses, digest.hexdigest()[:16]

    def _batch(self) -> Batch:
        parts = [next(part) for part in self._parts]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def run(quick: bool = False) -> Report:
    """Losses of 20 fp32 steps, and bit-identity of the stages."""
    shape, steps, worlds = (QUICK, 20, (2,)) if quick else (STANDARD, 20, (2, 4))
    report = Report(
        "parity",
        f"{steps} steps in fp32: losses against one process on the same global batch",
        ["ranks", "implementation", "last loss", "largest difference", "parameters at the end"],
    )
    for world_size in worlds:
        with Ranks(1, Worker, "torch", shape, world_size) as alone:
            reference = alone.ask("train", steps, timeout_s=900)[0][0]
        report.rows.append([str(world_size), "one process", f"{reference[-1]:.6f}", "", ""])
        outcomes: dict[str, tuple[list[list[float]], str]] = {}
        peers = PEERS if world_size == 2 else ()
        for name in (*SHARDED, *OTHERS, *peers):
            with Ranks(world_size, Worker, name, shape) as ranks:
                answers = ranks.ask("train", steps, timeout_s=900)
            losses = [answer[0] for answer in answers]
            outcomes[name] = (losses, answers[0][1])
            mean = [sum(values) / world_size for values in zip(*losses, strict=True)]
            apart = max(abs(a - b) for a, b in zip(mean, reference, strict=True))
            report.rows.append(
                [str(world_size), name, f"{mean[-1]:.6f}", f"{apart:.1e}", answers[0][1] or "-"]
            )
            report.raw[f"{name} on {world_size}"] = {"losses": losses, "digest": answers[0][1]}
            if name in SHARDED:
                quantity = f"{name}, {world_size} ranks: difference from one process"
                report.checks.append(Check(quantity, apart, LIMIT))
        kinds = len({repr(outcomes[name]) for name in SHARDED})
        quantity = f"different results of stages 1, 2, 3, engine or not, {world_size} ranks"
        report.checks.append(Check(quantity, kinds, 1))
    report.notes.append(
        "Parameters at the end: a digest of all their bytes; equal ones are bit-identical."
    )
    return report


if __name__ == "__main__":
    main(run)
