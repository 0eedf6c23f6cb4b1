"""trl's own functions that take the hooks of stage 3 off a model for generation, and back on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import deepspeed
import ds_zero
from deepspeed.runtime.zero.parameter_offload import parameter_offload
from ds_core.testing import run_ranks

pytest.importorskip("trl", reason="trl is not installed")


def test_hooks_come_off_and_back():
    run_ranks(2, generate)


def generate() -> None:
    from trl.models.utils import add_hooks, remove_hooks

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sharding = ds_zero.shard(model, optimizer, 3, min_unit_numel=0)
    engine = SimpleNamespace(module=model, parameters=model.parameters)
    engine.optimizer = SimpleNamespace(parameter_offload=parameter_offload(engine))
    x = torch.ones(1, 6)
    with torch.no_grad():
        expected = model(x)
    with deepspeed.zero.GatheredParameters(model.parameters()), torch.no_grad():
        remove_hooks(engine)
        assert not model[0]._forward_pre_hooks
        assert torch.equal(model(x), expected)
        add_hooks(engine)
    assert model[0]._forward_pre_hooks
    assert "sharded" in repr(model[0].weight)
    model(x).sum().backward()
    sharding.step()
    assert not torch.equal(model(x), expected)
