"""The optimizers of ds-ops on the flat shards of ds-zero: the results of one rank, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_ops
import ds_zero
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks
from ds_ops.optim import adam
from ds_zero.host_steps import early_updates

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "adam": lambda m: ds_ops.FusedAdam(m.parameters(), lr=0.01, weight_decay=0.1),
    "adam-bf16-states": lambda m: ds_ops.FusedAdam(
        m.parameters(), lr=0.01, fp32_optimizer_states=False
    ),
    "cpu-adam": lambda m: ds_ops.CPUAdam(m.parameters(), lr=0.01, bias_correction=False),
    "lion": lambda m: ds_ops.FusedLion(m.parameters(), lr=0.003),
    "adagrad": lambda m: ds_ops.CPUAdagrad(m.parameters(), initial_accumulator_value=0.1),
    "sgd": lambda m: ds_ops.FusedSGD(m.parameters(), lr=0.05, momentum=0.9),
    "muon": lambda m: ds_ops.Muon(m.named_parameters(), lr=0.01, weight_decay=0.1),
    "adam8bit": lambda m: ds_ops.Adam8bit(m.parameters(), lr=0.01),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 19)
        self.layers = nn.ModuleList([nn.Linear(19, 37), nn.Linear(37, 19), nn.Linear(19, 11)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.layers[2](x).float(), tokens)


def train(model: nn.Module, sharding: Any, steps: int, scale: float) -> list[float]:
    """Every rank sees the same tokens, so that the average of gradients is exact."""
    losses = []
    for step in range(steps):
        tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
        loss = model(tokens)
        loss.backward()
        sharding.update(scale)
        sharding.zero_grad()
        losses.append(loss.item())
    return losses


def nets() -> tuple[Net, Net]:
    torch.manual_seed(0)
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    return first, second


def equals_whole(name: str, stage: int, low: bool, scale: float) -> None:
    from ds_core import comm

    mesh, precision = comm.Mesh.world(), BF16 if low else Precision()
    whole, shared = nets()
    truth = Replicated(whole, MAKERS[name](whole), mesh=mesh, precision=precision)
    optimizer = ds_zero.shard(
        shared, MAKERS[name](shared), stage, mesh=mesh, precision=precision, min_unit_numel=0
    )
    # Blocks of 8-bit states begin elsewhere in a flat shard than in a parameter.
    tolerance = 0.05 if name == "adam8bit" else 1e-2 if low else 1e-5
    expected = train(whole, truth, 12, scale)
    assert train(shared, optimizer, 12, scale) == pytest.approx(expected, rel=tolerance)
    if name == "adam8bit":
        return
    values = truth.full_state_dict()
    for key, value in optimizer.full_state_dict().items():
        assert torch.allclose(value, values[key], rtol=tolerance, atol=tolerance / 10), key


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_stage_gives_what_whole_parameters_give(name: str, low: bool):
    for stage in (1, 2, 3):
        run_ranks(2, equals_whole, name, stage, low, 1.0 if low else 0.5, timeout_s=120)


def steps_in_one_pass(stage: int) -> None:
    calls: list[tuple[torch.dtype, ...]] = []
    kernel = adam.adam_step_

    def counted(param: torch.Tensor, grad: torch.Tensor, *args: Any, **options: Any) -> None:
        low = options["copy"]
        shards = [unit.shard.untyped_storage().data_ptr() for unit in optimizer.units]
        assert low.untyped_storage().data_ptr() in shards
        calls.append((param.dtype, grad.dtype, low.dtype, options["grad_scale"].dtype))
        kernel(param, grad, *args, **options)

    adam.adam_step_ = counted
    try:
        model, _ = nets()
        optimizer = ds_zero.shard(model, MAKERS["adam"](model), stage, precision=BF16)
        casts = []
        for unit in optimizer.units:
            unit.refresh = lambda: casts.append(1)  # type: ignore[method-assign]
        train(model, optimizer, 3, 0.5)
        assert casts == []  # no pass of its own that rounds
        low = torch.bfloat16
        assert set(calls) == {(torch.float32, low, low, torch.float32)}
        assert len(calls) == 3 * sum(len(unit.optimizer_pieces) for unit in optimizer.units)
        for unit in optimizer.units:
            assert unit.master is not None
            assert torch.equal(unit.shard, unit.master.bfloat16())
    finally:
        adam.adam_step_ = kernel


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_gradients_and_scale_pass_through_one_kernel(stage: int):
    run_ranks(2, steps_in_one_pass, stage, timeout_s=120)


def losses_are_those_of_torch(stage: int) -> None:
    ours, theirs = nets()
    optimizer = ds_zero.shard(ours, MAKERS["adam"](ours), stage, precision=BF16)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    torchs = ds_zero.shard(theirs, other, stage, precision=BF16)
    expected = train(theirs, torchs, 15, 0.5)
    assert train(ours, optimizer, 15, 0.5) == pytest.approx(expected, rel=1e-2)
    names = {key for values in optimizer.state.values() for key in values}
    assert names == {key for values in torchs.state.values() for key in values}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_are_those_with_torchs_adam(stage: int):
    run_ranks(2, losses_are_those_of_torch, stage, timeout_s=120)


def goes_on_as_if_never_stopped(stage: int, name: str) -> None:
    """What a checkpoint does: state by parameter name, filled in place, in another unit layout."""
    first, second = nets()
    optimizer = ds_zero.shard(first, MAKERS[name](first), stage, min_unit_numel=0)
    train(first, optimizer, 3, 1.0)
    saved = optimizer.state_dict()
    kept = {
        key: {param: _whole(value) for param, value in by_name.items()}
        for key, by_name in saved["state"].items()
    }
    values = optimizer.full_state_dict()

    second.load_state_dict(values)
    again = ds_zero.shard(second, MAKERS[name](second), stage, min_unit_numel=0)
    again.prepare_load()
    published = again.state_dict()
    for key, by_name in published["state"].items():
        for param, value in by_name.items():
            getattr(value, "local", value).copy_(kept[key][param])
    again.load_state_dict(published)
    for key in ("exp_avg", "exp_avg_sq"):
        mine = again.full_optimizer_state("layers.0.weight", key)
        assert torch.equal(mine, optimizer.full_optimizer_state("layers.0.weight", key))
        assert float(mine.norm()) > 0
    assert train(first, optimizer, 3, 1.0) == train(second, again, 3, 1.0)


def _whole(value: torch.Tensor) -> torch.Tensor:
    return getattr(value, "local", value).clone()


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("name", ["adam", "adam8bit"])
def test_a_run_goes_on_from_its_saved_state(name: str, stage: int):
    run_ranks(2, goes_on_as_if_never_stopped, stage, name, timeout_s=120)


def some_are_not_used(name: str) -> None:
    """Parameters that skip a step get states of their own, cut out of packed ones."""
    model, _ = nets()
    optimizer = ds_zero.shard(model, MAKERS[name](model), 2)
    train(model, optimizer, 2, 1.0)
    before = optimizer.full_parameter("layers.2.weight")
    model.embed(torch.arange(3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(optimizer.full_parameter("layers.2.weight"), before)
    assert train(model, optimizer, 10, 1.0)[-1] < 2.2


@pytest.mark.parametrize("name", ["adam", "adam8bit", "muon"])
def test_parameters_that_no_rank_used_are_left_alone(name: str):
    run_ranks(2, some_are_not_used, name, timeout_s=120)


def packed_state_can_be_edited() -> None:
    model, _ = nets()
    optimizer = ds_zero.shard(model, MAKERS["adam8bit"](model), 3, min_unit_numel=0)
    train(model, optimizer, 1, 1.0)
    value = torch.full((37, 19), 0.25)
    optimizer.set_full_optimizer_state("layers.0.weight", "exp_avg", value)
    assert torch.equal(optimizer.full_optimizer_state("layers.0.weight", "exp_avg"), value)


def test_packed_state_can_be_edited_by_name():
    run_ranks(2, packed_state_can_be_edited, timeout_s=120)


class Spoiled(torch.autograd.Function):
    """The same values, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("nan")


def flag_on_the_device_leaves_updates_out() -> None:
    """An early update that the host may not decide on, by an optimizer that counts no steps."""
    known, early_updates._is_known = early_updates._is_known, lambda _: False
    try:
        model, _ = nets()
        optimizer = ds_zero.shard(
            *(model, MAKERS["lion"](model), 2), min_unit_numel=0, update_in_backward=True
        )
        train(model, optimizer, 2, 1.0)
        before = {key: value.clone() for key, value in optimizer.full_state_dict().items()}
        states = [state["exp_avg"].clone() for state in optimizer.state.values()]
        hook = model.layers[2].register_forward_hook(lambda _, args, out: Spoiled.apply(out))
        model(torch.arange(11)).backward()
        hook.remove()
        with pytest.raises(ds_zero.ShardError, match="no unit was updated"):
            optimizer.step()
        optimizer.zero_grad()
        assert optimizer.torn is None
        for key, value in optimizer.full_state_dict().items():
            assert torch.equal(value, before[key]), key
        after = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(torch.equal(one, other) for one, other in zip(states, after, strict=True))
        train(model, optimizer, 1, 1.0)
    finally:
        early_updates._is_known = known


def test_a_flag_on_the_device_leaves_early_updates_out():
    run_ranks(2, flag_on_the_device_leaves_updates_out, timeout_s=120)
