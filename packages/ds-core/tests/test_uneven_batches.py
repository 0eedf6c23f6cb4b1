"""Ranks with different numbers of batches finish together, with the gradients of the union."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import CommError
from ds_core.testing import run_ranks


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data(rank, counts, rows=2):
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(rows, 3, generator=generator) for _ in range(counts[rank])]


def plain(counts, accumulation=1):
    """One process on the union: each step the mean over the batches that ranks have for it."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    batches = [data(rank, counts) for rank in range(len(counts))]
    for start in range(0, max(counts), accumulation):
        union = [b for mine in batches for b in mine[start : start + accumulation]]
        loss = torch.stack([net(batch).square().mean() for batch in union]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(net.parameters())


def by_hand(counts):
    group = comm.Mesh.world().group("dp")
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    weights = []
    for batch, weight in comm.UnevenBatches(data(group.rank, counts), group):
        weights.append(weight)
        (net(batch).square().mean() * weight).backward()
        for param in net.parameters():
            comm.all_reduce(param.grad, group, op="mean", caller="gradient")
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()], weights


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "counts", [(3, 5), (4, 4), (0, 2), (1, 4, 2)], ids=lambda counts: "-".join(map(str, counts))
)
def test_a_hand_written_loop_trains_on_the_union(counts):
    for rank, (params, weights) in enumerate(run_ranks(len(counts), by_hand, counts)):
        assert_close(params, plain(counts))
        assert len(weights) == max(counts)
        assert all(weight > 0 for weight in weights[: counts[rank]])
        assert not any(weights[counts[rank] :])


def by_engine(counts, accumulation):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
        "gradient_clipping": 0,
        "progress": False,
    }
    net = model()
    engine = ds_core.initialize(Loss(net), config)
    group = engine.mesh.group("dp")
    batches = comm.UnevenBatches(data(group.rank, counts), group, accumulation=accumulation)
    while batches.any_left:
        engine.train_batch(batches)
    return [p.detach() for p in net.parameters()], engine.global_step


class Loss(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(batch).square().mean()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_engine_trains_on_the_union(accumulation):
    counts = (3, 6)
    for params, steps in run_ranks(2, by_engine, counts, accumulation):
        assert_close(params, plain(counts, accumulation))
        assert steps == 6 // accumulation


def weights_by_samples():
    group = comm.Mesh.world().group("dp")
    mine = [torch.ones(4), torch.ones(4)] if group.rank == 0 else [torch.ones(4), torch.ones(2)]
    return [weight for _, weight in comm.UnevenBatches(mine, group, size_of=len)]


def test_batches_of_different_sizes_weigh_by_what_they_hold():
    first, second = run_ranks(2, weights_by_samples)
    assert first == pytest.approx([1.0, 4 / 3])
    assert second == pytest.approx([1.0, 2 / 3])


def nobody_has_data():
    group = comm.Mesh.world().group("dp")
    with pytest.raises(CommError, match="no rank of group 'dp' has any batch"):
        comm.UnevenBatches([], group)
    with pytest.raises(CommError, match="accumulation: got 0, expected 1 or more"):
        comm.UnevenBatches([1], group, accumulation=0)
    return True


def test_no_data_at_all_is_an_error():
    assert run_ranks(2, nobody_has_data) == [True, True]


def test_a_world_of_one_needs_no_other():
    assert run_ranks(1, by_hand, (3,))[0][1] == [1.0, 1.0, 1.0]
