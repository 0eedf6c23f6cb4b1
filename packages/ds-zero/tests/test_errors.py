from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from zero_loops import adamw, sharded, sharded_steps
from zero_models import CASES, WIDTH, Block, Stack, vectors

import ds_zero
from ds_core.comm import Mesh
from ds_core.errors import CommError, ModelMismatchError
from ds_core.testing import die, die_on_call, run_ranks
from ds_zero.unit import Unit

# ---------------------------------------------------------------------- what shard() is given


def refused(make_optimizer, message: str, stage: int = 2, model: nn.Module | None = None) -> None:
    model = Stack() if model is None else model
    with pytest.raises(ds_zero.ShardError, match=message):
        ds_zero.shard(model, make_optimizer(model), stage)


@pytest.mark.parametrize("stage", [0, 4, "2", None])
def test_wrong_stage(stage: object):
    refused(lambda m: adamw(m.parameters()), r"stage: got .*, expected 1, 2 or 3", stage)


def test_negative_prefetch():
    model = Stack()
    with pytest.raises(ds_zero.ShardError, match="prefetch: got -1, expected 0 or more"):
        ds_zero.shard(model, adamw(model.parameters()), 3, prefetch=-1)


def test_foreign_parameter():
    run_ranks(1, foreign)


def foreign() -> None:
    refused(
        lambda m: adamw([*m.parameters(), nn.Parameter(torch.zeros(3, 2))]),
        r"parameter 28 of group 0, of shape \[3, 2\], is not a parameter of the model",
    )


def test_missing_parameter():
    run_ranks(1, missing)


def missing() -> None:
    refused(
        lambda m: adamw(list(m.parameters())[2:]),
        "lacks 2 trainable parameters of the model, the first is 'entry.weight'",
    )


def test_nothing_trainable():
    run_ranks(1, nothing_trainable)


def nothing_trainable() -> None:
    model = Stack().requires_grad_(False)
    refused(
        lambda m: adamw(list(m.parameters())),
        r"Stack has no trainable parameter \(28 frozen\)",
        model=model,
    )


def test_optimizers_that_need_whole_matrices():
    run_ranks(1, whole_matrices)


def whole_matrices() -> None:
    for kind in (torch.optim.LBFGS, torch.optim.Adafactor):
        refused(lambda m, kind=kind: kind(m.parameters()), f"{kind.__name__} computes its update")


def test_not_an_optimizer():
    run_ranks(1, not_an_optimizer)


def not_an_optimizer() -> None:
    refused(lambda m: "adam", "optimizer: got str, expected a torch.optim.Optimizer")


def test_optimizer_that_has_stepped():
    run_ranks(1, stepped)


def stepped() -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = adamw(model.parameters())
        model(vectors(0, 0)).sum().backward()
        optimizer.step()
        return optimizer

    refused(make, "it has taken steps already")


def test_unknown_unit():
    run_ranks(1, unknown_unit)


def unknown_unit() -> None:
    model = Stack()
    with pytest.raises(ds_zero.ShardError, match="'layers' matches no module of Stack"):
        ds_zero.shard(model, adamw(model.parameters()), 3, units=["layers"])


def test_new_parameter_group():
    run_ranks(1, new_group)


def new_group() -> None:
    _, optimizer = sharded(CASES["stack"], 2)
    with pytest.raises(ds_zero.ShardError, match="add_param_group: the units are laid out already"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_model_sharded_twice():
    run_ranks(2, shard_twice)


def shard_twice() -> None:
    for stage in (2, 3):
        model, _optimizer = sharded(CASES["stack"], stage)
        with pytest.raises(ds_zero.ShardError, match="sharded already"):
            ds_zero.shard(model, adamw(model.parameters()), stage)


# ---------------------------------------------------------------------- ranks that differ


@pytest.mark.parametrize(
    ("kind", "name"),
    [("shape", "blocks.2.up.weight"), ("missing", "blocks.3"), ("frozen", "exit.bias")],
)
def test_models_that_differ_are_named_on_every_rank(kind: str, name: str):
    for message in run_ranks(3, differing, kind):
        assert name in message
        assert "rank 0: " in message
        assert "rank 2: " in message


def differing(kind: str) -> str:
    odd = dist.get_rank() == 2
    model = Stack(3 if kind == "missing" and odd else 4)
    if kind == "shape" and odd:
        model.blocks[2] = Block(WIDTH, 18)
    if kind == "frozen" and odd:
        model.exit.bias.requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ModelMismatchError, match="the ranks hold different models") as caught:
        ds_zero.shard(model, optimizer, 3)
    return str(caught.value)


def test_differing_values_become_those_of_rank_0(stage: int):
    run_ranks(2, differing_values, stage)


def differing_values(stage: int) -> None:
    torch.manual_seed(dist.get_rank())
    model = Stack()
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage, min_unit_numel=0)
    torch.manual_seed(0)
    for name, param in Stack().named_parameters():
        assert torch.equal(optimizer.full_parameter(name), param)


# ---------------------------------------------------------------------- sharded parameters


def test_reading_a_sharded_parameter_outside_a_pass():
    run_ranks(2, read_outside)


def read_outside() -> None:
    model, _ = sharded(CASES["stack"], 3)
    message = r"'entry.weight' is sharded \(ZeRO stage 3\) and .* needs its values: use .*Gathered"
    for read in (
        lambda p: p.sum(),
        lambda p: p + 1,
        lambda p: p.tolist(),
        lambda p: p.detach() + 1,
        lambda p: p.data,
        lambda p: torch.cat([p, p]),
        lambda p: p.clone(),
    ):
        with pytest.raises(ds_zero.ShardError, match=message):
            read(model.entry.weight)


def test_a_state_dict_outside_a_pass_tells_names_and_shapes():
    run_ranks(2, tell_state_dict)


def tell_state_dict() -> None:
    model, optimizer = sharded(CASES["stack"], 3)
    truth = optimizer.full_state_dict()
    if dist.get_rank() == 0:  # nothing is sent
        model.state_dict()
    found = model.state_dict()
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in truth.items()
    }
    assert not found["entry.weight"].requires_grad
    with pytest.raises(ds_zero.ShardError, match=r"'entry.weight' is sharded .* sum needs its"):
        found["entry.weight"].sum()
    with pytest.raises(ds_zero.ShardError, match="needs its values"):
        torch.save(found, os.devnull)
    # It has its own copy of them: the model's are gone after the block.
    with ds_zero.GatheredParameters(model.parameters()):
        assert torch.equal(found["entry.weight"], truth["entry.weight"])
    assert torch.equal(found["entry.weight"], truth["entry.weight"])
    assert type(found["entry.weight"]) is torch.Tensor


# ---------------------------------------------------------------------- ranks that die


@pytest.mark.parametrize("place", ["forward", "backward", "step"])
@pytest.mark.parametrize("stage", [2, 3])
def test_others_name_the_rank_that_was_killed(place: str, stage: int):
    dead, survivor = run_ranks(2, be_killed, place, stage, deaths={0: 9})
    assert dead.signum == 9
    assert "rank 0 stopped answering" in survivor


def test_all_survivors_name_the_rank_that_was_killed():
    first, dead, last = run_ranks(3, be_killed, "backward", 3, deaths={1: 9}, victim=1)
    assert dead.signum == 9
    assert "rank 1 stopped answering" in first
    assert "rank 1 stopped answering" in last


def be_killed(place: str, stage: int, victim: int = 0) -> str:
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 1)

    def kill(*_: object) -> None:
        die()

    def kill_later(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.register_hook(kill)

    if dist.get_rank() == victim:
        if place == "step":
            with die_on_call(Unit, "publish", nth=2):
                sharded_steps(model, optimizer, case, 1)
        model.blocks[2].register_forward_hook(kill if place == "forward" else kill_later)

    def go_on() -> None:
        for step in range(3):
            case.loss(model, vectors(0, step), 0, step).backward()
            optimizer.step()

    with pytest.raises(CommError) as caught:
        go_on()
    return str(caught.value)


def test_mesh_without_data_parallel_ranks_is_not_needed():
    run_ranks(1, on_one_rank)


def on_one_rank() -> None:
    for stage in (1, 2, 3):
        model, optimizer = sharded(CASES["stack"], stage, mesh=Mesh(dp=1))
        first = sharded_steps(model, optimizer, CASES["stack"], 2)
        assert first[0] != first[1]
