"""safe_get_*, safe_set_*, generation and leaf modules on models that ds_zero or ds_core holds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import deepspeed
import ds_zero
from deepspeed import utils
from deepspeed._parameter_attributes import mark_model
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload, parameter_offload
from ds_core import comm
from ds_core.alone import Alone
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].bias.requires_grad_(False)
    return model


def sharded(stage: int, precision: Precision = BF16, **options):
    """A model of an engine, and what holds it."""
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if stage == 0:
        sharding = Replicated(model, optimizer, mesh=comm.Mesh.world(), precision=precision)
    else:
        sharding = ds_zero.shard(
            model, optimizer, stage, precision=precision, min_unit_numel=0, **options
        )
    mark_model(model, sharding)
    return model, sharding


def backward(model: nn.Module, sharding) -> None:
    x = torch.full((2, 6), 1.0 + dist.get_rank(), dtype=torch.bfloat16)
    model(x).float().square().sum().backward()


@pytest.mark.parametrize(
    ("stage", "place"),
    [(0, "device"), *((s, p) for s in (1, 2, 3) for p in ("device", "cpu", "nvme"))],
)
def test_full_values(stage: int, place: str, tmp_path):
    run_ranks(2, use_full_values, stage, place, str(tmp_path))


def use_full_values(stage: int, place: str, folder: str) -> None:
    options = {}
    if place != "device":
        offload = {"optimizer": place, "folder": folder if place == "nvme" else None}
        options["offload"] = ds_zero.Offload(**offload)
    model, sharding = sharded(stage, **options)
    weight, frozen = model[2].weight, model[0].bias
    assert utils.safe_get_full_grad(weight) is None
    truth = build()[2].weight.detach()
    assert torch.equal(utils.safe_get_full_fp32_param(weight), truth)
    backward(model, sharding)
    gradient = utils.safe_get_full_grad(weight)
    assert gradient.dtype is torch.float32
    assert gradient.abs().sum() > 0
    assert utils.safe_get_full_grad(frozen) is None
    utils.safe_set_full_grad(weight, torch.full((6, 6), 0.5))
    utils.safe_update_full_grad_vectorized(model.parameters(), double_first(weight))
    assert torch.equal(utils.safe_get_full_grad(weight), torch.full((6, 6), 1.0))
    sharding.update()
    state = utils.safe_get_full_optimizer_state(weight, "exp_avg")
    torch.testing.assert_close(state, torch.full((6, 6), 0.1))
    utils.safe_set_full_optimizer_state(weight, 2 * state, "exp_avg")
    assert torch.equal(utils.safe_get_full_optimizer_state(weight, "exp_avg"), 2 * state)
    utils.safe_set_full_fp32_param(weight, torch.full((6, 6), 0.125))
    assert torch.equal(utils.safe_get_full_fp32_param(weight), torch.full((6, 6), 0.125))
    with deepspeed.zero.GatheredParameters(weight):
        assert torch.equal(weight.float(), torch.full((6, 6), 0.125))


def double_first(weight: nn.Parameter):
    return lambda gradient, param: 2 * gradient if param is weight else gradient


def test_local_values():
    run_ranks(2, use_local_values)


def use_local_values() -> None:
    model, sharding = sharded(3)
    weight = model[2].weight
    backward(model, sharding)
    sharding.update()
    mine = utils.safe_get_local_fp32_param(weight)
    assert mine.numel() == weight.partition_numel()
    parts = [torch.empty(0)] * 2
    dist.all_gather_object(parts, mine.clone())
    assert torch.equal(torch.cat(parts), utils.safe_get_full_fp32_param(weight).flatten())
    utils.safe_set_local_fp32_param(weight, torch.full_like(mine, 0.25))
    with deepspeed.zero.GatheredParameters(weight):
        assert torch.equal(weight.float(), torch.full((6, 6), 0.25))
    for get, put, arguments in (
        (utils.safe_get_local_grad, utils.safe_set_local_grad, ()),
        (
            utils.safe_get_local_optimizer_state,
            utils.safe_set_local_optimizer_state,
            ("exp_avg_sq",),
        ),
    ):
        put(weight, torch.full_like(get(weight, *arguments), 0.5), *arguments)
        assert torch.equal(get(weight, *arguments), torch.full_like(get(weight, *arguments), 0.5))


def test_parameters_of_no_engine():
    param = nn.Parameter(torch.ones(2))
    assert utils.safe_get_full_fp32_param(param) is None
    assert utils.safe_get_full_optimizer_state(param, "exp_avg") is None
    assert utils.safe_get_full_grad(param) is None
    param.grad = torch.ones(2)
    utils.safe_set_full_grad(param, torch.zeros(2))
    assert torch.equal(utils.safe_get_full_grad(param), torch.zeros(2))
    with pytest.raises(ds_zero.ShardError, match="not sharded by stage 3; use the functions for"):
        utils.safe_get_local_fp32_param(param)


def test_attributes_follow_the_stage():
    run_ranks(2, compare_stages)


def compare_stages() -> None:
    with deepspeed.zero.Init(dtype=torch.float):
        model = build()
    status = deepspeed.zero.ZeroParamStatus
    assert hasattr(model[2].weight, "ds_id")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    held = ds_zero.shard(model, optimizer, 2)
    mark_model(model, held)
    assert not any(hasattr(param, "ds_id") for param in model.parameters())
    model, sharding = sharded(3)
    weight = model[2].weight
    assert weight.ds_status is status.NOT_AVAILABLE
    with sharding.gathered():
        assert weight.ds_status is status.AVAILABLE
    assert torch.equal(weight.ds_tensor.float(), utils.safe_get_local_fp32_param(weight).bfloat16())
    numbers = [0, 0]
    dist.all_gather_object(numbers, weight.partition_numel())
    assert sum(numbers) == weight.ds_numel == 36
    both = [None, None]
    # Counted in each process, of which one may have had models of its own before.
    first = next(model.parameters()).ds_id
    dist.all_gather_object(both, [param.ds_id - first for param in model.parameters()])
    assert both[0] == both[1] == list(range(6))


def test_a_model_of_stage_0_can_be_saved_as_it_is(tmp_path):
    run_ranks(1, save_whole, str(tmp_path / "model.pt"))


def save_whole(path: str) -> None:
    model = build()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sharding = Alone(model, optimizer, mesh=comm.Mesh.world())
    mark_model(model, sharding)
    torch.save(model, path)
    loaded = torch.load(path, weights_only=False)
    assert torch.equal(loaded[2].weight, model[2].weight)
    assert utils.safe_get_full_fp32_param(model[2].weight).shape == (6, 6)
    assert utils.safe_get_full_fp32_param(loaded[2].weight) is None
    del sharding
    assert utils.safe_get_full_fp32_param(model[2].weight) is None


# ---------------------------------------------------------------------- generation


def test_hooks_come_off_and_back_as_trl_does_it():
    run_ranks(2, generate_as_trl)


def generate_as_trl() -> None:
    model, sharding = sharded(3)
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace())
    engine.optimizer.parameter_offload = parameter_offload(engine)
    x = torch.ones(1, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(x)
    with deepspeed.zero.GatheredParameters(model.parameters()), torch.no_grad():
        parts = engine.optimizer.parameter_offload
        assert isinstance(parts, DeepSpeedZeRoOffload)
        own = parts.module.named_parameters(recurse=True)
        for _, param in itertools.chain(own, parts.module.ds_external_parameters()):
            param.ds_active_sub_modules.clear()
        for hook in [*parts.forward_hooks, *parts.backward_hooks]:
            hook.remove()
        parts.forward_hooks, parts.backward_hooks = [], []
        sent = sum(row.sent_bytes for row in sharding.mesh.ledger.rows())
        assert torch.equal(model(x), expected)
        assert sum(row.sent_bytes for row in sharding.mesh.ledger.rows()) == sent
        assert not model[2]._forward_pre_hooks
        coordinator = parts.param_coordinator
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        parts._register_deepspeed_module(parts.module)
    assert model[2]._forward_pre_hooks
    backward(model, sharding)
    sharding.update()
    with pytest.raises(ds_zero.ShardError, match="expected the engine's own Sequential"):
        parts._register_deepspeed_module(nn.Linear(1, 1))
    engine.parameters = model.parameters
    with deepspeed.zero.unwrap_model_for_generation(engine) as unwrapped, torch.no_grad():
        assert unwrapped is engine
        assert model(x).shape == (1, 3)
    assert "sharded" in repr(model[2].weight)
    with pytest.raises(ds_zero.ShardError, match="no parameter of the engine's model is sharded"):
        parameter_offload(SimpleNamespace(module=nn.Linear(1, 1)))


# ---------------------------------------------------------------------- leaf modules


def test_leaf_modules_by_class_name_and_end_of_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert utils.set_z3_leaf_modules(model, [nn.Linear]) == [model[0], model[1][0]]
    assert utils.z3_leaf_module(model[0])
    assert utils.get_z3_leaf_modules(model) == [model[0], model[1][0]]
    assert utils.unset_z3_leaf_modules(model, ["Linear"]) == [model[0], model[1][0]]
    assert utils.get_z3_leaf_modules(model) == []
    full = ["torch.nn.modules.activation.ReLU"]
    assert utils.set_z3_leaf_modules(model, full) == [model[1][1]]
    assert utils.set_z3_leaf_modules_by_name(model, ["1", "x"], raise_if_not_found=False) == (
        [model[1]],
        ["x"],
    )
    assert utils.set_z3_leaf_modules_by_suffix(model, [".0"], flag=False) == ([model[1][0]], [])
    assert utils.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(ValueError, match="Sequential has no module of"):
        utils.set_z3_leaf_modules(model, ["Nothing"])
    with pytest.raises(ValueError, match="has no module named x; its modules are 0, 1"):
        utils.set_z3_leaf_modules_by_name(model, ["x"])
    with pytest.raises(ValueError, match="got 3, expected classes or their names"):
        utils.set_z3_leaf_modules(model, [3])


def test_leaf_modules_are_one_unit():
    run_ranks(2, shard_leaves)


def shard_leaves() -> None:
    model = nn.Sequential(nn.Linear(4, 4), ds_zero.TiledLinear(4, 4, out_splits=2))
    utils.set_z3_leaf_modules(model, ["TiledLinear"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sharding = ds_zero.shard(model, optimizer, 3, min_unit_numel=0)
    mark_model(model, sharding)
    assert not any("linears" in unit.name for unit in sharding.units)
    assert utils.z3_leaf_parameter(model[1].linears[0][0].weight)
    assert not utils.z3_leaf_parameter(model[0].weight)
