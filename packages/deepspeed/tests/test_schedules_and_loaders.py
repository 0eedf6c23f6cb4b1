from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import pytest
import torch

import deepspeed
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.dataloader import DeepSpeedDataLoader, RepeatingLoader

CASES: dict[str, dict[str, Any]] = {
    "LRRangeTest": {"lr_range_test_min_lr": 0.001, "lr_range_test_step_size": 5},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 4},
    "WarmupLR": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.1, "warmup_num_steps": 5},
    "WarmupDecayLR": {"total_num_steps": 20, "warmup_max_lr": 0.1, "warmup_num_steps": 5},
    "WarmupCosineLR": {"total_num_steps": 20, "warmup_num_steps": 5},
}


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def test_every_schedule_is_named_and_covered():
    assert sorted(CASES) == sorted(lr_schedules.VALID_LR_SCHEDULES)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_schedule_counts_iterations_and_resumes(name: str):
    cls, params = getattr(lr_schedules, name), CASES[name]
    one, other = optimizer(), optimizer()
    schedule = cls(one, **params)
    assert schedule.state_dict() == {"last_batch_iteration": -1}
    for _ in range(3):
        schedule.step()
    assert schedule.state_dict() == {"last_batch_iteration": 2}
    assert schedule.get_last_lr() == [one.param_groups[0]["lr"]] == schedule.get_lr()
    resumed = cls(other, **params)
    resumed.load_state_dict(schedule.state_dict())
    resumed.step()
    schedule.step()
    assert resumed.get_last_lr() == schedule.get_last_lr()
    resumed.step(9)
    assert resumed.last_batch_iteration == 9


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", sorted(CASES))
def test_no_last_rate_before_the_first_step_of_a_run_that_goes_on(name: str):
    schedule = getattr(lr_schedules, name)(optimizer(), **CASES[name], last_batch_iteration=3)
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()
    schedule.step()
    assert len(schedule.get_last_lr()) == 1


def test_one_cycle_has_no_last_rate_when_it_is_new():
    schedule = lr_schedules.OneCycle(optimizer(), **CASES["OneCycle"])
    with pytest.raises(AssertionError, match="need to call step"):
        schedule.get_last_lr()


def test_a_schedule_takes_what_wraps_an_optimizer():
    class Wrapper:
        def __init__(self) -> None:
            self.optimizer = optimizer()

    assert lr_schedules.WarmupLR(Wrapper()).get_last_lr() == [0.0]
    with pytest.raises(TypeError, match="got str"):
        lr_schedules.WarmupLR("adam")


def test_schedules_are_reachable_after_importing_the_package_alone():
    program = (
        "import sys, deepspeed\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'WarmupLR' in deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_arguments_of_schedules_make_a_section():
    parser = lr_schedules.add_tuning_arguments(argparse.ArgumentParser())
    given = ["--lr_schedule", "WarmupCosineLR", "--warmup_num_steps", "7", "--cos_min_ratio", "0.5"]
    section, problem = lr_schedules.get_config_from_args(parser.parse_args(given))
    assert problem is None
    assert section is not None
    assert section["type"] == "WarmupCosineLR"
    assert section["params"]["warmup_num_steps"] == 7
    assert "warmup_max_lr" not in section["params"]
    assert lr_schedules.get_lr_from_config(section)[0] is None
    assert lr_schedules.get_config_from_args(parser.parse_args([]))[0] is None
    args = parser.parse_args(["--lr_schedule", "Unknown"])
    assert "not supported" in str(lr_schedules.get_config_from_args(args)[1])
    warm = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.3}}
    assert lr_schedules.get_lr_from_config(warm) == (0.3, "")
    assert "not defined" in lr_schedules.get_lr_from_config({"type": "WarmupLR"})[1]


def test_update_lr_sets_numbers_and_tensors():
    groups = [{"lr": 0.1}, {"lr": torch.tensor(0.1)}]
    assert [float(rate) for rate in lr_schedules.update_lr(groups, [0.5, 0.25])] == [0.5, 0.25]


def test_config_arguments():
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed", "--deepspeed_config", "c.json"])
    assert args.deepspeed
    assert args.deepspeed_config == "c.json"
    assert not parser.parse_args([]).deepspeed


def test_a_repeating_loader_goes_on():
    loader = RepeatingLoader([1, 2, 3])
    assert [next(loader) for _ in range(7)] == [1, 2, 3, 1, 2, 3, 1]
    assert iter(loader) is loader
    assert len(loader) == 3


def test_a_loader_for_one_process_with_its_options():
    class Timer:
        started = 0

        def start(self) -> None:
            self.started += 1

    timer, data = Timer(), list(range(7))
    loader = DeepSpeedDataLoader(
        data, 2, False, -1, timer, collate_fn=sorted, dataloader_drop_last=True
    )
    loader.post_process_func = lambda items, _: [item + 100 for item in items]
    assert len(loader) == 3
    seen = [item for items in loader for item in items]
    assert len(set(seen)) == 6
    assert min(seen) >= 100
    assert timer.started == 4
    assert len(next(DeepSpeedDataLoader(data, 2, False, -1, None))) == 2
