"""A part of a model alone at stage 3: the model inside a wrapper is run, trained, and fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero_loops import adamw
from zero_models import Language, tokens

import ds_zero
from ds_core.testing import run_ranks


class Wrapper(nn.Module):
    """Runs another model; callers may also run that itself, as generation does under PEFT."""

    def __init__(self, remat: str | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Language("tied", remat=remat)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(ids) * 2


@pytest.mark.parametrize("remat", [None, "reentrant", "non-reentrant"])
def test_the_model_inside_a_wrapper_runs_and_trains_alone(remat: str | None):
    run_ranks(2, alternate, remat)


def alternate(remat: str | None) -> None:
    torch.set_default_dtype(torch.float64)
    model, truth = Wrapper(remat), Wrapper(None)
    optimizer = ds_zero.shard(model, adamw(model.parameters()), 3, min_unit_numel=0)
    reference = adamw(truth.parameters())
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(4):
        ids = tokens(rank, step)
        with torch.no_grad():
            torch.testing.assert_close(model.inner(ids), truth.inner(ids))
            torch.testing.assert_close(model(ids), truth(ids))
        assert "sharded" in repr(model.inner.embed.weight)
        part = (lambda whole: whole.inner) if step % 2 == 0 else (lambda whole: whole)
        part(model)(ids).square().mean().backward()
        for other in range(world):
            (part(truth)(tokens(other, step)).square().mean() / world).backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
        reference.zero_grad()
    found = optimizer.full_state_dict()
    for name, value in truth.named_parameters():
        torch.testing.assert_close(found[name], value.detach())


def test_an_error_in_a_part_leaves_nothing_behind():
    run_ranks(2, fail_and_go_on)


def fail_and_go_on() -> None:
    model, truth = Wrapper(None), Wrapper(None)
    optimizer = ds_zero.shard(model, adamw(model.parameters()), 3, min_unit_numel=0)
    ids = tokens(dist.get_rank(), 0)
    for part in (model.inner, model):
        with pytest.raises(IndexError):
            part(ids + 10_000)
        assert "sharded" in repr(model.inner.blocks[0].up.weight)
        with torch.no_grad():
            torch.testing.assert_close(model.inner(ids), truth.inner(ids))
    model(ids).sum().backward()
    optimizer.step()
