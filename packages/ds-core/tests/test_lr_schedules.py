"""The learning-rate schedules, against numbers of DeepSpeed's own."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

from ds_core import lr_schedules
from ds_core.errors import ConfigError

# Rates before the first step and after steps 1 to 10, of AdamW built with lr 0.5. Made once with
# deepspeed 0.19.8 (DS_ACCELERATOR=cpu): deepspeed.runtime.lr_schedules.<type>(optimizer, **params),
# then step() and get_last_lr() ten times, to 8 digits. Its import takes too long for a test.
REFERENCE = [
    pytest.param(
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 0.01,
            "lr_range_test_step_size": 4,
            "lr_range_test_step_rate": 2.0,
        },
        [0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.055, 0.06],
        id="range-line",
    ),
    pytest.param(
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 0.01,
            "lr_range_test_step_size": 3,
            "lr_range_test_staircase": True,
        },
        [0.01, 0.01, 0.01, 0.02, 0.02, 0.02, 0.03, 0.03, 0.03, 0.04, 0.04],
        id="range-stairs",
    ),
    pytest.param(
        "OneCycle",
        {
            "cycle_min_lr": 0.1,
            "cycle_max_lr": 0.5,
            "cycle_first_step_size": 3,
            "cycle_second_step_size": 2,
            "decay_step_size": 2,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.05,
        },
        [0.1, 0.23333333, 0.36666667, 0.5, 0.3, 0.1, 0.08, 0.066666667, 0.057142857, 0.05, 2 / 45],
        id="cycle-decay",
    ),
    pytest.param(
        "OneCycle",
        {
            "cycle_min_lr": 0.0,
            "cycle_max_lr": 1.0,
            "cycle_first_step_size": 4,
            "cycle_first_stair_count": 2,
        },
        [0.0, 0.0, 0.5, 0.5, 1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        id="cycle-stairs",
    ),
    pytest.param(
        "WarmupLR",
        {"warmup_max_lr": 0.1, "warmup_num_steps": 5},
        [0.0, 0.0, 0.043067656, 0.068260619, 0.086135312, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        id="warmup-log",
    ),
    pytest.param(
        "WarmupLR",
        {"warmup_min_lr": 0.02, "warmup_num_steps": 4, "warmup_type": "linear"},
        [0.02, 0.02, 0.14, 0.26, 0.38, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5],
        id="warmup-linear-to-own-rate",
    ),
    pytest.param(
        "WarmupLR",
        {"warmup_max_lr": 0.1, "warmup_num_steps": 1},
        [0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1],
        id="warmup-one-step",
    ),
    pytest.param(
        "WarmupDecayLR",
        {"total_num_steps": 8, "warmup_max_lr": 0.1, "warmup_num_steps": 3},
        [0.0, 0.0, 0.063092975, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02, 0.0, 0.0],
        id="decay-log",
    ),
    pytest.param(
        "WarmupDecayLR",
        {
            "total_num_steps": 6,
            "warmup_min_lr": 0.01,
            "warmup_max_lr": 0.1,
            "warmup_num_steps": 2,
            "warmup_type": "linear",
        },
        [0.01, 0.01, 0.055, 0.1, 0.0775, 0.055, 0.0325, 0.01, 0.01, 0.01, 0.01],
        id="decay-linear",
    ),
    pytest.param(
        "WarmupCosineLR",
        {"total_num_steps": 8, "warmup_num_steps": 3},
        [0, 0, 0.31546488, 0.5, 0.45225902, 0.32727152, 0.17277848, 0.047790977, 5e-5, 5e-5, 5e-5],
        id="cosine-log",
    ),
    pytest.param(
        "WarmupCosineLR",
        {
            "total_num_steps": 7,
            "warmup_num_steps": 4,
            "warmup_type": "linear",
            "warmup_min_ratio": 0.1,
            "cos_min_ratio": 0.2,
        },
        [0.0, 0.05, 0.1625, 0.275, 0.3875, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1],
        id="cosine-linear",
    ),
]


def adamw(num_groups: int = 1, lr: float = 0.5) -> torch.optim.AdamW:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(num_groups)]
    return torch.optim.AdamW(groups, lr=lr)


def build(name: str, params: dict, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
    return lr_schedules.build(SimpleNamespace(type=name, params=params), optimizer or adamw())


def trace(schedule: LRScheduler, num_steps: int) -> list[float]:
    rates = [schedule.get_last_lr()[0]]
    for _ in range(num_steps):
        schedule.optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
        assert schedule.optimizer.param_groups[0]["lr"] == rates[-1]
    return rates


@pytest.mark.parametrize(("name", "params", "expected"), REFERENCE)
def test_rates_are_those_of_deepspeed(name, params, expected):
    schedule = build(name, params)

    assert trace(schedule, 10) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("name", "params", "expected"), REFERENCE)
def test_state_is_json_and_resumes_the_same_rates(name, params, expected):
    schedule = build(name, params)
    trace(schedule, 4)
    state = json.loads(json.dumps(schedule.state_dict()))

    resumed = build(name, params)
    resumed.load_state_dict(state)

    assert trace(resumed, 6) == pytest.approx(expected[4:], rel=1e-7)


@pytest.mark.parametrize(("name", "params", "expected"), REFERENCE)
def test_state_of_deepspeed_resumes(name, params, expected):
    schedule = build(name, {**params, "last_batch_iteration": 2})
    other = build(name, params)
    other.load_state_dict({"last_batch_iteration": 2})

    assert trace(schedule, 7) == pytest.approx(expected[3:], rel=1e-7)
    assert trace(other, 7) == pytest.approx(expected[3:], rel=1e-7)


def test_one_cycle_moves_momentum_the_other_way_and_keeps_beta2():
    params = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3}
    params |= {"cycle_second_step_size": 2, "decay_step_size": 2, "decay_mom_rate": 0.05}
    schedule = build("OneCycle", params)
    group = schedule.optimizer.param_groups[0]

    momenta = [group["betas"]]
    for _ in range(7):
        schedule.optimizer.step()
        schedule.step()
        momenta.append(group["betas"])

    # From the same run of deepspeed as REFERENCE.
    expected = [0.8, 0.86666667, 0.83333333, 0.8, 0.85, 0.9, 0.9225, 0.945]
    assert [first for first, _ in momenta] == pytest.approx(expected, rel=1e-7)
    assert {second for _, second in momenta} == {0.999}


def test_one_cycle_without_betas_says_that_it_leaves_momentum(caplog):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)

    with caplog.at_level(logging.WARNING):
        schedule = build("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}, sgd)

    assert "SGD has no betas" in caplog.text
    trace(schedule, 2)
    assert sgd.param_groups[0]["momentum"] == 0.9


def test_lists_give_each_group_its_own_rate():
    schedule = build("WarmupLR", {"warmup_max_lr": [0.1, 0.2], "warmup_num_steps": 2}, adamw(2))

    for _ in range(3):
        schedule.optimizer.step()
        schedule.step()

    assert schedule.get_last_lr() == [0.1, 0.2]


def test_tensor_rates_are_changed_in_place():
    parameter = torch.nn.Parameter(torch.zeros(1))
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW([parameter], lr=rate)
    schedule = build("WarmupLR", {"warmup_num_steps": 2}, optimizer)

    for _ in range(2):
        optimizer.step()
        schedule.step()
    schedule.load_state_dict(schedule.state_dict())

    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.5)


def test_schedules_compose_with_those_of_torch():
    optimizer = adamw(lr=0.4)
    first = lr_schedules.WarmupLR(optimizer, warmup_num_steps=2, warmup_type="linear")
    second = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])

    assert trace(both, 4) == pytest.approx([0.0, 0.0, 0.2, 0.2, 0.2])


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        pytest.param("StepLR", {"step_size": 2.0}, "StepLR", id="step"),
        pytest.param("cosineannealinglr", {"T_max": 10}, "CosineAnnealingLR", id="any-case"),
        pytest.param("MultiStepLR", {"milestones": [1, 3]}, "MultiStepLR", id="list"),
        pytest.param("OneCycleLR", {"max_lr": 0.1, "total_steps": 9}, "OneCycleLR", id="one-cycle"),
    ],
)
def test_schedules_of_torch_are_built_by_name(name, params, cls):
    schedule = build(name, params)

    assert type(schedule).__name__ == cls
    trace(schedule, 2)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        pytest.param("WarmupL", {}, "did you mean WarmupLR?", id="misspelt-type"),
        pytest.param("LambdaLR", {}, "takes functions", id="functions"),
        pytest.param("ReduceLROnPlateau", {}, "needs a validation metric", id="metric"),
        pytest.param("WarmupLR", {"warmup": 5}, "params.warmup: unknown key", id="misspelt"),
        pytest.param(
            "StepLR", {}, "params.step_size: missing; StepLR needs an integer", id="missing"
        ),
        pytest.param("StepLR", {"step_size": 1, "last_epoch": 3}, "unknown key", id="hidden"),
        pytest.param("WarmupLR", {"warmup_num_steps": 0}, "expected an integer > 0", id="zero"),
        pytest.param(
            "WarmupLR", {"warmup_type": "exp"}, "expected one of log, linear", id="choice"
        ),
        pytest.param(
            "WarmupLR", {"warmup_max_lr": [1, 2]}, "2 values for 1 parameter", id="groups"
        ),
        pytest.param(
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_second_step_size": -1},
            "cycle_second_step_size: got -1",
            id="negative",
        ),
        pytest.param(
            "WarmupCosineLR", {"total_num_steps": "auto"}, "Trainer fills in", id="auto"
        ),
    ],
)
def test_what_cannot_be_built_says_why(name, params, message):
    with pytest.raises(ConfigError) as caught:
        build(name, params)

    assert message in str(caught.value)


def test_warmup_longer_than_the_run_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        build("WarmupDecayLR", {"total_num_steps": 10, "warmup_num_steps": 20})

    assert "total_num_steps 10 is less than warmup_num_steps 20" in caplog.text
