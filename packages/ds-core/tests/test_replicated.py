"""Stage 0 beyond its contract: several buckets, formats of gradients, parameters of all kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core import comm, replicated
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)]
    return nn.Sequential(*layers)


def batch(rank):
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(rank))


def train_in_buckets(bucket_bytes):
    replicated.BUCKET_BYTES, before = bucket_bytes, replicated.BUCKET_BYTES
    try:
        model, mesh = net(), comm.Mesh.world()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sharding = Replicated(model, optimizer, mesh=mesh)
    finally:
        replicated.BUCKET_BYTES = before
    group = mesh.group("dp")
    for _ in range(3):
        model(batch(group.rank)).square().mean().backward()
        sharding.update()
        sharding.zero_grad()
    rows = [row for row in mesh.ledger.rows() if row.op == "all_reduce" and row.sent_bytes > 100]
    return torch.cat([p.detach().flatten() for p in model.parameters()]), len(rows)


def test_the_number_of_buckets_does_not_change_results():
    (one, _), _ = run_ranks(2, train_in_buckets, 1 << 30)
    (many, num_messages), _ = run_ranks(2, train_in_buckets, 256)
    assert num_messages > 1
    assert torch.allclose(one, many, atol=1e-7)


@pytest.mark.parametrize("grad", [None, torch.float32], ids=["as-computed", "fp32"])
def test_gradients_accumulate_in_the_format_asked_for(grad):
    model = net()
    precision = Precision(compute=torch.bfloat16, master=torch.float32, grad=grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sharding = Replicated(model, optimizer, mesh=comm.Mesh.world(), precision=precision)
    numel = sum(p.numel() for p in model.parameters())
    memory = sharding.memory()
    assert memory["parameters"] == 2 * numel
    assert memory["master"] == 4 * numel
    assert memory["gradients"] == (4 if grad else 2) * numel


def test_sparse_gradients_become_dense():
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1))
    expected = nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 1))
    expected.load_state_dict(model.state_dict())
    sharding = Replicated(
        model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=comm.Mesh.world()
    )
    reference = torch.optim.SGD(expected.parameters(), lr=0.1)
    for either in (model, expected):
        either(torch.tensor([1, 2, 2])).sum().backward()
    sharding.update()
    reference.step()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(got, want)


def test_tied_parameters_are_one():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sharding = Replicated(
        model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=comm.Mesh.world()
    )
    assert sorted(sharding.full_state_dict()) == ["0.bias", "0.weight", "1.bias"]
    assert sharding.memory()["gradients"] == 4 * (16 + 4 + 4)


def test_mixed_dtypes_are_reduced_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1).double())
    sharding = Replicated(
        model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=comm.Mesh.world()
    )
    model[1](model[0](torch.ones(2, 4)).double()).sum().backward()
    sharding.update()
    assert [p.dtype for p in model.parameters()] == [torch.float32] * 2 + [torch.float64] * 2


def test_hooks_of_a_dropped_sharding_do_nothing():
    model = net()
    Replicated(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh=comm.Mesh.world())
    model(batch(0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
