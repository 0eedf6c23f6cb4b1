from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from zero_loops import adamw, plain, sharded, sharded_steps
from zero_models import CASES, Stack

import ds_zero
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero.offload import Offload

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
NAME = "blocks.1.up.weight"


def test_full_values_are_those_of_one_process(stage: int):
    run_ranks(3, read_full, stage)


def read_full(stage: int) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    assert optimizer.full_gradient(NAME) is None
    sharded_steps(model, optimizer, case, 2)
    truth, reference, _ = plain(case, 2)
    rank, world = dist.get_rank(), dist.get_world_size()
    case.loss(model, case.inputs(rank, 2), rank, 2).backward()
    for other in range(world):
        (case.loss(truth, case.inputs(other, 2), other, 2) / world).backward()
    for name, param in truth.named_parameters():
        torch.testing.assert_close(optimizer.full_parameter(name), param.detach())
        torch.testing.assert_close(optimizer.full_gradient(name), param.grad)
        for key in ("exp_avg", "exp_avg_sq"):
            found = optimizer.full_optimizer_state(name, key)
            torch.testing.assert_close(found, reference.state[param][key])


def test_parameters_may_be_named_by_themselves(stage: int):
    run_ranks(2, read_by_parameter, stage)


def read_by_parameter(stage: int) -> None:
    model, optimizer = sharded(CASES["stack"], stage)
    found = optimizer.full_parameter(model.blocks[1].up.weight)
    assert torch.equal(found, optimizer.full_parameter(NAME))


@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16-master"])
def test_writing_full_values(precision: Precision | None, stage: int):
    run_ranks(2, write_full, stage, precision)


def write_full(stage: int, precision: Precision | None) -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, stage, precision=precision)
    sharded_steps(model, optimizer, case, 1)
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    value = torch.linspace(-1, 1, 17 * 12).view(17, 12)
    optimizer.set_full_parameter(NAME, value)
    optimizer.set_full_gradient(NAME, 2 * value)
    optimizer.set_full_optimizer_state(NAME, "exp_avg", 3 * value)
    assert torch.equal(optimizer.full_parameter(NAME), value)
    grad = optimizer.full_gradient(NAME)
    assert torch.equal(grad, (2 * value).to(grad.dtype))
    assert torch.equal(optimizer.full_optimizer_state(NAME, "exp_avg"), 3 * value)
    with optimizer.gathered():
        assert torch.equal(model.blocks[1].up.weight, value.to(model.blocks[1].up.weight.dtype))
    others = optimizer.full_parameter("blocks.1.down.weight")
    assert not torch.equal(others, torch.zeros_like(others))


def test_gradient_set_without_a_backward(stage: int):
    run_ranks(2, set_only_gradient, stage)


def set_only_gradient(stage: int) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 1)
    before = optimizer.full_state_dict()
    optimizer.set_full_gradient(NAME, torch.full((17, 12), 0.5))
    assert optimizer.grad_norm().item() == pytest.approx((17 * 12 * 0.25) ** 0.5)
    optimizer.step()
    after = optimizer.full_state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {NAME}


def test_local_values_are_parts_of_the_full_one(stage: int):
    run_ranks(3, read_local, stage)


def read_local(stage: int) -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, stage)
    sharded_steps(model, optimizer, case, 1)
    case.loss(model, case.inputs(0, 1), 0, 1).backward()
    for kind, full in (
        ("parameter", optimizer.full_parameter(NAME)),
        ("gradient", optimizer.full_gradient(NAME)),
        ("exp_avg", optimizer.full_optimizer_state(NAME, "exp_avg")),
    ):
        parts: list[torch.Tensor] = [torch.empty(0)] * 3
        dist.all_gather_object(parts, optimizer.local_value(NAME, kind).clone())
        assert torch.equal(torch.cat(parts), full.flatten()), kind


def test_local_edit_shows_after_publish(stage: int):
    run_ranks(2, edit_local, stage)


def edit_local(stage: int) -> None:
    _, optimizer = sharded(CASES["stack"], stage, precision=BF16)
    with torch.no_grad():
        optimizer.local_value(NAME, "parameter").fill_(0.25)
    optimizer.publish()
    assert torch.equal(optimizer.full_state_dict()[NAME], torch.full((17, 12), 0.25).bfloat16())


@pytest.mark.parametrize("modifier", [0, 1])
@pytest.mark.parametrize("precision", [None, BF16], ids=["fp32", "bf16-master"])
def test_gathered_parameters_keep_the_edits_of_one_rank(
    modifier: int, precision: Precision | None, stage: int
):
    run_ranks(2, edit_gathered, stage, modifier, precision)


def edit_gathered(stage: int, modifier: int, precision: Precision | None) -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, stage, precision=precision)
    weight = model.blocks[1].up.weight
    with ds_zero.GatheredParameters([weight], modifier_rank=modifier), torch.no_grad():
        assert weight.shape == (17, 12)
        if dist.get_rank() == modifier:
            weight.fill_(0.5)
    assert torch.equal(optimizer.full_parameter(NAME), torch.full((17, 12), 0.5))
    assert torch.equal(optimizer.full_state_dict()[NAME].float(), torch.full((17, 12), 0.5))
    sharded_steps(model, optimizer, case, 1)


def test_gathered_parameters_without_modifier_are_read_only_at_stage3():
    run_ranks(2, read_gathered)


def read_gathered() -> None:
    model, optimizer = sharded(CASES["stack"], 3)
    before = optimizer.full_parameter(NAME)
    with ds_zero.GatheredParameters(model.parameters()):
        assert torch.equal(model.blocks[1].up.weight, before)
        model.blocks[1].up.weight.data.zero_()
    assert torch.equal(optimizer.full_parameter(NAME), before)


def test_gathered_parameters_under_init(stage: int):
    run_ranks(2, edit_under_init, stage)


def edit_under_init(stage: int) -> None:
    with ds_zero.Init():
        model = Stack()
    bias = model.blocks[0].up.bias
    with ds_zero.GatheredParameters(bias, modifier_rank=1), torch.no_grad():
        if dist.get_rank() == 1:
            bias.fill_(7.0)
    optimizer = ds_zero.shard(model, adamw(model.parameters()), stage, min_unit_numel=0)
    assert torch.equal(optimizer.full_parameter("blocks.0.up.bias"), torch.full((17,), 7.0))


def test_disabled_gathered_parameters_do_nothing():
    run_ranks(2, gather_disabled)


def gather_disabled() -> None:
    model, _ = sharded(CASES["stack"], 3)
    with ds_zero.GatheredParameters(model.parameters(), enabled=False):
        assert "sharded" in repr(model.entry.weight)


def test_forward_and_backward_while_some_units_are_held():
    run_ranks(2, train_while_held)


def train_while_held() -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES["stack"]
    model, optimizer = sharded(case, 3)
    with ds_zero.GatheredParameters(model.blocks[1].parameters()):
        found = sharded_steps(model, optimizer, case, 2)
        assert "sharded" in repr(model.blocks[0].up.weight)
    found += sharded_steps(model, optimizer, case, 2, first=2)
    assert found == pytest.approx(plain(case, 4)[2], abs=1e-9)


# ---------------------------------------------------------------------- misuse


def test_modifier_rank_must_exist():
    run_ranks(2, wrong_modifier)


def wrong_modifier() -> None:
    model, _ = sharded(CASES["stack"], 3)
    with pytest.raises(ds_zero.ShardError, match=r"modifier_rank=2 is outside 0\.\.1"):
        ds_zero.GatheredParameters(model.parameters(), modifier_rank=2)


def test_unknown_names_are_refused():
    run_ranks(2, wrong_names)


def wrong_names() -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, 3)
    sharded_steps(model, optimizer, case, 1)
    with pytest.raises(ds_zero.ShardError, match=r"'blocks\.9' is not one of the 28"):
        optimizer.full_parameter("blocks.9")
    with pytest.raises(ds_zero.ShardError, match=r"of shape \[3\] is not one of"):
        optimizer.full_parameter(torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(ds_zero.ShardError, match="'momentum': AdamW has exp_avg, exp_avg_sq"):
        optimizer.full_optimizer_state(NAME, "momentum")
    with pytest.raises(ds_zero.ShardError, match=r"got shape \[2\], expected \[17, 12\]"):
        optimizer.set_full_parameter(NAME, torch.zeros(2))


def test_state_before_the_first_step_is_refused_on_every_rank():
    run_ranks(4, state_too_early)


def state_too_early() -> None:
    _, optimizer = sharded(CASES["stack"], 3)
    with pytest.raises(ds_zero.ShardError, match="no state before its first step"):
        optimizer.full_optimizer_state("exit.bias", "exp_avg")


def test_frozen_parameter_has_no_state():
    run_ranks(2, frozen_state)


def frozen_state() -> None:
    case = CASES["lora"]
    model, optimizer = sharded(case, 2)
    sharded_steps(model, optimizer, case, 1)
    assert optimizer.full_parameter("blocks.0.base.up.weight").shape == (17, 12)
    assert optimizer.full_gradient("blocks.0.base.up.weight") is None
    with pytest.raises(ds_zero.ShardError, match="is frozen: it has no optimizer state"):
        optimizer.full_optimizer_state("blocks.0.base.up.weight", "exp_avg")


# ---------------------------------------------------------------------- holding and local parts


def test_parameters_of_init_stay_whole_whatever_else_is_touched():
    run_ranks(2, hold_many_of_init)


def hold_many_of_init() -> None:
    torch.manual_seed(0)
    with ds_zero.Init():
        model = Stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    block = model.blocks[0]
    order = list(block.parameters())
    if dist.get_rank() == 1:
        order.reverse()  # ranks need not name them in one order
    with ds_zero.GatheredParameters([*order, None, order[0]], modifier_rank=0), torch.no_grad():
        assert not any("sharded" in repr(param) for param in block.parameters())
        if dist.get_rank() == 0:  # nothing here may wait for the other rank
            for param in block.parameters():
                param.fill_(3.0)
    for name, value in model.state_dict().items():
        expected = torch.full_like(before[name], 3.0) if "blocks.0." in name else before[name]
        assert torch.equal(value, expected), name


def test_edits_without_modifier_and_after_an_error_are_lost_under_init():
    run_ranks(2, lose_edits_of_init)


def lose_edits_of_init() -> None:
    with ds_zero.Init():
        model = Stack()
    weight = model.exit.weight
    before = weight.detach().clone()
    with ds_zero.GatheredParameters(weight):
        weight.data.zero_()
    assert torch.equal(weight, before)
    with pytest.raises(ZeroDivisionError):
        edit_and_fail(weight)
    assert torch.equal(weight, before)
    weight.data.add_(1)  # touched, and not stored yet
    with ds_zero.GatheredParameters(weight):
        assert torch.equal(weight, before + 1)


def test_holders_of_one_unit_may_leave_in_any_order():
    run_ranks(2, leave_in_any_order)


def leave_in_any_order() -> None:
    model, _ = sharded(CASES["untied"], 3)
    up, down = model.blocks[1].up.weight, model.blocks[1].down.weight
    first, second = ds_zero.GatheredParameters(up), ds_zero.GatheredParameters(down)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "sharded" not in repr(down)
    second.__exit__(None, None, None)
    assert "sharded" in repr(down)


def test_generation_without_hooks():
    run_ranks(2, compute_without_hooks)


def compute_without_hooks() -> None:
    case = CASES["stack"]
    model, optimizer = sharded(case, 3)
    truth = plain(case, 1)[2]
    with optimizer.gathered(), torch.no_grad():
        expected = model(case.inputs(0, 0))
        optimizer.remove_hooks()
        assert torch.equal(model(case.inputs(0, 0)), expected)
        optimizer.restore_hooks()
        optimizer.restore_hooks()
    assert sharded_steps(model, optimizer, case, 1) == pytest.approx(truth, abs=1e-6)


def edit_and_fail(weight: torch.nn.Parameter) -> None:
    with ds_zero.GatheredParameters(weight, modifier_rank=0):
        weight.data.zero_()
        raise ZeroDivisionError


@pytest.mark.parametrize("offloaded", [False, True], ids=["device", "nvme"])
def test_setting_local_values(offloaded: bool, stage: int, tmp_path):
    run_ranks(2, set_local, stage, tmp_path if offloaded else None)


def set_local(stage: int, folder) -> None:
    options = {"precision": BF16}
    if folder is not None:
        options["offload"] = Offload(optimizer="nvme", folder=folder)
    case = CASES["untied"]
    model, optimizer = sharded(case, stage, **options)
    sharded_steps(model, optimizer, case, 1)
    case.loss(model, case.inputs(0, 0), 0, 0).backward()
    for kind, number in (("parameter", 0.5), ("gradient", 0.25), ("exp_avg", 2.0)):
        mine = optimizer.local_value(NAME, kind)
        optimizer.set_local_value(NAME, kind, torch.full_like(mine, number))
    optimizer.publish()
    assert torch.equal(optimizer.full_parameter(NAME), torch.full((17, 12), 0.5))
    assert torch.equal(optimizer.full_gradient(NAME).float(), torch.full((17, 12), 0.25))
    state = optimizer.full_optimizer_state(NAME, "exp_avg")
    assert torch.equal(state, torch.full((17, 12), 2.0))
    assert torch.equal(optimizer.full_state_dict()[NAME].float(), torch.full((17, 12), 0.5))
    with pytest.raises(ds_zero.ShardError, match=r"'blocks\.1\.up\.weight': got 1000 numbers"):
        optimizer.set_local_value(NAME, "parameter", torch.zeros(1000))


def test_own_parts_of_parameters(stage: int):
    run_ranks(2, read_own_parts, stage)


def read_own_parts(stage: int) -> None:
    with ds_zero.Init():
        model = Stack()
    weight = model.entry.weight
    assert ds_zero.local_part(weight).shape == (ds_zero.local_numel(weight),)
    assert all_numbers(ds_zero.local_numel(weight)) == [weight.numel() // 2] * 2
    assert ds_zero.local_numel(torch.nn.Parameter(torch.zeros(3))) == 3
    ds_zero.shard(model, adamw(model.parameters()), stage, precision=BF16, min_unit_numel=0)
    own = all_numbers(ds_zero.local_numel(weight))
    assert sum(own) == (weight.numel() if stage == 3 else 2 * weight.numel())
    parts = [torch.empty(0)] * 2
    dist.all_gather_object(parts, ds_zero.local_part(weight).clone())
    with ds_zero.GatheredParameters(weight):
        whole = weight.detach().flatten()
        assert torch.equal(torch.cat(parts) if stage == 3 else parts[1], whole)


def all_numbers(number: int) -> list[int]:
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return numbers


def test_each_rank_may_edit_its_own_part():
    run_ranks(2, edit_own_parts)


def edit_own_parts() -> None:
    case = CASES["untied"]
    model, optimizer = sharded(case, 3, precision=BF16)
    sharded_steps(model, optimizer, case, 2)
    weight, other = model.blocks[1].up.weight, "blocks.1.up.bias"
    before = optimizer.full_parameter(other)
    assert not torch.equal(before, before.bfloat16().float())
    own = ds_zero.local_numel(weight)
    with ds_zero.GatheredParameters(weight) as held:
        weight.data.fill_(dist.get_rank() + 1.0)
        held.adopt_edits()
    expected = [1.0] * all_numbers(own)[0] + [2.0] * all_numbers(own)[1]
    assert optimizer.full_parameter(NAME).flatten().tolist() == expected
    # What was not edited keeps all its digits.
    assert torch.equal(optimizer.full_parameter(other), before)
