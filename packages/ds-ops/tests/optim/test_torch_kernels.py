"""torch's fused steps in place of ours: the calls that they take, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_core import ops
from ds_core.ops.checking import compare
from ds_ops import implementations
from ds_ops.torch_kernels import optimizer_steps
from ds_ops.triton_kernels import targets

CPU = torch.device("cpu")
NAMES = ("adam", "adagrad", "sgd")
#: Of an op: the position of `found_inf`; where before the numbers is what torch's kernels have not.
FLAG = {"adam": 17, "adagrad": 13, "sgd": 14}
ABSENT = {"copy": -3, "undo": -2, "grad_scale": -1}


def calls(name: str) -> list[tuple[Any, ...]]:
    """The cases of an op with all tensors in fp32, and without what torch has not."""
    found = []
    for case in ops.get(f"{name}_step_").cases(CPU, torch.float32):
        changed = [t.float() if torch.is_tensor(t) else t for t in case]
        first = next(i for i, value in enumerate(case) if isinstance(value, float))
        changed[first - 3 : first] = [None, None, None]
        found.append(tuple(changed))
    return found


def of(name: str, what: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(optimizer_steps, f"{name}_{what}")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_they_take_they_compute(name: str) -> None:
    taken = [args for args in calls(name) if of(name, "refusal")(*args) is None]
    assert len(taken) >= 5
    assert any(len(args) > FLAG[name] and float(args[-1]) == 2.0 for args in taken)
    for args in taken:
        found = compare(ops.get(f"{name}_step_"), of(name, "step_"), args)
        assert not found.problem, [a for a in args if not torch.is_tensor(a)]


@pytest.mark.parametrize("name", NAMES)
def test_what_they_have_not_they_do_not_take(name: str) -> None:
    refusal = of(name, "refusal")
    args = calls(name)[0]
    assert refusal(*args) is None
    first = next(i for i, value in enumerate(args) if isinstance(value, float))
    for absent, offset in ABSENT.items():
        given = list(args)
        given[first + offset] = torch.ones(())
        assert absent in refusal(*given)
    for index in range(3):
        given = list(args)
        given[index] = given[index].bfloat16()
        assert "in fp32" in refusal(*given)
    assert refusal(*args[: FLAG[name] - 1], 7) is None  # nothing is rounded in fp32


def test_adam_without_bias_correction_is_not_theirs() -> None:
    args = next(a for a in calls("adam") if not a[14])
    assert "bias" in str(optimizer_steps.adam_refusal(*args))


@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_a_gpu_without_triton_gets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "architecture", lambda *_: "sm_75")
    choice = ops.choose(f"{name}_step_", "cuda")
    args = calls(name)[0]
    assert choice.for_call(args).name == "torch"
    assert choice.for_call((args[0].bfloat16(), *args[1:])).name == "reference"
    monkeypatch.setattr(targets, "architecture", lambda *_: "sm_90")
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: object())
    assert ops.choose(f"{name}_step_", "cuda").for_call(args).name == "triton"
