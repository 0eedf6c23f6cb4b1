"""`ds plan` predicts the very bytes that real runs hold and send, per rank, kind and message."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import planning
from ds_core.testing import fake_world, run_ranks

CPU = planning.find_device("cpu")
FORMATS = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


class Block(nn.Module):
    """Larger than the smallest unit of stage 3, and no size a multiple of anything."""

    def __init__(self, width=151):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 6 * width + 1), nn.Linear(6 * width + 1, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks, a tied head, a frozen table and parameters that belong to no block."""

    def __init__(self, blocks=3, width=151):
        super().__init__()
        self.embed = nn.Embedding(53, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.scale = nn.Parameter(torch.ones(width), requires_grad=False)
        self.head = nn.Linear(width, 53, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), ids)


class Small(nn.Module):
    """Less than one unit."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])

    def forward(self, ids):
        x = torch.nn.functional.one_hot(ids % 7, 7).to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.float().square().mean()


OPTIMIZERS = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3}},
    "momentum": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-3}},
}


def document(stage, precision="fp32", accumulation=1, optimizer="adamw"):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": OPTIMIZERS[optimizer],
        "zero_optimization": {"stage": stage},
        **FORMATS[precision],
    }


def real(model, config):
    """Memory and messages of one rank in a step, after those that settle every order."""
    torch.manual_seed(0)
    engine = ds_core.initialize(model, config)
    ids = torch.arange(5)

    def steps(count):
        for _ in range(count * engine.accumulation):
            engine.backward(engine(ids))
            engine.step()

    steps(3)
    with engine.mesh.ledger.measure() as sent:
        steps(1)
    rows = {(row.op, row.caller): (row.num_calls, row.sent_bytes) for row in sent.rows()}
    memory = engine.memory()
    engine.close()
    return memory, rows


def predicted(model, config, ranks, rank):
    source = planning.ModelSource("test", model)
    cluster = planning.Cluster(1, ranks, CPU)
    plan = planning.make_plan(config, source, cluster, planning.PlanOptions(rank=rank))
    calls, sent = Counter(), Counter()
    for message in plan.costs.messages:
        calls[message.op, message.caller] += message.num_calls
        sent[message.op, message.caller] += message.sent_bytes
    return dict(plan.memory), {key: (calls[key], sent[key]) for key in calls}


def compare_all(cases):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []
    for name, build, config in cases:
        with torch.device("meta"):
            expected = predicted(build(), config, ranks, rank)
        found = real(build(), config)
        if found != expected:
            wrong.append((name, rank, "held and sent", found, "predicted", expected))
    return wrong


def grid(ranks):
    """All stages, formats and accumulations; some of them on four ranks."""
    accumulations = (1, 3) if ranks < 4 else (2,)
    for stage in range(4):
        for precision in FORMATS:
            for accumulation in accumulations:
                name = f"stage {stage}, {precision}, {accumulation} accumulated"
                yield name, Net, document(stage, precision, accumulation)
        yield f"stage {stage}, small", Small, document(stage, "bf16", 2)
        for optimizer in ("momentum", "adagrad"):
            yield f"stage {stage}, {optimizer}", Small, document(stage, optimizer=optimizer)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_real_runs_hold_and_send_what_was_predicted(ranks):
    assert [wrong for found in run_ranks(ranks, compare_all, list(grid(ranks))) for wrong in found] == []
