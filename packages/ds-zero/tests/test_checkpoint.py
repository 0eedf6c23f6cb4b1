from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from zero_loops import adamw, assert_same_parameters, assert_same_state, plain, sharded
from zero_loops import sharded_steps as train
from zero_models import CASES

import ds_zero
from ds_core.checkpoint import load, save
from ds_core.precision import Precision
from ds_core.testing import run_ranks

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)


def save_state(optimizer: ds_zero.ZeroOptimizer, folder: Path) -> None:
    held = optimizer.state_dict()
    state = {"model": optimizer.model_state(), "optimizer": held["state"], "groups": held["groups"]}
    save(folder, "tag", state)


def load_state(optimizer: ds_zero.ZeroOptimizer, folder: Path) -> None:
    optimizer.prepare_load()
    held = optimizer.state_dict()
    state = {"model": optimizer.model_state(), "optimizer": held["state"], "groups": held["groups"]}
    loaded = load(folder, state=state, strict=False)
    optimizer.load_state_dict({"state": loaded["optimizer"], "groups": loaded["groups"]})


def full_state(optimizer: ds_zero.ZeroOptimizer) -> dict[str, torch.Tensor]:
    found = {}
    for unit in optimizer.units:
        for spec in unit.specs:
            found[spec.name] = optimizer.full_parameter(spec.name)
            if unit.trainable:
                for key in ("exp_avg", "exp_avg_sq"):
                    found[f"{key} {spec.name}"] = optimizer.full_optimizer_state(spec.name, key)
    return found


def train_and_save(name: str, stage: int, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    case = CASES[name]
    model, optimizer = sharded(case, stage, **options)
    train(model, optimizer, case, 3)
    optimizer.param_groups[0]["lr"] = 0.005
    save_state(optimizer, folder)
    return full_state(optimizer)


def load_and_read(name: str, stage: int, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    model, optimizer = sharded(CASES[name], stage, **options)
    load_state(optimizer, folder)
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    found = full_state(optimizer)
    train(model, optimizer, CASES[name], 1, first=3)
    return found


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((1, 2), (3, 3)), ((3, 3), (2, 1)), ((3, 1), (1, 2))],
    ids=lambda pair: f"stage{pair[0]}-N{pair[1]}",
)
@pytest.mark.parametrize("name", ["tied", "odd-sizes", "lora", "unused", "groups"])
def test_any_layout_loads_into_any_other(name: str, saved: Any, loaded: Any, tmp_path: Path):
    before = run_ranks(saved[1], train_and_save, name, saved[0], tmp_path)[0]
    for after in run_ranks(loaded[1], load_and_read, name, loaded[0], tmp_path):
        assert after.keys() == before.keys()
        for key, value in before.items():
            assert torch.equal(after[key], value), key


def test_master_copy_is_what_is_saved(tmp_path: Path):
    before = run_ranks(2, train_and_save, "tied", 3, tmp_path, precision=BF16)[0]
    after = run_ranks(3, load_and_read, "tied", 2, tmp_path)[0]
    assert before["embed.weight"].dtype == torch.float32
    assert torch.equal(after["embed.weight"], before["embed.weight"])


@pytest.mark.parametrize("name", ["untied", "branches"])
@pytest.mark.parametrize("stage_after", [1, 3])
def test_resumed_training_goes_on_as_if_uninterrupted(name: str, stage_after: int, tmp_path: Path):
    run_ranks(2, train_half, name, 3, tmp_path)
    run_ranks(2, resume_and_compare, name, stage_after, tmp_path)


def train_half(name: str, stage: int, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    model, optimizer = sharded(CASES[name], stage)
    train(model, optimizer, CASES[name], 3)
    save_state(optimizer, folder)


def resume_and_compare(name: str, stage: int, folder: Path) -> None:
    torch.set_default_dtype(torch.float64)
    case = CASES[name]
    model, optimizer = sharded(case, stage)
    with torch.no_grad():
        for unit in optimizer.units:
            (unit.shard if unit.master is None else unit.master).zero_()
    load_state(optimizer, folder)
    train(model, optimizer, case, 3, first=3)
    truth, reference, _ = plain(case, 6)
    assert_same_parameters(optimizer, truth, 1e-9)
    assert_same_state(optimizer, reference, truth, ("exp_avg", "exp_avg_sq"), 1e-9)


def test_loads_into_a_plain_model_of_one_process(tmp_path: Path):
    before = run_ranks(3, train_and_save, "tied", 3, tmp_path)[0]
    run_ranks(1, load_into_plain, tmp_path, before)


def load_into_plain(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    model: nn.Module = CASES["tied"].build()
    optimizer = adamw(model.parameters())
    names = dict(model.named_parameters())
    moments = {name: torch.zeros_like(param) for name, param in names.items()}
    state = {
        "model": {name: param.detach() for name, param in names.items()},
        "optimizer": {"exp_avg": moments},
    }
    load(folder, state=state, strict=False)
    for name, param in names.items():
        assert torch.equal(param, expected[name])
        assert torch.equal(moments[name], expected[f"exp_avg {name}"])
    assert optimizer.state == {}
