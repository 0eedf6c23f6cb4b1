"""The small helpers that programs import from all over the original package."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from user_programs import config, make_model

import deepspeed
from deepspeed.compression.helper import recursive_getattr, recursive_setattr
from deepspeed.launcher.runner import parse_inclusion_exclusion, parse_resource_filter
from deepspeed.moe.utils import has_moe_layers, is_moe_param
from deepspeed.ops.op_builder import CPUAdamBuilder, FusedAdamBuilder
from deepspeed.runtime import utils
from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler
from deepspeed.utils.logging import LoggerFactory
from ds_core.errors import ConfigError, DsError, LaunchError
from ds_core.testing import run_ranks


def test_memory_in_use_is_written_when_forced(capsys: pytest.CaptureFixture[str]):
    utils.see_memory_usage("before the model")
    assert capsys.readouterr().out == ""
    utils.see_memory_usage("before the model", force=True)
    told = capsys.readouterr().out
    assert "before the model" in told
    assert "resident" in told
    utils.memory_status("here", reset_max=True)
    assert "memory here: current" in capsys.readouterr().out
    utils.empty_cache()
    assert utils.get_ma_status() >= 0


def test_tensors_in_containers_are_moved():
    pair = (torch.ones(2), {"a": [torch.zeros(1)]})
    moved = utils.move_to_device(pair, "meta")
    assert isinstance(moved, tuple)
    assert moved[0].is_meta
    assert moved[1]["a"][0].is_meta
    weight = torch.ones(3)
    assert utils.move_to_device(weight, "cpu", lambda each: True) is weight


def test_small_functions(tmp_path: Path):
    utils.ensure_directory_exists(str(tmp_path / "a" / "b" / "file"))
    assert (tmp_path / "a" / "b").is_dir()
    assert utils.call_to_str("f", 1, "x", key=2) == "f(1, 'x', key=2)"
    assert utils.get_only_unique_item([3, 3]) == 3
    with pytest.raises(DsError, match="expected all to be the same"):
        utils.get_only_unique_item([3, 4])
    utils.set_random_seed(5)
    first = torch.rand(2)
    utils.set_random_seed(5)
    assert torch.equal(torch.rand(2), first)
    assert utils.noop_decorator(len) is len
    assert not utils.is_model_parallel_parameter(first)


def test_parts_of_a_model_are_reached_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3)))
    assert recursive_getattr(model, "1.0").out_features == 3
    recursive_setattr(model, "1.0", nn.Identity())
    assert isinstance(model[1][0], nn.Identity)


def test_nothing_is_an_expert():
    model = nn.Linear(2, 2)
    assert has_moe_layers(model) == (False, 0)
    assert not is_moe_param(model.weight)
    model.weight.allreduce = False
    assert is_moe_param(model.weight)


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("fixed_linear", {"total_curriculum_step": 4, "difficulty_step": 8}, [8, 16, 32, 64]),
        (
            "fixed_root",
            {"total_curriculum_step": 4, "difficulty_step": 8, "root_degree": 2},
            [8, 32, 40, 64],
        ),
        ("fixed_discrete", {"difficulty": [8, 16, 64], "max_step": [1, 2]}, [8, 8, 16, 64]),
    ],
)
def test_difficulty_grows_with_the_steps(kind: str, how: dict[str, Any], expected: list[int]):
    scheduler = CurriculumScheduler(
        {"min_difficulty": 8, "max_difficulty": 64, "schedule_type": kind, "schedule_config": how}
    )
    assert [scheduler.update_difficulty(step) for step in (0, 1, 2, 9)] == expected
    other = copy.deepcopy(scheduler)
    other.set_state(scheduler.get_state())
    assert other.get_current_difficulty() == 64
    other.set_current_difficulty(16)
    assert other.get_current_difficulty() == 16


def test_difficulty_by_a_function_of_the_program():
    scheduler = CurriculumScheduler(
        {"min_difficulty": 2, "max_difficulty": 64, "schedule_type": "custom"}
    )
    assert scheduler.get_difficulty(5) == 2
    scheduler.set_custom_get_difficulty(lambda step: step * 3)
    assert scheduler.update_difficulty(5) == 15


def test_a_curriculum_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="max_difficulty is missing"):
        CurriculumScheduler({"min_difficulty": 2})
    wrong = {"min_difficulty": 2, "max_difficulty": 8, "schedule_type": "linear"}
    with pytest.raises(ConfigError, match="schedule_type: got 'linear', expected one of"):
        CurriculumScheduler(wrong)
    with pytest.raises(ConfigError, match="total_curriculum_step is missing"):
        CurriculumScheduler({**wrong, "schedule_type": "fixed_linear"})


def test_loggers_of_programs():
    made = LoggerFactory.create_logger("a program", logging.INFO)
    assert made.isEnabledFor(logging.INFO)
    assert LoggerFactory.create_logger("a program").handlers == made.handlers
    with pytest.raises(DsError, match="expected a name"):
        LoggerFactory.create_logger()


def test_operators_are_built_ahead():
    assert CPUAdamBuilder().is_compatible()
    assert CPUAdamBuilder().load().CPUAdam
    assert CPUAdamBuilder().builder().NAME == "cpu_adam"
    assert FusedAdamBuilder().load().FusedAdam


def test_slots_are_chosen_by_filters():
    pool = {"a": 4, "b": 2}
    assert parse_inclusion_exclusion(pool, "", "") == {"a": [0, 1, 2, 3], "b": [0, 1]}
    assert parse_inclusion_exclusion(pool, "a:1,3", "") == {"a": [1, 3]}
    assert parse_resource_filter({"a": [0, 1], "b": [0, 1]}, exclude_str="b:0") == {
        "a": [0, 1],
        "b": [1],
    }
    with pytest.raises(LaunchError, match="c"):
        parse_inclusion_exclusion(pool, "c", "")


def test_files_that_hold_objects_of_the_original_are_read():
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum])
    # What protocol 2 writes for an object of LossScaler with an attribute.
    text = (
        b"\x80\x02cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}X\x01\x00\x00\x00aK\x05sb."
    )
    assert vars(pickle.loads(text)) == {"a": 5}


def test_the_loss_scale_has_an_object_of_its_own():
    run_ranks(1, scaled)


def scaled() -> None:
    fp16 = {"enabled": True, "initial_scale_power": 4}
    engine, optimizer, *_ = deepspeed.initialize(model=make_model(), config=config(2, fp16=fp16))
    scaler = optimizer.loss_scaler
    assert (scaler.loss_scale, scaler.cur_scale, scaler.dynamic) == (16.0, 16.0, True)
    assert engine.dynamic_loss_scale_args()["init_scale"] == 16
    assert engine.get_data_types()[0] is torch.float16
    assert optimizer.scaled_global_norm() is None
    assert engine.checkpoint_tag_validation_enabled()
    assert not engine.checkpoint_tag_validation_fail()
    assert not engine.random_ltd_enabled()
    assert engine.flops_profiler_profile_step() == 1
    engine.destroy()
