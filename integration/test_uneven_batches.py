"""Ranks with different numbers of batches train sharded models on the union of their data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ds_zero
from ds_core import comm
from ds_core.testing import run_ranks

COUNTS = (2, 5, 3)


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))


def data(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(2, 8, generator=generator) for _ in range(COUNTS[rank])]


def plain():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    batches = [data(rank) for rank in range(len(COUNTS))]
    for step in range(max(COUNTS)):
        union = [mine[step] for mine in batches if step < len(mine)]
        torch.stack([net(batch).square().mean() for batch in union]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach() for name, param in net.named_parameters()}


def sharded(stage, checked):
    mesh = comm.Mesh.world()
    if checked:
        mesh.check_collectives()
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    optimizer = ds_zero.shard(net, optimizer, stage=stage, mesh=mesh, min_unit_numel=1)
    group = mesh.group("dp")
    for batch, weight in comm.UnevenBatches(data(group.rank), group):
        (net(batch).square().mean() * weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.full_state_dict()


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_trains_on_the_union(stage, checked):
    expected = plain()
    for state in run_ranks(len(COUNTS), sharded, stage, checked):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
