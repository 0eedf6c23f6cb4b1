"""A rank that dies: every other rank raises within seconds, and names it."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import ds_core
from ds_core import comm
from ds_core.testing import Died, Raised, die, run_ranks

SIGKILL = 9


def collective_without(victim, op, size):
    mesh = comm.Mesh.world()
    group = mesh.group("dp")
    full, part = torch.ones(size * group.size), torch.ones(size)
    calls = {
        "all_gather": lambda: comm.all_gather(full, part, group, caller="layer.3"),
        "reduce_scatter": lambda: comm.reduce_scatter(part, full, group, caller="layer.3"),
        "all_reduce": lambda: comm.all_reduce(full, group, caller="layer.3"),
        "broadcast": lambda: comm.broadcast(full, group, caller="layer.3"),
        "all_gather_object": lambda: comm.all_gather_object(1, group, caller="layer.3"),
        "barrier": lambda: comm.barrier(group, caller="layer.3"),
    }
    calls[op]()
    if dist.get_rank() == victim:
        die()
    for _ in range(3):
        calls[op]()


@pytest.mark.parametrize(
    ("world_size", "op", "size"),
    [
        (2, "all_gather", 100_000),
        (2, "barrier", 1),
        (4, "all_gather", 10),
        (4, "all_gather", 100_000),
        (4, "reduce_scatter", 100_000),
        (4, "all_reduce", 100_000),
        (4, "all_gather_object", 1),
    ],
)
def test_survivors_name_operation_caller_and_dead_rank(world_size, op, size):
    victim, started = 1, time.monotonic()
    outcomes = run_ranks(
        world_size, collective_without, victim, op, size, deaths={victim: SIGKILL}, timeout_s=40
    )
    assert time.monotonic() - started < 20
    assert outcomes[victim] == Died(SIGKILL)
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert isinstance(outcome, Raised), (rank, outcome)
            assert outcome.type == "ds_core.errors.CommError"
            assert f"{op} of layer.3 in group 'dp'" in outcome.message
            assert f"failed on rank {rank}: rank {victim} stopped answering" in outcome.message


class DiesIn(torch.autograd.Function):
    """Passes its input on; the victim dies in forward or in backward."""

    @staticmethod
    def forward(ctx, x, phase):
        ctx.phase = phase
        if phase == "forward":
            die()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.phase == "backward":
            die()
        return gradient, None


class Fragile(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, x, phase):
        return self.last(DiesIn.apply(self.first(x), phase)).mean()


def train_with_death(phase):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "progress": False,
    }
    engine = ds_core.initialize(Fragile(), config)
    for step in range(3):
        dies = step == 1 and dist.get_rank() == 1
        engine.backward(engine(torch.ones(2, 4), phase if dies else ""))
        if dies and phase == "step":
            die()
        engine.step()


@pytest.mark.parametrize("phase", ["forward", "backward", "step"])
def test_a_rank_killed_in_a_step_ends_the_others(phase):
    outcomes = run_ranks(2, train_with_death, phase, deaths={1: SIGKILL}, timeout_s=40)
    assert isinstance(outcomes[0], Raised), outcomes[0]
    assert outcomes[0].type == "ds_core.errors.CommError"
    assert "rank 1 stopped answering" in outcomes[0].message
