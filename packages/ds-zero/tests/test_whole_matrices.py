"""Muon on sharded matrices: the same bits as on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_zero
from ds_core import comm, optim
from ds_core.errors import TornError
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks
from ds_core.whole_matrices import WholeMatrices
from ds_zero.errors import ShardError

LAYERS = ((24, 33), (33, 51), (51, 17), (17, 24))


class Net(nn.Module):
    """Matrices of odd sizes, wide and tall, that shards cut anywhere; one is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 24)
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in LAYERS)
        self.extra = nn.Linear(24, 24)

    def forward(self, tokens: torch.Tensor, with_extra: bool = True) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        if with_extra:
            x = x + self.extra(x)
        return x.float().square().mean()


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return optim.Muon(model.named_parameters(), lr=0.02, weight_decay=0.1)


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, skip: int
) -> list[float]:
    """Every rank sees the same tokens, so that the average of gradients is exact."""
    found = []
    for step in range(steps):
        tokens = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(step))
        loss = model(tokens, with_extra=step != skip)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def equals_one_rank(stage: int, skip: int) -> None:
    torch.manual_seed(0)
    alone, shared = Net(), Net()
    shared.load_state_dict(alone.state_dict())
    expected = losses(alone, muon(alone), 6, skip)
    optimizer = ds_zero.shard(shared, muon(shared), stage, min_unit_numel=0)
    assert losses(shared, optimizer, 6, skip) == expected
    truth = alone.state_dict()
    for name, value in optimizer.full_state_dict().items():
        assert torch.equal(value, truth[name]), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_muon_gives_the_bits_of_one_rank(world_size: int, stage: int):
    run_ranks(world_size, equals_one_rank, stage, -1, timeout_s=60)


def test_a_matrix_that_no_rank_used_is_left_alone(stage: int):
    run_ranks(2, equals_one_rank, stage, 3, timeout_s=60)


def equals_replicated(stage: int) -> None:
    """bf16 with master copies and clipping: what every rank computes alone at stage 0."""
    precision = Precision(compute=torch.bfloat16, master=torch.float32, grad=torch.float32)
    torch.manual_seed(0)
    whole, shared = Net(), Net()
    shared.load_state_dict(whole.state_dict())
    mesh = comm.Mesh.world()
    truth = Replicated(whole, muon(whole), mesh=mesh, precision=precision)
    optimizer = ds_zero.shard(shared, muon(shared), stage, mesh=mesh, precision=precision)
    for step in range(4):
        tokens = torch.randint(13, (4, 7), generator=torch.Generator().manual_seed(step))
        for model, sharding in ((whole, truth), (shared, optimizer)):
            model(tokens).backward()
            sharding.update(0.5)
            sharding.zero_grad()
    expected = truth.full_state_dict()
    for name, value in optimizer.full_state_dict().items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, expected[name]), name


def test_bits_are_those_of_replicated_training_in_bf16(stage: int):
    run_ranks(2, equals_replicated, stage, timeout_s=60)


def owners_have_equal_work() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    optimizer = ds_zero.shard(model, muon(model), 3, min_unit_numel=0)
    owners = [matrix.owner for matrix in optimizer._host_step._matrices.of_groups[0]._matrices]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    sent = {row.caller: row.sent_bytes for row in optimizer.mesh.ledger.rows()}
    # Two bytes per element of this rank's share; a part stays where its owner holds it.
    share = 8 * 32 * 32 // 4 * 2
    assert sent["directions of matrices"] + sent["updates of matrices"] <= 2 * share
    total = comm.all_gather_object(sent["directions of matrices"], optimizer.mesh.group("dp"))
    assert sum(total) == 4 * share * 3 // 4


def test_owners_share_the_work_evenly():
    run_ranks(4, owners_have_equal_work)


def goes_on_from_a_checkpoint(stage: int) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = ds_zero.shard(model, muon(model), stage)
    losses(model, optimizer, 2, -1)
    momentum = optimizer.full_optimizer_state("layers.0.weight", "momentum_buffer")
    assert momentum.shape == (33, 24)
    assert float(momentum.norm()) > 0
    optimizer.prepare_load()
    zeros = optimizer.full_optimizer_state("layers.0.weight", "momentum_buffer")
    assert float(zeros.norm()) == 0


def test_momentum_is_state_like_any_other(stage: int):
    run_ranks(2, goes_on_from_a_checkpoint, stage)


@pytest.mark.parametrize("part", ["direction", "whole_update", "apply_update"])
def test_an_error_on_one_rank_ends_on_all_with_the_cause(part: str, stage: int):
    run_ranks(3, fails_on_rank_1, stage, part, timeout_s=60)


def fails_on_rank_1(stage: int, part: str) -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = ds_zero.shard(model, muon(model), stage, min_unit_numel=0)
    losses(model, optimizer, 2, 1)
    model(torch.ones(2, 3, dtype=torch.long)).backward()
    fails = optimizer.mesh.group("dp").rank == 1
    calls, keep = [0], getattr(optim.Muon, part)

    def second_fails(*args: Any) -> Any:
        calls[0] += 1
        if fails and calls[0] == 2:
            raise RuntimeError("out of memory")
        return keep(*args)

    expected = RuntimeError if fails else ShardError
    told = "^out of memory" if fails else "step: rank 1: RuntimeError: out of memory"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.Muon, part, second_fails)
        with pytest.raises(expected, match=told):
            optimizer.step()
    assert "ended in the middle" in (optimizer.torn or "")
    assert "out of memory" in (optimizer.torn or "")
    with pytest.raises(TornError, match=r"rank 0.*rank 1.*rank 2"):
        optimizer.state_dict()


def test_muon_of_torch_is_refused_with_the_one_that_works():
    run_ranks(1, refuses_torchs)


def refuses_torchs() -> None:
    model = nn.Linear(4, 4, bias=False)
    with pytest.raises(ShardError, match=r"use ds_core\.optim\.Muon"):
        ds_zero.shard(model, torch.optim.Muon(model.parameters()), 1)


def test_muon_is_one_whose_step_comes_apart():
    model = nn.Linear(4, 4)
    assert isinstance(muon(model), WholeMatrices)
    assert not isinstance(torch.optim.SGD(model.parameters(), lr=0.1), WholeMatrices)
