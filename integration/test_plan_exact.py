"""`ds plan` predicts the very bytes that real runs hold and send, per rank, kind and message."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm, planning
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import fake_world, run_ranks
from ds_zero import gather, shard

CPU = planning.find_device("cpu")
NO_MASTER = {"enabled": True, "bf16_master_weights_and_grads": True}
FORMATS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 without master": {"bf16": NO_MASTER},
    "bf16 without master, bf16 states": {"bf16": {**NO_MASTER, "bf16_optimizer_states": True}},
}


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


def built_in_bf16():
    """What a model is that was loaded in the format of its file."""
    return Net().bfloat16()


OPTIMIZERS = {
    "adamw": {"type": "AdamW", "params": {"lr": 1e-3}},
    "momentum": {"type": "SGD", "params": {"lr": 1e-3, "momentum": 0.9}},
    "adagrad": {"type": "Adagrad", "params": {"lr": 1e-3}},
    "adafactor": {"type": "Adafactor", "params": {"lr": 1e-3}},
    "muon": {"type": "Muon", "params": {"lr": 1e-3}},
    "adam8bit": {"type": "Adam8bit", "params": {"lr": 1e-3}},
}


def document(stage, precision="fp32", accumulation=1, optimizer="adamw", wire=None):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": OPTIMIZERS[optimizer],
        "zero_optimization": {"stage": stage},
        "communication_data_type": wire,
        **FORMATS[precision],
    }


def offloaded(stage, folder, precision="fp32", **others):
    """A config whose states, and at stage 3 shards, are on disk."""
    base = document(stage, precision)
    disk = {"device": "nvme", "nvme_path": folder}
    section = {"stage": stage, "offload_optimizer": disk, **others}
    if stage == 3:
        section["offload_param"] = {**disk, "max_in_cpu": 40_000}
    return {**base, "zero_optimization": section}


def real(model, config):
    """Memory and messages of one rank in a step, after those that settle every order."""
    torch.manual_seed(0)
    engine = ds_core.initialize(model, config)
    ids = torch.arange(5)

    def steps(count):
        for _ in range(count * engine.accumulation):
            engine.backward(engine(ids))
            engine.step()

    steps(2)
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
    """Every stage, in the formats and accumulations that change what is held and sent."""
    for stage in range(4):
        yield f"stage {stage}, bf16, 2 accumulated", Net, document(stage, "bf16", 2)
        small = document(stage, optimizer="momentum", wire="bf16")
        yield f"stage {stage}, less than one unit", Small, small
        if ranks == 2:
            yield f"stage {stage}, fp32", Net, document(stage, "fp32", 1)
            yield f"stage {stage}, bf16", Net, document(stage, "bf16", 1)
            yield f"stage {stage}, adagrad", Small, document(stage, "fp32", 3, "adagrad")
            for precision in ("bf16", "bf16 without master"):
                case = document(stage, precision)
                yield f"stage {stage}, built in bf16, {precision}", built_in_bf16, case
    for optimizer in ("adafactor", "muon") if ranks < 4 else ():
        yield optimizer, Small, document(0, optimizer=optimizer)


def low_precision_grid():
    """Every stage without a master copy, and with states of fewer bits."""
    _, _, no_master, bf16_states = FORMATS
    for stage in range(4):
        case = document(stage, no_master, optimizer="adam8bit")
        yield f"stage {stage}, without master, 8 bits", Net, case
    for stage in (0, 3):
        case = document(stage, bf16_states, 2)
        yield f"stage {stage}, without master, bf16 states", Small, case
    yield "stage 2, fp32, 8 bits", Small, document(2, optimizer="adam8bit")


def test_low_precision_states_are_predicted():
    found = run_ranks(2, compare_all, list(low_precision_grid()), timeout_s=120)
    assert [wrong for of_rank in found for wrong in of_rank] == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_real_runs_hold_and_send_what_was_predicted(ranks):
    found = run_ranks(ranks, compare_all, list(grid(ranks)))
    assert [wrong for of_rank in found for wrong in of_rank] == []


def compare_tiers(cases):
    """What engines hold on each tier, and their plans."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = []
    for name, config in cases:
        with torch.device("meta"):
            source = planning.ModelSource("test", Net())
        cluster = planning.Cluster(1, ranks, CPU)
        plan = planning.make_plan(config, source, cluster, planning.PlanOptions(rank=rank))
        engine = ds_core.initialize(Net(), config)
        for _ in range(2):
            engine.backward(engine(torch.arange(5)))
            engine.step()
        found = engine.sharding.memory_by_tier()
        buffers = found.get("host", {}).pop("buffers", 0)
        # The memory of a CPU is the device of a plan.
        near = {"host": "device"}
        told = {near.get(place, place): kinds for place, kinds in found.items()}
        expected = {place: dict(kinds) for place, kinds in plan.costs.by_tier.items()}
        if not expected:
            expected = {"device": dict(plan.memory)}
        if told != expected:
            wrong.append((name, rank, "held", told, "planned", expected))
        if plan.peak_bytes < sum(plan.memory.values()) - plan.memory["padding"] + buffers:
            wrong.append((name, rank, "buffers", buffers, "are not in the peak", plan.peak_bytes))
        engine.close()
    return wrong


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_offloaded_is_where_it_was_predicted(ranks, tmp_path):
    cases = []
    for stage in (1, 2, 3):
        for precision in FORMATS:
            folder = str(tmp_path)
            cases.append((f"stage {stage} {precision}", offloaded(stage, folder, precision)))
            small = offloaded(stage, folder, precision, sub_group_size=30_000)
            cases.append((f"stage {stage} {precision}, small pieces", small))
            early = {"stage": stage, "update_in_backward": True}
            plain = {**document(stage, precision), "zero_optimization": early}
            plain["gradient_clipping"] = 0.0
            cases.append((f"stage {stage} {precision}, early", plain))
    found = run_ranks(ranks, compare_tiers, cases)
    assert [wrong for of_rank in found for wrong in of_rank] == []


@pytest.fixture
def agreeable(monkeypatch):
    """Peers of a fake world, which send nothing, all say what this rank says."""
    monkeypatch.setattr(comm, "all_gather_object", lambda value, group, caller="": [value])
    monkeypatch.setattr(comm, "broadcast_object", lambda value, group, caller="", source=0: value)
    exchange = gather._exchange

    def agreed(control, value):
        exchange(control, value)
        return [value]

    monkeypatch.setattr(gather, "_exchange", agreed)


def large_world_step(stage):
    """Model state without optimizer state (peers' votes decide on that), and messages of a step."""
    mesh, model = comm.Mesh.world(), Net()
    precision = Precision(torch.bfloat16, torch.float32, torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if stage == 0:
        sharding = Replicated(model, optimizer, mesh=mesh, precision=precision)
    else:
        sharding = shard(model, optimizer, stage, mesh=mesh, precision=precision)
    memory = sharding.memory()

    def step():
        for micro in range(2):
            sharding.accumulate_locally = micro == 0 and not sharding.reduces_each_backward
            model(torch.arange(5)).backward()
        sharding.grad_norm()
        sharding.update()
        sharding.zero_grad()

    step()
    with mesh.ledger.measure() as sent:
        step()
    return memory, {(r.op, r.caller): (r.num_calls, r.sent_bytes) for r in sent.rows()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "rank"), [(96, 95), (16384, 100)])
def test_a_rank_of_a_large_world_holds_and_sends_what_was_predicted(agreeable, stage, ranks, rank):
    with torch.device("meta"):
        memory, messages = predicted(Net(), document(stage, "bf16", 2), ranks, rank)
    with fake_world(ranks, rank):
        found, sent = large_world_step(stage)

    state = ("parameters", "gradients", "master")
    assert {kind: found[kind] for kind in state} == {kind: memory[kind] for kind in state}
    assert sent == messages
