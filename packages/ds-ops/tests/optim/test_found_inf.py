"""A step that a flag leaves out: nothing changes, and nobody asks the device for the flag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_ops
from ds_core import fused, ops
from ds_core.ops.adam8bit_step import encoded
from ds_ops.optim.fused_optimizer import FusedOptimizer

NUMEL = 1003
#: By op: whether each state is positive, and the numbers that follow the tensors.
STEPS: dict[str, tuple[tuple[bool, ...], tuple[Any, ...]]] = {
    "adam_step_": ((False, True), (1e-2, 0.9, 0.999, 1e-8, 0.1, 3, True, True, False)),
    "lion_step_": ((False,), (1e-2, 0.9, 0.99, 0.1, True)),
    "adagrad_step_": ((True,), (1e-2, 0.1, 1e-10, 0.1, 3, False)),
    "sgd_step_": ((False,), (1e-2, 0.9, 0.1, 0.1, False, False, False)),
}
IMPLEMENTATIONS = ("cpp", "reference")


def normal(seed: int, *, positive: bool = False) -> torch.Tensor:
    found = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
    return found.square() if positive else found


def tensors(states: tuple[bool, ...]) -> list[torch.Tensor]:
    own = [normal(3 + index, positive=positive) for index, positive in enumerate(states)]
    return [normal(1), normal(2).bfloat16(), *own]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("value", [1.0, 2.0, -1.0, torch.nan], ids=str)
def test_a_flag_leaves_everything_as_it_is(name: str, impl: str, value: float) -> None:
    states, numbers = STEPS[name]
    own = tensors(states)
    own[1][5] = torch.inf
    copy = torch.full((NUMEL,), 7.0, dtype=torch.bfloat16)
    before = [t.clone() for t in (*own, copy)]
    kept = [own[0], *own[2:]]
    undo = torch.zeros(sum(t.nbytes for t in kept), dtype=torch.uint8)
    flag = torch.tensor(value)
    ops.run(name, *own, copy, undo, None, *numbers, 9, flag, impl=impl)
    assert_same([*own, copy], before)
    # What takes a step back may be called, whether or not there was one.
    assert torch.equal(undo, torch.cat([t.view(torch.uint8) for t in kept]))
    ops.run("step_undo_", own[0], own[2:], copy, undo, impl=impl)
    assert_same(own, before[:-1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", STEPS)
def test_a_flag_of_zero_is_no_flag(name: str, impl: str) -> None:
    states, numbers = STEPS[name]
    own, other = tensors(states), tensors(states)
    ops.run(name, *own, None, None, None, *numbers, None, torch.tensor(0.0), impl=impl)
    ops.run(name, *other, None, None, None, *numbers, None, impl=impl)
    assert_same(own, other)
    assert not torch.equal(own[0], normal(1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lamb_is_left_out_whole(impl: str) -> None:
    own, update = tensors((False, True)), torch.full((NUMEL,), 7.0)
    before = [t.clone() for t in (*own, update)]
    flag = torch.tensor(1.0)
    rates = (0.9, 0.999, 1e-6, 0.01, 3, True)
    squares = ops.run("lamb_update_", *own, update, None, *rates, flag, impl=impl)
    assert squares.tolist() == [0.0, 0.0]
    ratio = torch.tensor(2.0)
    ops.run("lamb_apply_", own[0], update, None, 0.1, ratio, flag, impl=impl)
    assert_same([*own, update], before)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_lambs_ratio_is_a_factor(impl: str) -> None:
    one, other, update = normal(1), normal(1), normal(2)
    ops.run("lamb_apply_", one, update, None, 0.5, torch.tensor(0.5), impl=impl)
    ops.run("lamb_apply_", other, update, None, 0.25, impl=impl)
    assert torch.equal(one, other)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_eight_bit_states_are_left_too(impl: str) -> None:
    state = [*encoded(normal(3), signed=True), *encoded(normal(4).square(), signed=False)]
    own = [normal(1), normal(2), *state]
    before = [t.clone() for t in own]
    rates = (1e-2, 0.9, 0.999, 1e-8, 0.01, 3, True, 1)
    ops.run("adam8bit_step_", *own, None, None, *rates, torch.tensor(1.0), impl=impl)
    assert_same(own, before)
    ops.run("adam8bit_step_", *own, None, None, *rates, torch.tensor(0.0), impl=impl)
    assert not torch.equal(own[0], before[0])


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], FusedOptimizer]] = {
    "adam": ds_ops.FusedAdam,
    "lion": ds_ops.FusedLion,
    "adagrad": ds_ops.CPUAdagrad,
    "sgd": lambda p: ds_ops.FusedSGD(p, momentum=0.9),
    "lamb": ds_ops.FusedLamb,
    "adam8bit": ds_ops.Adam8bit,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_hands_the_flag_to_its_kernel(name: str) -> None:
    param = nn.Parameter(normal(1))
    optimizer = OPTIMIZERS[name]([param])
    # The host counts a step that the device leaves out: only Lion needs no count.
    assert fused.can_leave_out(optimizer) is (name == "lion")
    grad, low = normal(2).bfloat16(), torch.zeros(NUMEL, dtype=torch.bfloat16)
    for leaves_out in (True, False):
        flag = torch.tensor(leaves_out)
        fused.step_in_one_pass(optimizer, {param: grad}, {param: low}, unless=flag)
        assert torch.equal(param, normal(1)) is leaves_out
        assert torch.equal(low, torch.zeros_like(low)) is leaves_out
    assert float(optimizer.state[param].get("step", 2)) == 2


class Unread(torch.Tensor):
    """A number that nobody may ask the device for."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_gradient_scaler_s_flag_stays_on_the_device_if_no_steps_are_counted(value: float) -> None:
    param = nn.Parameter(normal(1))
    optimizer: Any = ds_ops.FusedLion([param])
    optimizer.found_inf = torch.tensor(value).as_subclass(Unread)
    param.grad = normal(2)
    optimizer.step()
    assert torch.equal(param, normal(1)) is (value == 1.0)
