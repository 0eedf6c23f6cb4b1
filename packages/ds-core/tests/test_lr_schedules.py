"""The learning-rate schedules, against numbers of DeepSpeed's own."""

from __future__ import annotations

import io
import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler

import ds_core
from ds_core import lr_schedules
from ds_core.errors import ConfigError, DsError
from ds_core.seams import Event, EventKind

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


def cycle(optimizer, **params):
    shape = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4}
    return build("OneCycle", {**shape, "cycle_second_step_size": 2, **params}, optimizer)


def two_groups(cls, **settings):
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1 * i} for i in (1, 2)]
    return cls(groups, **settings)


def test_one_cycle_cycles_the_momentum_of_sgd():
    sgd = two_groups(torch.optim.SGD, lr=0.1, momentum=0.9)
    schedule = cycle(sgd, cycle_min_mom=[0.5, 0.8], cycle_max_mom=0.9)

    momenta = [[group["momentum"] for group in sgd.param_groups]]
    for _ in range(7):
        sgd.step()
        schedule.step()
        momenta.append([group["momentum"] for group in sgd.param_groups])

    first = [0.5, 0.8, 0.7, 0.6, 0.5, 0.7, 0.9, 0.9]
    assert [pair[0] for pair in momenta] == pytest.approx(first)
    assert [pair[1] for pair in momenta[1:5]] == pytest.approx([0.875, 0.85, 0.825, 0.8])


def test_one_cycle_without_momentum_says_that_there_is_none(caplog):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    with caplog.at_level(logging.WARNING):
        schedule = build("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}, sgd)

    assert "SGD has neither betas nor momentum" in caplog.text
    trace(schedule, 2)
    assert sgd.param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("done", [0, 1, 3, 5, 8], ids="after-{}".format)
def test_one_cycle_resumes_rates_momenta_and_weights_exactly(cls, done):
    def start():
        settings = {"momentum": 0.9} if cls is torch.optim.SGD else {}
        optimizer = two_groups(cls, lr=0.1, **settings)
        return optimizer, cycle(optimizer, decay_step_size=1, decay_mom_rate=0.01)

    def run(optimizer, schedule, steps):
        for _ in range(steps):
            for group in optimizer.param_groups:
                group["params"][0].grad = group["params"][0].detach() * 0.1
            optimizer.step()
            schedule.step()

    whole, cut, resumed = start(), start(), start()
    run(*whole, 10)
    run(*cut, done)
    with torch.no_grad():
        for ours, theirs in zip(resumed[0].param_groups, cut[0].param_groups, strict=True):
            ours["params"][0].copy_(theirs["params"][0])
    resumed[0].load_state_dict(cut[0].state_dict())
    resumed[1].load_state_dict(json.loads(json.dumps(cut[1].state_dict())))
    run(*resumed, 10 - done)

    for ours, theirs in zip(resumed[0].param_groups, whole[0].param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])
        assert ours["lr"] == theirs["lr"]
        assert (ours.get("betas"), ours.get("momentum")) == (
            theirs.get("betas"),
            theirs.get("momentum"),
        )


def test_the_cosine_multiplies_each_groups_own_rate():
    params = {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_min_ratio": 0.5}
    optimizer = two_groups(torch.optim.SGD, lr=1.0)
    schedule = build("WarmupCosineLR", {**params, "cos_min_ratio": 0.1}, optimizer)

    rates = []
    for _ in range(7):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr())

    assert [second / first for first, second in rates] == pytest.approx([2.0] * 7)
    assert [first / 0.1 for first, _ in rates[:2]] == [0.5, 1.0]  # log: a rise from the min ratio
    assert rates[-1] == pytest.approx([0.01, 0.02])


def test_a_warmup_without_a_maximum_keeps_each_groups_own_rate():
    schedule = build("WarmupLR", {"warmup_num_steps": 2}, two_groups(torch.optim.SGD, lr=1.0))

    for _ in range(3):
        schedule.optimizer.step()
        schedule.step()

    assert schedule.get_last_lr() == pytest.approx([0.1, 0.2])


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
        pytest.param("WarmupCosineLR", {"total_num_steps": "auto"}, "Trainer fills in", id="auto"),
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


def valley(rate):
    """A loss that falls fastest at 1e-3, is lowest at 1e-2, and blows up from there on."""
    place = math.log10(rate)
    return 2.0 - math.tanh(place + 3) + 40 * max(0.0, place + 2)


def test_a_range_test_suggests_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + place / 20) for place in range(100)]

    found = lr_schedules.suggest_lr(rates, [valley(rate) for rate in rates], smoothing=0.0)

    assert found.steepest == pytest.approx(1e-3, rel=0.01)
    assert found.lowest == pytest.approx(10**-2, rel=0.01)
    assert found.diverged_at == pytest.approx(10**-1.9, rel=0.1)
    assert found.lrs[-1] < found.diverged_at
    assert "fastest at 0.001" in str(found)


def test_a_loss_that_becomes_nan_has_diverged():
    found = lr_schedules.suggest_lr([1, 2, 3, 4], [3.0, 2.0, 1.5, float("nan")])

    assert found.diverged_at == 4
    assert len(found.losses) == 3


@pytest.mark.parametrize(
    ("rates", "losses", "message"),
    [
        pytest.param([1, 2], [1, 2], "at least 3", id="short"),
        pytest.param([1, 2, 3], [1, 2], "3 learning rates and 2 losses", id="uneven"),
        pytest.param([1, 3, 2], [1, 1, 1], "grow from step to step", id="falling"),
        pytest.param([0, 1, 2], [1, 1, 1], "must be positive", id="zero"),
        pytest.param([1, 2, 3], [1, 90, 99], "diverged at step 2", id="at-once"),
    ],
)
def test_losses_that_tell_nothing_say_why(rates, losses, message):
    with pytest.raises(DsError, match=message):
        lr_schedules.suggest_lr(rates, losses, smoothing=0.0)


def test_find_lr_ends_when_a_real_loss_diverges_and_puts_the_rates_back():
    torch.manual_seed(0)
    # Gradient descent on x' diag(1..10) x / 2 diverges above a rate of 2 / 10.
    weight = torch.nn.Parameter(torch.ones(10))
    optimizer = torch.optim.SGD([weight], lr=0.123)

    def step():
        optimizer.zero_grad()
        loss = (weight.square() * torch.arange(1.0, 11.0)).sum() / 2
        loss.backward()
        optimizer.step()
        return loss

    found = lr_schedules.find_lr(step, optimizer, min_lr=1e-4, max_lr=10, num_steps=120)

    assert 0.2 < found.diverged_at < 2.0
    assert found.steepest < found.lowest <= found.diverged_at
    assert found.steepest < 0.2
    assert optimizer.param_groups[0]["lr"] == 0.123


def test_find_lr_refuses_an_empty_range():
    optimizer = adamw()

    with pytest.raises(DsError, match="expected 0 < min_lr < max_lr"):
        lr_schedules.find_lr(lambda: 1.0, optimizer, min_lr=1, max_lr=1)
    with pytest.raises(DsError, match="num_steps: got 2"):
        lr_schedules.find_lr(lambda: 1.0, optimizer, num_steps=2)


def test_a_config_with_a_range_test_tells_its_finding(capsys):
    torch.manual_seed(0)
    params = {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 2}
    engine = ds_core.initialize(
        torch.nn.Linear(4, 1),
        {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "SGD", "params": {"lr": 0.001}},
            "scheduler": {"type": "LRRangeTest", "params": params},
        },
    )
    for _ in range(12):
        engine.backward(engine(torch.randn(8, 4)).square().mean())
        engine.step()
    engine.close()

    assert "range test: the loss fell fastest at 0.00" in capsys.readouterr().err


def test_a_recorder_has_the_rate_and_the_loss_of_each_step():
    stream = io.StringIO()
    recorder = lr_schedules.RangeTestRecorder(stream=stream)

    for step in range(1, 5):
        values = {"lr": 0.1 * step, "loss": torch.tensor(4.0 - step)}
        recorder.on_event(None, Event(EventKind.STEP_END, step, values))
    recorder.on_event(None, Event(EventKind.CLOSE, 4))

    assert recorder.lrs == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert recorder.losses == [3.0, 2.0, 1.0, 0.0]
    assert recorder.finding(smoothing=0.0).lowest == pytest.approx(0.4)
    assert "was lowest at 0.4, never diverged" in stream.getvalue()


def test_a_range_test_that_was_too_short_says_so():
    stream = io.StringIO()

    lr_schedules.RangeTestRecorder(stream=stream).on_event(None, Event(EventKind.CLOSE, 0))

    assert "tells nothing: suggest_lr: got 0 learning rates" in stream.getvalue()
    with pytest.raises(AttributeError, match="nonsense"):
        _ = lr_schedules.nonsense
