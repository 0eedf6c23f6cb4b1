"""What every `Sharding` must do: train exactly as plain PyTorch does, at any number of ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_core import checkpoint, comm
from ds_core.engine_state import known_to
from ds_core.precision import Precision
from ds_core.seams import ParkableSharding, Sharding
from ds_core.testing.contracts.base import Contract
from ds_core.testing.contracts.model import (
    ContractModel,
    PlainTraining,
    assert_same_tensors,
    batch,
    optimizer_of,
)

Factory = Callable[..., Sharding]
_MEMORY_KINDS = {"parameters", "gradients", "optimizer"}


class ShardingContract(Contract):
    """Inherit to test a sharding scheme.

    `factory(model, optimizer, *, mesh, precision)` returns the `Sharding`.
    """

    def test_it_has_every_member_of_the_protocol(self) -> None:
        self.run(_is_a_sharding)

    def test_steps_equal_plain_pytorch(self) -> None:
        self.run(_steps_equal_plain)

    def test_all_ranks_start_from_the_values_of_rank_0(self) -> None:
        self.run(_starts_from_rank_0)

    def test_grad_norm_equals_torch(self) -> None:
        self.run(_grad_norm_equals_torch)

    def test_update_scales_the_gradients(self) -> None:
        self.run(_update_scales)

    def test_backwards_that_accumulate_locally_add_up(self) -> None:
        self.run(_accumulates_locally)

    def test_backwards_that_reduce_each_time_add_up(self) -> None:
        self.run(_accumulates_reducing)

    def test_no_sync_sends_no_gradient(self) -> None:
        self.run(_no_sync_sends_nothing)

    def test_a_step_averages_what_no_backward_has_reduced(self) -> None:
        self.run(_step_after_no_sync)

    def test_a_step_without_a_backward_changes_nothing(self) -> None:
        self.run(_step_without_backward)

    def test_zero_grad_forgets_all_gradients(self) -> None:
        self.run(_zero_grad_forgets)

    def test_ranks_may_use_different_parameters(self) -> None:
        self.run(_branches_differ)

    def test_a_learning_rate_set_in_param_groups_holds(self) -> None:
        self.run(_follows_param_groups)

    def test_first_nonfinite_names_the_parameter(self) -> None:
        self.run(_names_nonfinite)

    def test_master_copy_keeps_what_bf16_would_lose(self) -> None:
        self.run(_trains_in_bf16)

    def test_full_state_dict_is_whole_on_every_rank(self) -> None:
        self.run(_full_state_is_whole)

    @pytest.mark.parametrize("steps_before", [0, 2], ids=["fresh", "trained"])
    def test_state_survives_a_checkpoint(self, tmp_path: Path, steps_before: int) -> None:
        for size in self.world_sizes:
            folder = str(tmp_path / str(size))
            self.run(_survives_checkpoint, folder, steps_before, world_size=size)

    def test_state_loads_at_other_world_sizes(self, tmp_path: Path) -> None:
        largest = max(self.world_sizes)
        self.run(_save_after_two_steps, str(tmp_path), world_size=largest)
        for size in self.world_sizes:
            self.run(_loads_what_others_saved, str(tmp_path), largest, world_size=size)

    def test_an_error_within_an_update_is_told_until_a_load(self, tmp_path: Path) -> None:
        for size in self.world_sizes:
            self.run(_tells_that_it_is_torn, str(tmp_path / str(size)), world_size=size)

    def test_it_says_so_before_it_changes_anything(self, tmp_path: Path) -> None:
        for size in self.world_sizes:
            self.run(_asks_before_changes, str(tmp_path / str(size)), world_size=size)

    def test_memory_is_stated_by_kind_and_does_not_grow(self) -> None:
        self.run(_memory_is_steady)

    def test_close_leaves_a_plain_model(self) -> None:
        self.run(_close_leaves_plain_model)

    def test_dropping_it_frees_the_model(self) -> None:
        self.run(_is_freed)


class _Run:
    """A sharded model in this rank, and the plain one beside it."""

    def __init__(self, factory: Factory, *, seed: int = 0, precision: Any = None) -> None:
        self.mesh = comm.Mesh.world()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.model = ContractModel(seed)
        self.optimizer = optimizer_of(self.model)
        self.sharding = factory(
            self.model,
            self.optimizer,
            mesh=self.mesh,
            precision=precision or Precision(),
        )
        self.plain = PlainTraining(self.world_size, ContractModel(seed))

    def loss(self, step: int, *, branches: bool = False) -> torch.Tensor:
        only = self.rank if branches else None
        loss: torch.Tensor = self.model(*batch(step, self.rank), only=only)
        return loss

    def step(self, step: int) -> float:
        loss = self.loss(step)
        loss.backward()
        self.sharding.grad_norm()
        self.sharding.update()
        self.sharding.zero_grad()
        return float(loss.detach())

    def plain_step(self, *steps: int, weight: float = 1.0) -> None:
        self.plain.backward(steps, weight=weight)
        self.plain.step()

    def check_parameters(self) -> None:
        assert_same_tensors(self.sharding.full_state_dict(), self.plain.parameters())


def _is_a_sharding(factory: Factory) -> None:
    assert isinstance(_Run(factory).sharding, Sharding)


def _steps_equal_plain(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(4):
        run.step(step)
        run.plain_step(step)
        run.check_parameters()


def _starts_from_rank_0(factory: Factory) -> None:
    run = _Run(factory, seed=dist.get_rank())
    expected = PlainTraining(1).parameters()
    assert_same_tensors(run.sharding.full_state_dict(), expected, rtol=0, atol=0)


def _grad_norm_equals_torch(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(2):
        run.loss(step).backward()
        run.plain.backward([step])
        norm = run.sharding.grad_norm()
        assert norm.dtype == torch.float64
        assert norm.device.type == "cpu"
        assert norm.dim() == 0
        assert float(norm) == pytest.approx(run.plain.grad_norm(), rel=1e-5)
        assert float(run.sharding.grad_norm()) == float(norm), "asking twice must not change it"
        run.sharding.zero_grad()
        run.plain.optimizer.zero_grad()


def _update_scales(factory: Factory) -> None:
    run = _Run(factory)
    # AdamW hardly sees the scale of its first gradient: several of different scales do show.
    scales: list[float | torch.Tensor] = [1.0, 0.25, torch.tensor(3.0)]
    for step, scale in enumerate(scales):
        run.loss(step).backward()
        run.sharding.grad_norm()
        run.sharding.update(scale)
        run.sharding.zero_grad()
        run.plain_step(step, weight=float(scale))
    run.check_parameters()


def _accumulates_locally(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(0, 6, 3):
        run.sharding.accumulate_locally = True
        run.loss(step).backward()
        run.sharding.accumulate_locally = False
        with run.sharding.no_sync():
            run.loss(step + 1).backward()
        run.loss(step + 2).backward()
        run.sharding.update()
        run.sharding.zero_grad()
        run.plain_step(step, step + 1, step + 2)
    run.check_parameters()


def _accumulates_reducing(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(0, 4, 2):
        run.loss(step).backward()
        run.loss(step + 1).backward()
        run.plain.backward([step, step + 1])
        norm = float(run.sharding.grad_norm())
        assert norm == pytest.approx(run.plain.grad_norm(), rel=1e-5)
        run.sharding.update()
        run.sharding.zero_grad()
        run.plain.step()
    run.check_parameters()


def _no_sync_sends_nothing(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    with run.mesh.ledger.measure() as sent, run.sharding.no_sync():
        run.loss(1).backward()
    assert sent.sent_bytes(op="reduce_scatter") + sent.sent_bytes(op="all_reduce") == 0
    with run.mesh.ledger.measure() as sent:
        run.loss(2).backward()
    reduced = sent.sent_bytes(op="reduce_scatter") + sent.sent_bytes(op="all_reduce")
    assert (reduced > 0) == (run.world_size > 1)


def _step_after_no_sync(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(2):
        with run.sharding.no_sync():
            run.loss(step).backward()
        run.plain.backward([step])
        assert float(run.sharding.grad_norm()) == pytest.approx(run.plain.grad_norm(), rel=1e-5)
        run.sharding.update()
        run.sharding.zero_grad()
        run.plain.step()
    run.check_parameters()


def _step_without_backward(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    run.plain_step(0)
    assert float(run.sharding.grad_norm()) == 0.0
    run.sharding.update()
    run.sharding.zero_grad()
    run.check_parameters()


def _zero_grad_forgets(factory: Factory) -> None:
    run = _Run(factory)
    run.loss(7).backward()
    run.sharding.grad_norm()
    run.sharding.zero_grad()
    with run.sharding.no_sync():
        run.loss(8).backward()
    run.sharding.zero_grad()
    for step in range(2):
        run.step(step)
        run.plain_step(step)
    run.check_parameters()


def _branches_differ(factory: Factory) -> None:
    run = _Run(factory)
    for step in range(3):
        run.loss(step, branches=True).backward()
        run.sharding.grad_norm()
        run.sharding.update()
        run.sharding.zero_grad()
        run.plain.backward([step], branches=True)
        run.plain.step()
    run.check_parameters()


def _follows_param_groups(factory: Factory) -> None:
    run = _Run(factory)
    assert len(run.sharding.param_groups) == 2
    for optimizer in (run.sharding, run.plain.optimizer):
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.param_groups[1]["lr"] = 0.05
    for step in range(2):
        run.step(step)
        run.plain_step(step)
    run.check_parameters()


def _names_nonfinite(factory: Factory) -> None:
    run = _Run(factory)
    run.loss(0).backward()
    assert run.sharding.first_nonfinite() is None
    run.sharding.zero_grad()
    x, y = batch(0, run.rank)
    run.model(x * (float("nan") if run.rank == 0 else 1.0), y).backward()
    assert not bool(torch.isfinite(run.sharding.grad_norm()))
    # A rank that holds no part of the gradient need not see it, but some rank must.
    found = set(comm.all_gather_object(run.sharding.first_nonfinite(), run.mesh.group("dp")))
    names = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert found - {None}
    assert found - {None} <= names - {"unused"}
    run.sharding.zero_grad()
    run.step(1)
    run.plain_step(1)
    run.check_parameters()


def _trains_in_bf16(factory: Factory) -> None:
    precision = Precision(compute=torch.bfloat16, master=torch.float32)
    run = _Run(factory, precision=precision)
    for group in (*run.sharding.param_groups, *run.plain.optimizer.param_groups):
        group["lr"] = 1e-4  # less than one bf16 step of most parameters
    for step in range(5):
        run.step(step)
        run.plain_step(step)
    full, plain = run.sharding.full_state_dict(), run.plain.parameters()
    assert {tensor.dtype for tensor in full.values()} == {torch.bfloat16}
    assert_same_tensors({k: v.float() for k, v in full.items()}, plain, rtol=2**-7, atol=1e-3)
    saved = run.sharding.model_state()
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    held = [saved[name] for name in trained & set(saved)]  # a rank may hold no part of some
    dtypes = {getattr(value, "local", value).dtype for value in held}
    assert dtypes == {torch.float32}, "a checkpoint must hold the master copy"


def _full_state_is_whole(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    run.plain_step(0)
    full = run.sharding.full_state_dict()
    assert {tensor.device.type for tensor in full.values()} == {"cpu"}
    run.check_parameters()
    run.step(1)
    assert_same_tensors(full, run.plain.parameters())  # a copy, which later steps leave alone


def _checkpoint_state(sharding: Sharding) -> dict[str, Any]:
    optimizer = sharding.state_dict()
    return {
        "model": sharding.model_state(),
        "optimizer": optimizer["state"],
        "groups": optimizer["groups"],
    }


def _load(sharding: Sharding, folder: str) -> None:
    sharding.prepare_load()
    state = _checkpoint_state(sharding)
    state["optimizer"] = known_to(checkpoint.find(folder), state["optimizer"])
    loaded = checkpoint.load(folder, state=state)
    sharding.load_state_dict({"state": loaded["optimizer"], "groups": loaded["groups"]})


def _survives_checkpoint(factory: Factory, folder: str, steps_before: int) -> None:
    first = _Run(factory)
    for step in range(steps_before):
        first.step(step)
    checkpoint.save(folder, "t", _checkpoint_state(first.sharding))
    expected = [first.step(10 + step) for step in range(2)]
    second = _Run(factory, seed=5)
    second.step(3)  # it has a past of its own, which loading must replace
    _load(second.sharding, folder)
    assert [second.step(10 + step) for step in range(2)] == expected
    assert_same_tensors(
        second.sharding.full_state_dict(), first.sharding.full_state_dict(), rtol=0, atol=0
    )


def _save_after_two_steps(factory: Factory, folder: str) -> None:
    run = _Run(factory)
    run.step(0)
    run.step(1)
    checkpoint.save(folder, "t", _checkpoint_state(run.sharding))


def _loads_what_others_saved(factory: Factory, folder: str, saved_at: int) -> None:
    run = _Run(factory, seed=5)
    _load(run.sharding, folder)
    run.plain = PlainTraining(saved_at)
    run.plain_step(0)
    run.plain_step(1)
    run.check_parameters()
    run.plain.world_size = run.world_size
    run.step(2)
    run.plain_step(2)
    run.check_parameters()


def _tells_that_it_is_torn(factory: Factory, folder: str) -> None:
    run = _Run(factory)
    run.step(0)
    run.plain_step(0)
    checkpoint.save(folder, "t", _checkpoint_state(run.sharding))
    assert run.sharding.torn is None

    def fail(*_: Any) -> None:
        raise RuntimeError("the memory is full")

    # On every rank, where the first of the parameters have their new values.
    failing = run.optimizer.register_step_post_hook(fail)
    with pytest.raises(RuntimeError, match="the memory is full"):
        run.step(1)
    failing.remove()
    assert run.sharding.torn is not None
    assert "the memory is full" in run.sharding.torn
    run.sharding.zero_grad()
    _load(run.sharding, folder)
    assert run.sharding.torn is None
    run.step(1)
    run.plain_step(1)
    run.check_parameters()


def _asks_before_changes(factory: Factory, folder: str) -> None:
    run = _Run(factory)
    run.step(0)
    checkpoint.save(folder, "t", _checkpoint_state(run.sharding))
    asked: list[str] = []
    run.sharding.before_change = lambda: asked.append(doing)
    doing = "update"
    run.step(1)
    doing = "prepare_load"
    run.sharding.prepare_load()
    assert run.sharding.torn is not None, "what was dropped is not loaded yet"
    state = _checkpoint_state(run.sharding)
    state["optimizer"] = known_to(checkpoint.find(folder), state["optimizer"])
    loaded = checkpoint.load(folder, state=state)
    doing = "load_state_dict"
    run.sharding.load_state_dict({"state": loaded["optimizer"], "groups": loaded["groups"]})
    assert {"update", "prepare_load", "load_state_dict"} <= set(asked)
    assert run.sharding.torn is None
    if isinstance(run.sharding, ParkableSharding):
        doing = "offload_states"
        run.sharding.offload_states(None, "cpu", False, False, folder=None)
        assert doing in asked
        run.sharding.reload_states()


def _memory_is_steady(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    before = run.sharding.memory()
    assert set(before) >= _MEMORY_KINDS
    assert all(isinstance(size, int) and size >= 0 for size in before.values())
    assert before["parameters"] > 0
    assert before["optimizer"] > 0
    run.step(1)
    assert run.sharding.memory() == before


def _close_leaves_plain_model(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    run.plain_step(0)
    run.sharding.close()
    assert_same_tensors(
        {name: p.detach() for name, p in run.model.named_parameters()}, run.plain.parameters()
    )
    assert _hooks_of(run.model) == []
    plain = PlainTraining(run.world_size, run.model)
    fresh = PlainTraining(run.world_size, run.plain.model)
    for training in (plain, fresh):
        training.backward([1])
        training.step()
    assert_same_tensors(plain.parameters(), fresh.parameters())


def _hooks_of(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks"):
            found += [f"{name}.{kind}"] * len(getattr(module, kind))
    for name, param in model.named_parameters():
        if param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None):
            found.append(name)
    return found


def _is_freed(factory: Factory) -> None:
    run = _Run(factory)
    run.step(0)
    kept = (run.sharding, run.model, run.model.embed.weight)
    watched = [weakref.ref(thing) for thing in kept]
    del kept
    del run
    # C++ owns a tensor in a cycle as well: one pass frees what holds it, the next the tensor.
    for _ in range(3):
        gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
