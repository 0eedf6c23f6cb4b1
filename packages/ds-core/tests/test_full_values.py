"""Stage 0: values, gradients and states of a whole model, read and written by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ds_core import comm
from ds_core.alone import Alone
from ds_core.errors import DsError, OptimizerError
from ds_core.optim import Lion
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.seams import FullValues
from ds_core.testing import run_ranks

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)


@pytest.mark.parametrize("world_size", [1, 2], ids=["alone", "replicated"])
@pytest.mark.parametrize("precision", [Precision(), BF16], ids=["fp32", "bf16-master"])
def test_reading_and_writing(world_size: int, precision: Precision):
    run_ranks(world_size, read_and_write, precision)


def sharded(precision: Precision, make=torch.optim.AdamW) -> tuple[nn.Module, Replicated | Alone]:
    torch.manual_seed(0)
    model, mesh = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), comm.Mesh.world()
    model[0].bias.requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cls = Alone if mesh.group("dp").size == 1 else Replicated
    return model, cls(model, optimizer, mesh=mesh, precision=precision)


def backward(model: nn.Module) -> None:
    rank = torch.distributed.get_rank()
    x = torch.full((2, 3), 1.0 + rank, dtype=model[0].weight.dtype)
    model(x).float().square().sum().backward()


def read_and_write(precision: Precision) -> None:
    model, sharding = sharded(precision)
    assert isinstance(sharding, FullValues)
    assert sharding.full_gradient("0.weight") is None
    with pytest.raises(OptimizerError, match=r"'exp_avg' of '1\.bias': AdamW has no state before"):
        sharding.full_optimizer_state("1.bias", "exp_avg")
    backward(model)
    found = sharding.full_gradient("1.bias")
    norm = float(sharding.grad_norm())
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    squares = [sharding.full_gradient(name).double().square().sum() for name in names]
    assert norm == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-6)
    assert sharding.full_gradient("0.bias") is None
    sharding.set_full_gradient("1.bias", 2 * found)
    assert torch.equal(sharding.full_gradient("1.bias"), 2 * found)
    sharding.update()
    state = sharding.full_optimizer_state("1.bias", "exp_avg")
    torch.testing.assert_close(state, 0.2 * found.to(state.dtype), rtol=1e-3, atol=0)
    sharding.set_full_optimizer_state("1.bias", "exp_avg", torch.full((2,), 5.0))
    assert torch.equal(
        sharding.full_optimizer_state("1.bias", "exp_avg"), torch.full((2,), 5.0).to(state.dtype)
    )
    sharding.set_full_parameter("1.bias", torch.tensor([1.0, 2.0]))
    assert torch.equal(sharding.full_parameter("1.bias"), torch.tensor([1.0, 2.0]))
    assert model[1].bias.tolist() == [1.0, 2.0]


def test_a_gradient_that_was_set_is_stepped_without_a_backward():
    run_ranks(2, step_what_was_set)


def step_what_was_set() -> None:
    model, sharding = sharded(Precision(), Lion)
    before = model[0].weight.detach().clone()
    sharding.set_full_gradient("1.bias", torch.ones(2))
    sharding.update()
    assert torch.equal(model[0].weight, before)
    assert model[1].bias.grad is None
    assert sharding.full_optimizer_state("1.bias", "exp_avg").shape == (2,)


def test_refusals():
    run_ranks(2, refuse)


def refuse() -> None:
    model, sharding = sharded(Precision())
    with pytest.raises(DsError, match=r"'2\.weight' is not one of the 4 of the model"):
        sharding.full_parameter("2.weight")
    with pytest.raises(DsError, match=r"'0\.bias' is frozen: it has no gradient"):
        sharding.set_full_gradient("0.bias", torch.zeros(4))
    backward(model)
    sharding.update()
    with pytest.raises(OptimizerError, match=r"'momentum' of '1\.bias': AdamW has exp_avg"):
        sharding.set_full_optimizer_state("1.bias", "momentum", torch.zeros(2))
