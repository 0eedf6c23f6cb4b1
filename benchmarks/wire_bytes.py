"""Bytes that a rank sends in a step: as our ledger counts them, and as the kernel does.

The physical count needs a network of its own: the ranks run in a fresh network namespace, whose
loopback interface carries nothing else, and its counter is read before and after some steps. That
takes `unshare` and `ip` and the right to use them; without, only the counted bytes are given.

Source of the expected bytes: the bandwidth-optimal collectives of Patarasuk and Yuan 2009, as
Rajbhandari et al. 2020 (ZeRO), section 7, put them together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from implementations import build, is_ours
from models import QUICK, STANDARD, Shape, batches, make_gpt, num_parameters
from ranks import Ranks
from report import Check, Report, main

OURS = ("shard-1", "shard-2", "shard-3", "engine-0", "engine-1", "engine-2", "engine-3")
PEERS = ("ddp", "fsdp2", "deepspeed-1", "deepspeed-2", "deepspeed-3")
SHAPES = {"quick": QUICK, "standard": STANDARD}
#: Gathers and reductions of everything in a step, by stage.
PASSES = {0: 2, 1: 2, 2: 2, 3: 3}
WARMUP, STEPS = 2, 2
TOLERANCE = 0.01


class Worker:
    """Trains one implementation in one rank and reads its ledger."""

    def __init__(self, rank: int, world_size: int, name: str, shape: Shape) -> None:
        self._trainer = build(name, make_gpt(shape), micro_batch=shape.micro_batch)
        self._batches = batches(shape, rank)

    def steps(self, number: int) -> int | None:
        """Take that many steps; bytes this rank counted in them, if it counts."""
        ledger = self._trainer.ledger
        before = ledger.sent_bytes() if ledger else 0
        for _ in range(number):
            self._trainer.step(*next(self._batches))
        after = ledger.sent_bytes() if ledger else 0
        dist.barrier()
        return after - before if ledger else None


def measure(name: str, world_size: int, shape: Shape) -> tuple[float | None, float]:
    """Bytes per rank and step of one implementation: counted, and sent over loopback."""
    with Ranks(world_size, Worker, name, shape) as ranks:
        ranks.ask("steps", WARMUP)
        before = _loopback_bytes()
        counted = ranks.ask("steps", STEPS)
        sent = (_loopback_bytes() - before) / world_size / STEPS
    known = [value for value in counted if value is not None]
    return (sum(known) / world_size / STEPS if known else None), sent


def _private_network() -> tuple[list[str] | None, str]:
    """What makes a command run in a network namespace of its own; or None, and why there is none.

    The namespace ends with the command. Without root, a user namespace may permit it.
    """
    problem = "there is no `unshare` or no `ip` command"
    for options in (["--net"], ["--user", "--map-root-user", "--net"]):
        prefix = ["unshare", *options, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        try:
            done = subprocess.run([*prefix, "true"], check=False, capture_output=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return prefix, ""
        problem = done.stderr.decode().strip() or problem
    return None, problem


def run(quick: bool = False) -> Report:
    """Wire bytes against the optimum and against the peers."""
    chosen = "quick" if quick else "standard"
    numel = num_parameters(SHAPES[chosen])
    worlds = (2,) if quick else (2, 4)
    report = Report(
        "wire_bytes",
        f"Bytes sent per rank and step, as multiples of 4 P (P = {numel:,} parameters, fp32)",
        ["ranks", "implementation", "counted", "physical", "optimum"],
    )
    prefix, problem = _private_network()
    for world_size in worlds:
        for name in (*OURS, *PEERS):
            if prefix is None and not is_ours(name):
                continue  # nothing counts its bytes
            counted, sent = _measure_apart(prefix or [], name, world_size, chosen)
            _add(report, name, world_size, numel, counted, None if prefix is None else sent)
    if prefix is None:
        report.notes.append(f"No physical bytes, and none of the peers: {problem}.")
    report.notes.append(
        f"Physical: growth of the loopback counter in a private network namespace over {STEPS} "
        "steps, headers included. Optimum: (N-1)/N x 4 P for each gather or reduction of "
        "everything; 2 of them per step at stages 0 to 2, 3 at stage 3."
    )
    return report


def _measure_apart(
    prefix: list[str], name: str, world_size: int, shape: str
) -> tuple[float | None, float]:
    """`measure` in a process of its own, started through `prefix`."""
    command = [sys.executable, __file__, "--measure", name, str(world_size), shape]
    done = subprocess.run([*prefix, *command], check=False, capture_output=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} on {world_size} ranks failed:\n{done.stderr.decode()}")
    counted, sent = json.loads(done.stdout)
    return counted, sent


def _add(
    report: Report,
    name: str,
    world_size: int,
    numel: int,
    counted: float | None,
    physical: float | None,
) -> None:
    stage = int(name.partition("-")[2] or {"ddp": 0, "fsdp2": 3}[name])
    optimum = PASSES[stage] * (world_size - 1) / world_size
    values = [None if value is None else value / (4 * numel) for value in (counted, physical)]
    shown = ["-" if value is None else f"{value:.4f}" for value in values]
    report.rows.append([str(world_size), name, *shown, f"{optimum:g}"])
    report.raw[f"{name} on {world_size}"] = {"counted": counted, "physical": physical}
    if not is_ours(name) or stage == 0:
        return
    for kind, value in zip(("counted", "physical"), values, strict=True):
        if value is not None:
            low, high = optimum * (1 - TOLERANCE), optimum * (1 + TOLERANCE)
            report.checks.append(
                Check(f"{name}, {world_size} ranks, {kind}", value, high, " x 4P", least=low)
            )


def _loopback_bytes() -> int:
    """Bytes sent over the loopback interface so far, or 0 where the system does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        interface, _, counters = line.partition(":")
        if interface.strip() == "lo":
            return int(counters.split()[8])
    return 0


if __name__ == "__main__":
    if "--measure" in sys.argv:
        inside = argparse.ArgumentParser()
        inside.add_argument("--measure", nargs=3, metavar=("NAME", "RANKS", "SHAPE"))
        of, num_ranks, shape_name = inside.parse_args().measure
        print(json.dumps(measure(of, int(num_ranks), SHAPES[shape_name])))
    else:
        main(run)
