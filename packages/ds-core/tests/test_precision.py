"""The dynamic loss scale as a table of hand-written cases, and how number formats are told."""

from __future__ import annotations

import pytest
import torch

from ds_core.errors import ConfigError
from ds_core.precision import LossScale, LossScaler, Precision

GOOD, OVER = ".", "x"


def scales(policy, history):
    """The scale after each step of `history`, in which x is an overflow."""
    scaler = LossScaler(policy)
    found = []
    for step in history:
        scaler.update(step == OVER)
        found.append(scaler.scale)
    return found


@pytest.mark.parametrize(
    ("policy", "history", "expected"),
    [
        (LossScale(initial=8, window=2, hysteresis=1), "..", [8, 16]),
        (LossScale(initial=8, window=2, hysteresis=1), "....", [8, 16, 16, 32]),
        (LossScale(initial=8, window=2, hysteresis=1), "x", [4]),
        (LossScale(initial=8, window=2, hysteresis=1), "xx", [4, 2]),
        (LossScale(initial=8, window=2, hysteresis=1), ".x..", [8, 4, 4, 8]),
        (LossScale(initial=8, window=9, hysteresis=2), "x", [8]),
        (LossScale(initial=8, window=9, hysteresis=2), "xx", [8, 4]),
        (LossScale(initial=8, window=9, hysteresis=2), "x.x", [8, 8, 4]),
        (LossScale(initial=8, window=9, hysteresis=2, consecutive_hysteresis=True),
         "x.x", [8, 8, 8]),
        (LossScale(initial=8, window=9, hysteresis=2, consecutive_hysteresis=True),
         "x.xx", [8, 8, 8, 4]),
        (LossScale(initial=8, window=2, hysteresis=2), "x..x", [8, 8, 16, 16]),
        (LossScale(initial=2, window=9, hysteresis=1), "x", [1]),
        (LossScale(initial=3, window=9, hysteresis=1, minimum=2), "x", [2]),
        (LossScale(static=128), "x.x.", [128, 128, 128, 128]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_scale_after_each_step(policy, history, expected):
    assert scales(policy, history) == expected


def test_overflow_at_the_minimum_is_an_error():
    scaler = LossScaler(LossScale(initial=1, hysteresis=1))
    with pytest.raises(ConfigError, match=r"overflow at the minimum loss scale 1: .*Use bf16"):
        scaler.update(True)


def test_without_a_policy_nothing_may_be_skipped():
    scaler = LossScaler(None)
    assert (scaler.scale, scaler.may_skip) == (1.0, False)
    scaler.update(True)
    assert scaler.scale == 1.0


def test_state_goes_on_in_the_middle_of_a_window():
    policy = LossScale(initial=8, window=3, hysteresis=2)
    first, second = LossScaler(policy), LossScaler(policy)
    for overflowed in (True, False, False):
        first.update(overflowed)
    second.load_state_dict(first.state_dict())
    for overflowed in (False, True, True):
        first.update(overflowed)
        second.update(overflowed)
        assert second.state_dict() == first.state_dict()
    assert second.scale == 8.0


def test_precision_is_told_in_words():
    precision = Precision(torch.float16, torch.float32, loss_scale=LossScale())
    assert str(precision) == (
        "parameters float16, master float32, gradients float16, loss scale dynamic"
    )
    assert str(Precision()) == "parameters as built, no master copy, gradients as built"
    told = str(Precision(autocast=torch.bfloat16, loss_scale=LossScale(static=64)))
    assert told.endswith("autocast bfloat16, loss scale 64")
