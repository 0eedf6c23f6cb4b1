"""Steps that an error ends in the middle, and state that changes while a checkpoint reads it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import nn

import ds_core
from ds_core import checkpoint, comm
from ds_core.checkpoint import storage
from ds_core.errors import DsError, NonFiniteError, TornError
from ds_core.testing import run_ranks


class Net(nn.Sequential):
    def __init__(self, width: int = 24) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(4)))


def make(folder: str | None = None, *, stage: int = 2, **section: Any) -> Any:
    torch.manual_seed(0)
    where = {"device": "nvme", "nvme_path": folder}
    offload = {"offload_optimizer": where, "offload_param": {**where, "max_in_cpu": 0}}
    return ds_core.initialize(
        Net(),
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {
                "stage": stage,
                "sub_group_size": 600,
                **section,
                **(offload if folder is not None else {}),
            },
            "progress": False,
        },
    )


def backward(engine: Any, number: int) -> None:
    rank = comm.Mesh.world().group("dp").rank
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(100 * number + rank))
    engine.backward(engine(x).square().mean())


def step(engine: Any, number: int) -> None:
    backward(engine, number)
    assert engine.step()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


def is_refused_until_a_load(engine: Any, saved: str, expected: dict[str, torch.Tensor]) -> None:
    """`saved` was made after step 0; `expected` is what step 1 makes of it."""
    for attempt in (
        lambda: step(engine, 9),
        lambda: engine.save_checkpoint(saved, "torn"),
        lambda: engine.save_model(f"{saved}-model"),
        engine.state_dict,
        lambda: engine.load_checkpoint(saved, load_module_only=True),
    ):
        with pytest.raises(TornError, match="do not belong to one step"):
            attempt()
    engine.load_checkpoint(saved)
    step(engine, 1)
    assert same(engine.state_dict(), expected)
    engine.save_checkpoint(saved, "whole")


def two_steps(saved: str, **settings: Any) -> dict[str, torch.Tensor]:
    engine = make(**settings)
    step(engine, 0)
    engine.save_checkpoint(saved, "a")
    step(engine, 1)
    found: dict[str, torch.Tensor] = engine.state_dict()
    engine.close()
    return found


def fail(*_: Any) -> None:
    raise RuntimeError("the memory is full")


def tear_a_step(saved: str, settings: dict[str, Any]) -> None:
    expected = two_steps(saved, **settings)
    engine = make(**settings)
    step(engine, 7)
    # After the first of several units.
    failing = engine.sharding._inner.register_step_post_hook(fail)
    backward(engine, 8)
    with pytest.raises(RuntimeError, match="the memory is full"):
        engine.step()
    failing.remove()
    is_refused_until_a_load(engine, saved, expected)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_an_error_in_the_middle_of_a_step_is_neither_saved_nor_built_upon(
    stage: int, tier: str, tmp_path: Path
) -> None:
    settings = {"stage": stage, "folder": str(tmp_path / "swap") if tier == "disk" else None}
    if stage < 3 and tier == "disk":
        settings = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    run_ranks(2, tear_a_step, str(tmp_path / "saved"), settings)


class Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")


def update_some_in_backward(saved: str) -> None:
    settings = {"stage": 2, "update_in_backward": True}
    expected = two_steps(saved, **settings)
    engine = make(**settings)
    step(engine, 7)
    # Gradients are not finite from here down; the layers above are updated by then.
    poison = engine.module[2].register_forward_pre_hook(lambda _, args: (Poison.apply(args[0]),))
    backward(engine, 8)
    poison.remove()
    with pytest.raises(NonFiniteError, match="part of the step was taken") as told:
        engine.step()
    assert "the step was not taken" not in str(told.value)
    is_refused_until_a_load(engine, saved, expected)


def test_a_gradient_that_is_not_finite_after_some_units_were_updated(tmp_path: Path) -> None:
    run_ranks(2, update_some_in_backward, str(tmp_path / "saved"))


def save_before_the_count(saved: str) -> None:
    engine = make(update_in_backward=True)
    backward(engine, 0)
    with pytest.raises(DsError, match="backward has updated parameters already"):
        engine.save_checkpoint(saved, "a")
    engine.step()
    engine.save_checkpoint(saved, "a")
    engine.close()


def test_what_backward_has_updated_is_not_saved_before_step_counts_it(tmp_path: Path) -> None:
    run_ranks(2, save_before_the_count, str(tmp_path / "saved"))


def overwrite(engine: Any, how: str, folder: str) -> None:
    name, shape = "1.weight", (24, 24)
    if how == "load_state_dict":
        engine.load_state_dict({n: torch.zeros_like(v) for n, v in engine.state_dict().items()})
    elif how == "load_pretrained":
        engine.load_pretrained(f"{folder}/zeros.safetensors")
    elif how == "set_full_parameter":
        engine.sharding.set_full_parameter(name, torch.zeros(shape))
    else:
        engine.sharding.set_full_optimizer_state(name, "exp_avg", torch.zeros(shape))


HOW = ("load_state_dict", "load_pretrained", "set_full_parameter", "set_full_optimizer_state")


def write_while_a_save_reads(folder: str) -> None:
    engine = make(f"{folder}/swap", stage=3)
    names = [name for name, _ in engine.module.named_parameters()]
    write, gate = storage.write_data_file, threading.Event()

    def held_up(*args: Any, **more: Any) -> Any:
        assert gate.wait(60)
        return write(*args, **more)

    step(engine, 0)
    step(engine, 1)
    zeros = {n: torch.zeros_like(v) for n, v in engine.state_dict().items()}
    safetensors.torch.save_file(zeros, f"{folder}/zeros.safetensors")
    for how in HOW:
        step(engine, 2)
        expected = {n: engine.sharding.full_parameter(n) for n in names}
        moments = {n: engine.sharding.full_optimizer_state(n, "exp_avg") for n in names}
        gate.clear()
        with mock.patch.object(storage, "write_data_file", held_up):
            engine.save_checkpoint(f"{folder}/saved", how, asynchronous=True)
            threading.Timer(0.3, gate.set).start()
            overwrite(engine, how, folder)
            assert gate.is_set()
            engine.wait_for_checkpoint()
        saved = checkpoint.full_state_dict(f"{folder}/saved", how, prefix="")
        assert same({n: saved[f"model.{n}"] for n in names}, expected), how
        assert same({n: saved[f"optimizer.exp_avg.{n}"] for n in names}, moments), how
    engine.close()


def test_what_overwrites_state_waits_for_a_save_that_reads_it_from_disk(tmp_path: Path) -> None:
    run_ranks(1, write_while_a_save_reads, str(tmp_path))


def read_while_a_save_reads(folder: str) -> None:
    engine = make(f"{folder}/swap", stage=3)
    names = [name for name, _ in engine.module.named_parameters()]
    step(engine, 0)
    expected = {n: engine.sharding.full_parameter(n) for n in names}
    moments = {n: engine.sharding.full_optimizer_state(n, "exp_avg") for n in names}
    for number in range(8):
        engine.save_checkpoint(f"{folder}/saved", f"t{number}", asynchronous=True)
        for name in names:
            assert torch.equal(engine.sharding.full_optimizer_state(name, "exp_avg"), moments[name])
            assert torch.equal(engine.sharding.full_parameter(name), expected[name])
        engine.wait_for_checkpoint()
        saved = checkpoint.full_state_dict(f"{folder}/saved", f"t{number}", prefix="")
        assert same({n: saved[f"model.{n}"] for n in names}, expected)
        assert same({n: saved[f"optimizer.exp_avg.{n}"] for n in names}, moments)
    engine.close()


def test_state_is_read_beside_a_save_that_reads_it_from_disk(tmp_path: Path) -> None:
    run_ranks(2, read_while_a_save_reads, str(tmp_path))
