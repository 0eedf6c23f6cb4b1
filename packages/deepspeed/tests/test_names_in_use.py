"""Every name of names_in_use.txt, which public programs use, is what that file says of it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from user_programs import config, make_model

import deepspeed
from deepspeed._errors import NotProvidedError
from deepspeed._stand_in import is_stand_in
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from ds_core.testing import run_ranks

_ROWS = [
    line.split()
    for line in (Path(__file__).parent / "names_in_use.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
_MEMBERS = [row for row in _ROWS if row[0].startswith(("engine.", "optimizer."))]


def found_at(name: str) -> Any:
    """What `from package.module import name` gives, where the last parts may be attributes."""
    module, _, last = name.rpartition(".")
    try:
        holder: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        holder = found_at(module)
    if isinstance(holder, ModuleType) and not hasattr(holder, last):
        return importlib.import_module(name)
    return getattr(holder, last)


def is_refused(value: Any) -> bool:
    return is_stand_in(value) or (
        isinstance(value, ModuleType) and (value.__doc__ or "").startswith("Not provided")
    )


@pytest.mark.parametrize(("name", "expected"), [row for row in _ROWS if row not in _MEMBERS])
def test_a_name_in_use_is_there_or_says_what_to_use(name: str, expected: str):
    value = found_at(name)
    assert ("refused" if is_refused(value) else "works") == expected
    if expected == "refused" and is_stand_in(value):
        with pytest.raises(NotProvidedError, match="is not provided by this package; "):
            value()


def test_no_name_is_told_twice():
    names = [name for name, _ in _ROWS]
    assert sorted(set(names)) == sorted(names)
    assert {expected for _, expected in _ROWS} == {"works", "refused"}


def test_members_in_use_of_engine_and_optimizer(stage: int):
    run_ranks(1, members, stage)


def members(stage: int) -> None:
    engine, *_ = deepspeed.initialize(model=make_model(), config=config(stage))
    wrong = []
    for name, expected in _MEMBERS:
        value: Any = engine
        try:
            for part in name.removeprefix("engine.").split("."):
                value = getattr(value, part)
            found = "works"
        except NotProvidedError:
            found = "refused"
        except AttributeError as error:
            found = str(error)
        if found != expected:
            wrong.append((name, found))
    engine.destroy()
    assert wrong == []


def test_the_optimizer_is_of_the_class_that_programs_ask_for():
    run_ranks(1, classes)


def classes() -> None:
    half = {"fp16": {"enabled": True}}, {"bf16": {"enabled": True}}
    expected = {
        (0, 0): FP16_Optimizer,
        (0, 1): BF16_Optimizer,
        (1, 1): DeepSpeedZeroOptimizer,
        (2, 0): DeepSpeedZeroOptimizer,
        (3, 1): DeepSpeedZeroOptimizer_Stage3,
    }
    for (stage, precision), kind in expected.items():
        engine, optimizer, *_ = deepspeed.initialize(
            model=make_model(), config=config(stage, **half[precision])
        )
        assert type(optimizer) is kind
        assert isinstance(optimizer, ZeROOptimizer) == (stage > 0)
        assert isinstance(optimizer, torch.optim.Optimizer)
        engine.destroy()


def test_masters_follow_weights_that_a_program_wrote(stage: int):
    if stage == 3:
        pytest.skip("there weights are written inside GatheredParameters, which sees to it")
    run_ranks(2, rewritten, stage)


def rewritten(stage: int) -> None:
    model = make_model()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model, config=config(stage, bf16={"enabled": True})
    )
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.5)
    optimizer.refresh_fp32_params()
    for param in model.parameters():
        master = deepspeed.utils.safe_get_full_fp32_param(param)
        assert master is not None
        assert (master == 0.5).all()
        assert (param == 0.5).all()
    engine.destroy()
