"""Profiler, activation checkpointing and curvature at every ZeRO stage: the same figures."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm
from ds_core.activation_checkpointing import checkpoint, host_offload
from ds_core.curvature.observer import EigenvalueObserver
from ds_core.curvature.section import EigenvalueSection
from ds_core.profiling.observer import FlopsObserver
from ds_core.profiling.section import FlopsProfilerSection
from ds_core.testing import Raised, RankFailure, run_ranks

#: So wide that each block is a unit of its own, as in a model of real size.
WIDTH = 512


class Block(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def inner(self, x):
        return self.dropout(torch.tanh(self.linear(self.norm(x))))

    def forward(self, x):
        return x + (checkpoint(self.inner, x) if self.calls else self.inner(x))


class Net(nn.Module):
    def __init__(self, calls=False):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block(calls) for _ in range(3))
        self.head = nn.Linear(WIDTH, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).float(), tokens)


def train(stage, observers=(), calls=False, mesh=None, **changes):
    torch.manual_seed(0)
    engine = ds_core.initialize(
        Net(calls),
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage},
            **changes,
        },
        observers=observers,
        mesh=mesh,
    )
    rank = dist.get_rank() if mesh is None else mesh.group("dp").rank
    torch.manual_seed(rank)
    losses = []
    for number in range(4):
        generator = torch.Generator().manual_seed(10 * number + rank)
        tokens = torch.randint(11, (4,), generator=generator)
        engine.backward(loss := engine(tokens))
        engine.step()
        losses.append(loss.item())
    engine.close()
    return losses


def checkpointed(stage, autocast):
    changes = {"torch_autocast": {"enabled": True}} if autocast else {}
    section = {"blocks": "repeated"}
    offloaded = {**section, "cpu_checkpointing": True}
    before, host_offload.needs_copies = host_offload.needs_copies, lambda device: True
    try:
        return (
            train(stage, **changes),
            train(stage, activation_checkpointing=section, **changes),
            train(stage, calls=True, **changes),
            train(stage, calls=True, activation_checkpointing=section, **changes),
            train(stage, calls=True, activation_checkpointing=offloaded, **changes),
        )
    finally:
        host_offload.needs_copies = before


@pytest.mark.parametrize(
    ("stage", "autocast"),
    [
        pytest.param(0, False, id="stage-0"),
        pytest.param(1, False, id="stage-1"),
        pytest.param(2, False, id="stage-2"),
        pytest.param(3, False, id="stage-3"),
        pytest.param(3, True, id="stage-3-autocast"),
    ],
)
def test_checkpointing_changes_no_loss_at_any_stage(stage, autocast):
    for plain, *others in run_ranks(2, checkpointed, stage, autocast):
        for by in zip(("config", "call", "both", "offload"), others, strict=True):
            assert by[1] == plain, by[0]


def partitioned(stage):
    mesh = comm.Mesh(dp=2, tp=2)
    section = {"blocks": "repeated", "partition_activations": True}
    plain = train(stage, mesh=mesh)
    same = train(stage, mesh=mesh, activation_checkpointing=section) == plain
    gathers = [row for row in mesh.ledger.rows() if row.caller == "activations"]
    return same, [(row.group, row.num_calls) for row in gathers]


def test_inputs_are_partitioned_over_tp_beside_sharding_over_dp():
    for same, gathers in run_ranks(4, partitioned, 3):
        assert same
        assert gathers == [("tp", 4 * 3)]  # micro-batches, blocks


def profiled(stage):
    observer = FlopsObserver(FlopsProfilerSection(profile_step=1, output_file="/dev/null"))
    observers = (observer,) if dist.get_rank() == 0 else ()
    section = {"number_checkpoints": 2}
    losses = train(stage, observers, activation_checkpointing=section)
    same = losses == train(stage, activation_checkpointing=section)
    profile = observer.profile
    if profile is None:
        return same, None
    return same, {
        "parameters": profile.parameters,
        "flops": (profile.forward_flops, profile.backward_flops, profile.recompute_flops),
        "blocks": [(m.name, m.parameters, m.calls, m.flops) for _, m in profile.model.walk()],
    }


def test_the_profile_of_sharded_parameters_is_that_of_whole_ones():
    found = {stage: run_ranks(2, profiled, stage) for stage in (0, 3)}

    assert all(same for ranks in found.values() for same, _ in ranks)
    profiles = [ranks[0][1] for ranks in found.values()]
    assert all(profile == profiles[0] for profile in profiles)
    # Two micro-batches of four tokens; per token, three blocks' layers and the tied head.
    forward = 2 * 4 * 2 * (3 * WIDTH * WIDTH + WIDTH * 11)
    assert profiles[0]["flops"][:2] == (forward, 2 * forward)
    assert profiles[0]["parameters"] == 11 * WIDTH + 3 * (WIDTH * WIDTH + 3 * WIDTH)


def curved(stage):
    observer = EigenvalueObserver(EigenvalueSection(enabled=True, max_iter=200, tol=1e-6))
    return train(stage, (observer,)) == train(stage), observer.values


def test_eigenvalues_are_the_same_up_to_stage_2():
    found = [run_ranks(2, curved, stage) for stage in (0, 2)]

    assert all(same for ranks in found for same, _ in ranks)
    expected = found[0][0][1]
    for ranks in found:
        for _, values in ranks:
            assert values == pytest.approx(expected, rel=1e-3)


def test_eigenvalues_at_stage_3_are_refused():
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, curved, 3)

    for outcome in caught.value.outcomes:
        assert isinstance(outcome, Raised)
        assert outcome.type.endswith("ConfigError")
        assert "use stage 2 or below" in outcome.message
