"""The optimizers against torch's and ds-core's in float64, and what their step takes beside."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ds_ops
from ds_core import optim
from ds_core.errors import OptimizerError

SHAPES = ((33, 7), (5,), (1,), (0, 3), (257,))

#: name: (ours, the same in torch or ds-core)
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adamw": (
        lambda p: ds_ops.FusedAdam(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    "adam": (
        lambda p: ds_ops.CPUAdam(p, lr=1e-2, weight_decay=0.1, adamw_mode=False, maximize=True),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, maximize=True),
    ),
    "lion": (
        lambda p: ds_ops.FusedLion(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
        lambda p: optim.Lion(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1),
    ),
    "cpu-lion": (
        lambda p: ds_ops.CPULion(p, lr=1e-2),
        lambda p: optim.Lion(p, lr=1e-2, betas=(0.9, 0.999)),
    ),
    "adagrad": (
        lambda p: ds_ops.CPUAdagrad(
            p, lr=1e-2, weight_decay=0.1, lr_decay=0.1, initial_accumulator_value=0.3
        ),
        lambda p: torch.optim.Adagrad(
            p, lr=1e-2, weight_decay=0.1, lr_decay=0.1, initial_accumulator_value=0.3
        ),
    ),
    "sgd": (
        lambda p: ds_ops.FusedSGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "sgd-dampened": (
        lambda p: ds_ops.FusedSGD(p, lr=1e-2, momentum=0.8, dampening=0.5),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.8, dampening=0.5),
    ),
    "sgd-plain": (
        lambda p: ds_ops.FusedSGD(p, lr=1e-2),
        lambda p: torch.optim.SGD(p, lr=1e-2),
    ),
    "lamb": (
        lambda p: ds_ops.FusedLamb(p, lr=1e-2, weight_decay=0.1, max_coeff=0.6, min_coeff=0.2),
        lambda p: optim.Lamb(p, lr=1e-2, weight_decay=0.1, max_coeff=0.6, min_coeff=0.2),
    ),
    "muon": (
        lambda p: ds_ops.Muon([(f"layer.{i}", each) for i, each in enumerate(p)], lr=1e-2),
        lambda p: optim.Muon([(f"layer.{i}", each) for i, each in enumerate(p)], lr=1e-2),
    ),
}
UNDOABLE = ["adamw", "adam", "lion", "adagrad", "sgd", "sgd-plain"]
#: Whose state is the same under the same names.
EXCHANGED = ["adamw", "adam", "adagrad", "sgd", "sgd-plain", "lion", "lamb"]


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(step: int, shapes: Any = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def take(optimizer: Any, params: list[nn.Parameter], step: int, **options: Any) -> None:
    for param, grad in zip(params, gradients(step, [p.shape for p in params]), strict=True):
        param.grad = grad.to(param.dtype)
    optimizer.step(**options)


def assert_close(ours: list[nn.Parameter], truth: list[nn.Parameter], tolerance: float) -> None:
    for mine, right in zip(ours, truth, strict=True):
        if right.numel():
            distance = (mine.detach().double() - right.detach().double()).norm()
            assert float(distance) <= tolerance * float(right.detach().norm())


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_steps_equal_the_truth_in_float64(name: str):
    make, make_truth = PAIRS[name]
    ours, truth = parameters(), parameters(torch.float64)
    optimizer, other = make(ours), make_truth(truth)
    for step in range(20):
        take(optimizer, ours, step)
        take(other, truth, step)
    # Muon's iterations are in bf16, and round differently after float64.
    assert_close(ours, truth, 5e-3 if name == "muon" else 2e-6)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "muon"])
def test_a_step_takes_scale_and_gradients_and_writes_copies_in_one_pass(name: str):
    make, make_truth = PAIRS[name]
    ours, truth = parameters(), parameters(torch.float64)
    optimizer, other = make(ours), make_truth(truth)
    copies = [torch.empty(p.shape, dtype=torch.bfloat16) for p in ours]
    for step in range(5):
        given = [grad.bfloat16() for grad in gradients(step)]
        for param, grad in zip(truth, given, strict=True):
            param.grad = grad.double() * 0.25
        other.step()
        optimizer.step(
            gradients=dict(zip(ours, given, strict=True)),
            copies=dict(zip(ours, copies, strict=True)),
            grad_scale=0.25 if step % 2 else torch.tensor(0.25),
        )
    assert_close(ours, truth, 1e-6)
    for param, low in zip(ours, copies, strict=True):
        assert torch.equal(low, param.detach().bfloat16())
        assert param.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in PAIRS if name not in ("muon",)])
def test_low_precision_parameters_have_fp32_states(name: str, dtype: torch.dtype):
    make, make_truth = PAIRS[name]
    ours, truth = parameters(dtype), [nn.Parameter(p.detach().double()) for p in parameters(dtype)]
    optimizer, other = make(ours), make_truth(truth)
    for step in range(2):
        for mine, right, grad in zip(ours, truth, gradients(step), strict=True):
            mine.grad = grad.to(dtype)
            right.grad = mine.grad.double()
        optimizer.step()
        other.step()
    assert_close(ours, truth, 8e-3 if dtype is torch.bfloat16 else 1.5e-3)
    for state in optimizer.state.values():
        assert all(value.dtype is torch.float32 for value in state.values())


# --- Undo -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", UNDOABLE)
def test_rollback_is_exact(name: str, dtype: torch.dtype):
    ours = parameters(dtype)
    optimizer = PAIRS[name][0](ours)
    copies = {param: torch.empty(param.shape, dtype=torch.float16) for param in ours}
    for step in range(3):
        take(optimizer, ours, step, copies=copies)
    params = [param.detach().clone() for param in ours]
    low = [copies[param].clone() for param in ours]
    states = copy.deepcopy(optimizer.state_dict())
    take(optimizer, ours, 77, copies=copies, undo=True)
    assert not torch.equal(params[0], ours[0])

    optimizer.rollback()

    assert all(torch.equal(a, b) for a, b in zip(params, ours, strict=True))
    assert all(torch.equal(a, copies[b]) for a, b in zip(low, ours, strict=True))
    assert_same_state(optimizer.state_dict(), states)


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for index, values in one["state"].items():
        assert values.keys() == other["state"][index].keys()
        for key, value in values.items():
            assert torch.equal(value, other["state"][index][key]), key


def test_a_first_step_that_is_rolled_back_leaves_no_state():
    ours = parameters()
    optimizer = ds_ops.FusedAdam(ours)
    take(optimizer, ours, 0, undo=True)
    optimizer.rollback()
    assert not optimizer.state
    with pytest.raises(OptimizerError, match="kept nothing"):
        optimizer.rollback()


def test_steps_over_different_parameters_are_rolled_back_together():
    ours = parameters()
    optimizer = ds_ops.FusedAdam([{"params": ours[:1]}, {"params": ours[1:]}])
    before = [param.detach().clone() for param in ours]
    for part in (ours[:1], ours[1:]):
        optimizer.step(gradients={param: torch.ones_like(param) for param in part}, undo=True)
    optimizer.rollback()
    assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))


def test_a_step_that_kept_nothing_cannot_be_taken_back():
    ours = parameters()
    optimizer = ds_ops.FusedAdam(ours)
    take(optimizer, ours, 0, undo=True)
    take(optimizer, ours, 1)
    with pytest.raises(OptimizerError, match="kept nothing"):
        optimizer.rollback()
    with pytest.raises(OptimizerError, match="undo: got True"):
        ds_ops.FusedLamb(parameters()).step(undo=True)


# --- State dicts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXCHANGED)
def test_state_dicts_move_to_torch_and_back(name: str):
    make, make_other = PAIRS[name]
    ours = parameters()
    optimizer = make(ours)
    for step in range(3):
        take(optimizer, ours, step)
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    other = make_other(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(optimizer, ours, 3)
    take(other, theirs, 3)
    assert_close(ours, theirs, 1e-6)

    back = [nn.Parameter(param.detach().clone()) for param in theirs]
    again = make(back)
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    take(other, theirs, 4)
    take(again, back, 4)
    assert_close(back, theirs, 1e-6)
    take(again, back, 5, grad_scale=0.5)


def test_states_of_bf16_parameters_stay_fp32_when_loaded():
    ours = parameters(torch.bfloat16)
    optimizer = ds_ops.FusedAdam(ours)
    take(optimizer, ours, 0)
    again = ds_ops.FusedAdam(parameters(torch.bfloat16))
    again.load_state_dict(optimizer.state_dict())
    assert_same_state(again.state_dict(), optimizer.state_dict())
    halves = ds_ops.FusedAdam(parameters(torch.bfloat16), fp32_optimizer_states=False)
    take(halves, halves.param_groups[0]["params"], 0)
    assert halves.state_dict()["state"][0]["exp_avg"].dtype is torch.bfloat16


def test_eight_bit_states_are_loaded_as_they_are():
    ours = parameters()
    optimizer = ds_ops.Adam8bit(ours)
    take(optimizer, ours, 0)
    again = ds_ops.Adam8bit(parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(again.state_dict(), optimizer.state_dict())


def test_packed_state_is_given_and_taken_exactly():
    ours = [nn.Parameter(torch.randn(4, 3, 9, 7).to(memory_format=torch.channels_last))]
    optimizer = ds_ops.Adam8bit(ours)
    for step in range(3):
        take(optimizer, ours, step)
    before = copy.deepcopy(optimizer.state_dict())
    portable = optimizer.portable_state(ours[0])
    theirs = torch.optim.AdamW(ours)
    theirs.state[ours[0]] = portable
    take(theirs, ours, 4)  # it is a state of torch's AdamW
    optimizer.load_portable_state(ours[0], optimizer.portable_state(ours[0]))
    assert_same_state(optimizer.state_dict(), before)


def test_an_optimizer_is_saved_and_copied_like_any_other():
    ours = parameters()
    optimizer = ds_ops.FusedAdam(ours, set_grad_none=False)
    take(optimizer, ours, 0)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for twin in (copy.deepcopy(optimizer), loaded):
        take(twin, twin.param_groups[0]["params"], 1)
        assert twin.set_grad_none is False


def test_amsgrad_of_a_loaded_state_is_refused():
    truth = parameters()
    other = torch.optim.AdamW(truth, amsgrad=True)
    take(other, truth, 0)
    with pytest.raises(OptimizerError, match="amsgrad: got True"):
        ds_ops.FusedAdam(parameters()).load_state_dict(other.state_dict())
    optimizer = ds_ops.FusedAdam(parameters())
    with pytest.raises(OptimizerError):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["amsgrad"] is False
    assert not optimizer.state


def test_lions_state_is_that_of_the_plain_one():
    """A checkpoint that was made without ds-ops must load with it, and the other way round."""
    ours, truth = parameters(), parameters()
    optimizer, other = ds_ops.FusedLion(ours), optim.Lion(truth)
    take(optimizer, ours, 0, undo=True)
    take(other, truth, 0)
    assert optimizer.state[ours[0]].keys() == other.state[truth[0]].keys()
    take(optimizer, ours, 1, undo=True)
    optimizer.rollback()
    counting = ds_ops.FusedLion(ours, stochastic_rounding=True)
    counting.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    counting.param_groups[0]["stochastic_rounding"] = True
    take(counting, ours, 1)
    assert float(counting.state[ours[0]]["step"]) == 2


def muon(model: nn.Module) -> ds_ops.Muon:
    return ds_ops.Muon(model.named_parameters(), lr=0.1)


def test_muon_is_saved_copied_and_loaded_with_the_optimizer_inside():
    model = nn.Linear(4, 8, dtype=torch.bfloat16)
    params = list(model.parameters())
    optimizer = muon(model)
    take(optimizer, params, 0)
    again = muon(model)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert again.state[model.bias]["exp_avg"].dtype is torch.float32
    assert_same_state(again.state_dict(), optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    own = [param for group in twin.param_groups for param in group["params"]]
    take(twin, own, 1)
    take(again, params, 1)
    for mine, right in zip(own, params, strict=True):
        assert torch.equal(mine, right)


def test_muon_refuses_parameters_without_names():
    with pytest.raises(OptimizerError, match="give all of them to Muon"):
        muon(nn.Linear(4, 8)).add_param_group({"params": [nn.Parameter(torch.ones(3))]})


# --- As any optimizer of torch --------------------------------------------------------------------


def test_closures_groups_and_schedules_work():
    ours = parameters()
    optimizer = ds_ops.FusedAdam([{"params": ours[:2], "lr": 0.5}, {"params": ours[2:]}], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((param**2).sum() for param in ours)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item()]
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])
    losses.append(optimizer.step(closure).item())
    assert losses[1] < losses[0]


def test_channels_last_parameters_are_updated_in_their_own_layout():
    value = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    ours = nn.Parameter(value.to(memory_format=torch.channels_last))
    truth = nn.Parameter(value.clone())
    ours.grad = torch.ones_like(value).cumsum(1)
    truth.grad = ours.grad.clone()
    low = torch.empty(4, 3, 5, 2, dtype=torch.bfloat16)
    ds_ops.FusedAdam([ours]).step(copies={ours: low})
    torch.optim.AdamW([truth], weight_decay=0.0).step()
    assert torch.allclose(ours, truth, rtol=1e-6)
    assert torch.equal(low, ours.detach().bfloat16())


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_gradient_scaler_unscales_and_leaves_out(found_inf: float):
    ours, truth = parameters(), parameters()
    optimizer: Any = ds_ops.FusedAdam(ours)
    other = torch.optim.AdamW(truth, weight_decay=0.0)
    for mine, right, grad in zip(ours, truth, gradients(0), strict=True):
        mine.grad, right.grad = grad * 8, grad
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
    optimizer.step()
    if not found_inf:
        other.step()
    assert_close(ours, truth, 1e-6)


def test_torchs_own_gradient_scaler_works_with_it():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    param = nn.Parameter(torch.ones(3))
    optimizer = ds_ops.FusedSGD([param], lr=0.5)
    scaler.scale((2 * param).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.zeros(3))


# --- Stochastic rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("stochastic", [False, True])
def test_steps_below_half_an_ulp_arrive_on_average_if_rounding_is_stochastic(stochastic: bool):
    param = nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16))
    optimizer = ds_ops.FusedSGD([param], lr=2.0**-10, stochastic_rounding=stochastic)
    for _ in range(16):
        param.grad = torch.ones_like(param)
        optimizer.step()
    # 16 steps of a quarter of the spacing below 1, 2^-8: each mean is exact, deviations add up.
    moved = 1 - float(param.detach().float().mean())
    expected = 16 * 2.0**-10 if stochastic else 0.0
    bound = 4 * (16 * 0.25) ** 0.5 * 2.0**-8 / 2**7
    assert abs(moved - expected) <= bound


def test_random_rounding_repeats_itself():
    results = []
    for _ in range(2):
        ours = parameters(torch.bfloat16)
        optimizer = ds_ops.FusedAdam(
            ours, lr=1e-3, stochastic_rounding=True, fp32_optimizer_states=False
        )
        for step in range(3):
            take(optimizer, ours, step)
        results.append([param.detach() for param in ours])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: ds_ops.FusedAdam(p, amsgrad=True), "FusedAdam: amsgrad"),
        (lambda p: ds_ops.FusedAdam(p, lr=-1.0), "lr: got -1.0"),
        (lambda p: ds_ops.CPUAdam(p, betas=(0.9, 1.0)), "CPUAdam: betas"),
        (lambda p: ds_ops.CPUAdam(p, eps=float("nan")), "eps: got nan"),
        (lambda p: ds_ops.FusedLion(p, weight_decay=-1.0), "weight_decay"),
        (lambda p: ds_ops.CPUAdagrad(p, amsgrad=True), "amsgrad"),
        (lambda p: ds_ops.FusedSGD(p, nesterov=True), "nesterov"),
        (lambda p: ds_ops.FusedLamb(p, max_grad_norm=1.0), "max_grad_norm: got 1.0; clip"),
        (lambda p: ds_ops.FusedLamb(p, eps_inside_sqrt=True), "eps_inside_sqrt"),
        (lambda p: ds_ops.FusedLamb(p, min_coeff=2.0, max_coeff=1.0), "min_coeff"),
        (lambda p: ds_ops.Muon([("a", p[0])], ns_steps=0), "ns_steps: got 0"),
    ],
)
def test_arguments_out_of_range_are_refused(build: Callable[..., Any], message: str):
    with pytest.raises(OptimizerError, match=message):
        build(parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_parameters_of_other_formats_are_refused(dtype: torch.dtype):
    with pytest.raises(OptimizerError, match=f"params: got {dtype}"):
        ds_ops.FusedAdam([nn.Parameter(torch.ones(2).to(dtype), dtype.is_floating_point)])


def test_gradients_that_do_not_fit_are_refused():
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(OptimizerError, match="sparse gradient"):
        ds_ops.FusedLion(table.parameters()).step()
    param = nn.Parameter(torch.ones(3))
    optimizer = ds_ops.FusedAdam([param])
    with pytest.raises(
        OptimizerError, match=r"shape \[2\] on cpu, expected a float of shape \[3\]"
    ):
        optimizer.step(gradients={param: torch.ones(2)})
    with pytest.raises(OptimizerError, match=r"got a gradient of torch\.float64"):
        optimizer.step(gradients={param: torch.ones(3, dtype=torch.float64)})
    with pytest.raises(OptimizerError, match=r"copies: got torch.float32, shape \[2\]"):
        optimizer.step(gradients={param: torch.ones(3)}, copies={param: torch.ones(2)})


def test_parameters_with_gaps_are_refused():
    param = nn.Parameter(torch.ones(6)[::2])
    param.grad = torch.ones(3)
    with pytest.raises(OptimizerError, match="expected a dense one"):
        ds_ops.FusedLion([param]).step()
    # With a gradient in the same layout, torch's kernel would write between the elements.
    memory = torch.ones(4, 6)
    param = nn.Parameter(memory[:, :3])
    with pytest.raises(OptimizerError, match="expected a dense one"):
        ds_ops.FusedAdam([param]).step(gradients={param: torch.ones(4, 6)[:, :3]})
    assert torch.equal(memory, torch.ones(4, 6))


def test_tensors_on_no_device_of_the_cpu_are_refused_by_cpu_optimizers():
    class Elsewhere(ds_ops.CPUAdam):
        def _check_param(self, param: torch.Tensor) -> None:
            super()._check_param(_Fake())

    class _Fake(torch.Tensor):
        device = torch.device("cuda", 0)

    with pytest.raises(OptimizerError, match="expected the CPU; use FusedAdam"):
        Elsewhere(parameters())


def rounded(first: str, numbers: dict[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Two equal parameters after a step of each, one of them stepped first."""
    params = {name: nn.Parameter(torch.ones(512, dtype=torch.bfloat16)) for name in "ab"}
    optimizer = ds_ops.FusedSGD(list(params.values()), lr=2.0**-10, stochastic_rounding=True)
    if numbers is not None:
        optimizer.number_parameters({params[name]: number for name, number in numbers.items()})
    for name in sorted(params, reverse=first == "b"):
        optimizer.step(gradients={params[name]: torch.ones(512)})
    return {name: param.detach() for name, param in params.items()}


def test_random_rounding_depends_on_a_parameters_number_not_on_who_is_first():
    one, other = rounded("a"), rounded("b")
    assert not torch.equal(one["a"], one["b"])
    assert all(torch.equal(one[name], other[name]) for name in "ab")
    swapped = rounded("a", {"a": 1, "b": 0})
    assert torch.equal(swapped["a"], one["b"])
    assert torch.equal(swapped["b"], one["a"])
