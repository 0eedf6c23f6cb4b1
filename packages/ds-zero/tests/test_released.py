"""Training ends without the model being made whole: `ZeroOptimizer.release`."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_zero
from ds_core import comm
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero import Offload, ShardError
from ds_zero.sharded_param import is_sharded


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def shard(model: nn.Module, **options: Any) -> ds_zero.ZeroOptimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return ds_zero.shard(model, optimizer, min_unit_numel=1, **options)


def train(model: nn.Module, optimizer: Any, steps: int, dtype: torch.dtype) -> list[float]:
    losses = []
    for number in range(steps):
        torch.manual_seed(10 * number + dist.get_rank())
        loss = model(torch.randn(4, 6).to(dtype)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_released_stays_sharded_and_is_sharded_anew(stage: int, dtype: torch.dtype):
    run_ranks(2, releases, stage, dtype, None)


def test_parameters_on_disk_stay_there(tmp_path: Path):
    run_ranks(2, releases, 3, torch.float32, str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def releases(stage: int, dtype: torch.dtype, folder: str | None) -> None:
    options: dict[str, Any] = {"precision": Precision(compute=dtype, master=torch.float32)}
    if folder is not None:
        options["offload"] = Offload(optimizer="nvme", parameters="nvme", folder=folder)
    model = make_model()
    optimizer = shard(model, stage=stage, **options)
    train(model, optimizer, 2, dtype)
    expected = {name: value.to(dtype) for name, value in optimizer.full_state_dict().items()}
    sent = optimizer.mesh.ledger.rows()
    optimizer.release()
    assert optimizer.mesh.ledger.rows() == sent  # on its own
    assert not optimizer.state
    assert all(is_sharded(param) == (stage == 3) for param in model.parameters())
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ShardError, match="release"):
        optimizer.step()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with ds_zero.GatheredParameters(model.parameters(), modifier_rank=1):
        for name, param in model.named_parameters():
            assert torch.equal(param, expected[name])
        if dist.get_rank() == 1:
            with torch.no_grad():
                model[0].weight.zero_()
    with torch.no_grad():
        if stage < 3:
            model[0].weight.zero_()  # it belongs to nobody
    expected["0.weight"].zero_()
    again = shard(model, stage=stage, **options)
    values = again.full_state_dict()
    assert all(torch.equal(values[name].to(dtype), value) for name, value in expected.items())
    fresh = make_model().to(dtype)
    fresh.load_state_dict(expected)
    fresh_optimizer = shard(fresh, stage=stage, **options)
    assert train(model, again, 2, dtype) == train(fresh, fresh_optimizer, 2, dtype)
    for each in (again, fresh_optimizer):
        each.close()
    ours = model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in fresh.state_dict().items())


def test_a_released_model_can_be_left_by_one_rank_alone():
    run_ranks(2, one_leaves)


def one_leaves() -> None:
    model = make_model()
    optimizer = shard(model, stage=3)
    if dist.get_rank() == 0:
        optimizer.release()
    comm.barrier(comm.Mesh.world().group("dp"))
