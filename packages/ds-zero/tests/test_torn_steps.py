"""What an error leaves of a step is not saved, read as if whole, or trained on; a load mends it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from offload_loops import PRECISIONS, assert_same_bits, everything
from test_checkpoint import load_state, save_state
from zero_loops import adamw, sharded, sharded_steps
from zero_models import CASES

import ds_zero
from ds_core import checkpoint, tensor_files
from ds_core.checkpoint import storage
from ds_core.errors import TensorFileError, TornError
from ds_core.testing import run_ranks
from ds_zero import Offload, inner_step
from ds_zero.host_steps import early_updates, speculative
from ds_zero.offload import homes
from ds_zero.state import full_value

CASE = CASES["stack"]
UNITS = 6


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes are replaced inside."""
    patch = pytest.MonkeyPatch()
    try:
        for target, name, value in changes:
            patch.setattr(target, name, value)
        yield
    finally:
        patch.undo()


@contextmanager
def failing_step(number: int) -> Iterator[None]:
    """The update of one unit fails inside, the `number`-th."""
    keep, count = inner_step.InnerStep.take, [0]

    def take(self: Any, *args: Any) -> None:
        count[0] += 1
        if count[0] == number:
            raise RuntimeError("out of memory")
        keep(self, *args)

    with patched((inner_step.InnerStep, "take", take)):
        yield


def backward(model: torch.nn.Module, step: int) -> None:
    rank = dist.get_rank()
    CASE.loss(model, CASE.inputs(rank, step), rank, step).backward()


def assert_goes_on_as_a_whole_one(
    model: torch.nn.Module,
    optimizer: ds_zero.ZeroOptimizer,
    folder: Path,
    stage: int,
    **options: Any,
) -> None:
    """After a load, training has the bits of a run that loaded the same without any error."""
    load_state(optimizer, folder)
    assert optimizer.torn is None
    other, reference = sharded(CASE, stage, **options)
    load_state(reference, folder)
    for mine in ((model, optimizer), (other, reference)):
        sharded_steps(*mine, CASE, 2, first=9)
    assert_same_bits(everything(optimizer), everything(reference), "after a load")


# ---------------------------------------------------------------------- an update


@pytest.mark.parametrize("ratio", [1.0, 0.5], ids=["plain", "twin"])
def test_an_update_that_fails_on_one_rank_ends_on_all(ratio: float, tmp_path: Path):
    run_ranks(2, fail_on_rank_1, Offload(optimizer="cpu", ratio=ratio), tmp_path)


def fail_on_rank_1(offload: Offload, folder: Path) -> None:
    model, optimizer = sharded(CASE, 2, offload=offload)
    sharded_steps(model, optimizer, CASE, 1)
    save_state(optimizer, folder)
    backward(model, 1)
    assert optimizer.torn is None
    if dist.get_rank() == 1:
        with failing_step(3), pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
        assert "ended in the middle: RuntimeError: out of memory" in optimizer.torn
    else:
        optimizer.step()  # the other rank goes on to publish
        assert optimizer.torn is None
    told = "rank 1: parameters and optimizer state do not belong to one step.*out of memory.*load"
    for refused in (optimizer.state_dict, optimizer.model_state, optimizer.publish):
        with pytest.raises(ds_zero.ShardError, match=told) as caught:
            refused()
        assert isinstance(caught.value, TornError)
    optimizer.zero_grad()
    backward(model, 2)
    for refused in (optimizer.grad_norm, optimizer.update, optimizer.step):
        with pytest.raises(TornError, match=told):
            refused()
    optimizer.zero_grad()
    assert_goes_on_as_a_whole_one(model, optimizer, folder, 2, offload=offload)


def test_an_update_that_fails_with_shards_on_disk(tmp_path: Path):
    run_ranks(2, fail_with_shards_on_disk, tmp_path)


def fail_with_shards_on_disk(folder: Path) -> None:
    options = {"offload": Offload(parameters="nvme", folder=str(folder / "swap"))}
    model, optimizer = sharded(CASE, 3, **options)
    sharded_steps(model, optimizer, CASE, 1)
    save_state(optimizer, folder)
    backward(model, 1)
    with failing_step(3), pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    optimizer.zero_grad()
    load_state(optimizer, folder)
    other, reference = sharded(CASE, 3)
    load_state(reference, folder)
    assert_same_bits(everything(optimizer), everything(reference), "loaded")
    for mine in ((model, optimizer), (other, reference)):
        sharded_steps(*mine, CASE, 1, first=9)
    assert_same_bits(everything(optimizer), everything(reference), "trained on")


def test_what_was_not_loaded_to_its_end_is_torn():
    run_ranks(1, begin_a_load)


def begin_a_load() -> None:
    model, optimizer = sharded(CASE, 2)
    sharded_steps(model, optimizer, CASE, 1)
    optimizer.prepare_load()
    backward(model, 1)
    with pytest.raises(TornError, match="no load_state_dict"):
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    sharded_steps(model, optimizer, CASE, 1)


def test_close_is_possible_when_a_step_is_torn(stage: int):
    run_ranks(2, close_torn, stage)


def close_torn(stage: int) -> None:
    model, optimizer = sharded(CASE, stage)
    optimizer.torn = "the test says so"
    optimizer.close()
    assert all(param.numel() for param in model.parameters())


# ---------------------------------------------------------------------- a disk


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
def test_values_whose_write_failed_are_never_read_as_of_before(what: str, tmp_path: Path):
    run_ranks(1, lose_a_write, what, tmp_path)


def lose_a_write(what: str, folder: Path) -> None:
    # So many buffers that the step itself waits for no write.
    many = {"piece_numel": 200, "buffers": 99, "parameter_buffers": 99}
    options = {"offload": Offload(**{what: "nvme"}, folder=str(folder / "swap"), **many)}
    with patched((homes, "open_tensor_files", tensor_files.ThreadedFiles)):
        model, optimizer = sharded(CASE, 3, **options)
        sharded_steps(model, optimizer, CASE, 2)
        save_state(optimizer, folder)
        keep, count = tensor_files._ThreadedFile._write, [0]

        def write(self: Any, view: memoryview, offset: int) -> int:
            count[0] += 1
            if count[0] == 2:
                raise TensorFileError(5, "the disk is bad", self._path)
            return keep(self, view, offset)

        backward(model, 2)
        with patched((tensor_files._ThreadedFile, "_write", write)):
            # The step is told itself, or whoever waits for the write.
            with suppress(OSError):
                optimizer.step()
            for _ in range(3):
                with pytest.raises(TornError, match=r"the disk is bad.*\.swap.*load a checkpoint"):
                    optimizer.state_dict()
        plain, reference = sharded(CASE, 3)
        sharded_steps(plain, reference, CASE, 3)
        kind = "exp_avg" if what == "optimizer" else "parameter"
        first = [read_or_error(optimizer, reference, kind) for _ in range(2)]
        assert first[0] == first[1]
        assert "the disk is bad" in first[0][0]
        optimizer.zero_grad()
        assert_goes_on_as_a_whole_one(model, optimizer, folder, 3, **options)
        optimizer.close()


def read_or_error(
    optimizer: ds_zero.ZeroOptimizer, reference: ds_zero.ZeroOptimizer, kind: str
) -> list[str]:
    """What reading says of values that are lost; all others are as they should be."""
    errors = []
    for name in [spec.name for unit in optimizer.units for spec in unit.specs]:
        try:
            found = full_value(optimizer, name, kind)
        except OSError as error:
            errors.append(f"{name}: {error}")
            continue
        assert torch.equal(found, full_value(reference, name, kind)), name
    return errors


# ---------------------------------------------------------------------- steps ahead

AHEAD = Offload(optimizer="cpu", speculative=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_ahead_that_fails_is_undone_and_told_on_all_ranks(precision: str, stage: int):
    run_ranks(2, fail_ahead, stage, precision)


def fail_ahead(stage: int, precision: str) -> None:
    results = []
    for offload in (AHEAD, Offload(optimizer="cpu")):
        model, optimizer = sharded(CASE, stage, offload=offload, precision=PRECISIONS[precision])
        if precision == "bf16":
            model.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        for step in range(5):
            broken = offload.speculative and step == 2 and dist.get_rank() == 1
            with failing_step(2) if broken else patched():
                backward(model, step)
            if offload.speculative and step == 2:
                mine = (
                    (RuntimeError, "^out of memory") if broken else (ds_zero.ShardError, "rank 1")
                )
                with pytest.raises(mine[0], match=mine[1]):
                    optimizer.step()
                assert optimizer.torn is None
                optimizer.zero_grad()
                backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        results.append(everything(optimizer))
        optimizer.close()
    assert_same_bits(*results, "a step ahead failed")


def test_a_step_ahead_that_cannot_be_undone_tears(tmp_path: Path):
    run_ranks(1, fail_to_undo, tmp_path)


def fail_to_undo(folder: Path) -> None:
    model, optimizer = sharded(CASE, 2, offload=AHEAD)
    sharded_steps(model, optimizer, CASE, 1)
    save_state(optimizer, folder)

    def no_undo(*_: Any) -> Any:
        def undo() -> None:
            raise RuntimeError("no way back")

        return undo

    with failing_step(2), patched((speculative, "_restore_of", no_undo)):
        backward(model, 1)
    with pytest.raises(RuntimeError, match="no way back"):
        optimizer.step()
    assert "could not be undone: RuntimeError: no way back" in optimizer.torn
    with pytest.raises(TornError, match="no way back"):
        optimizer.state_dict()
    optimizer.zero_grad()
    assert_goes_on_as_a_whole_one(model, optimizer, folder, 2, offload=AHEAD)


# ---------------------------------------------------------------------- updates in backward


class Spoiled(torch.autograd.Function):
    """The same values, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("nan")


def spoil(module: torch.nn.Module) -> Any:
    """From here downwards gradients are NaN, on the last rank."""
    last = dist.get_rank() == dist.get_world_size() - 1
    hook = (lambda _, args: (Spoiled.apply(args[0]),)) if last else (lambda _, args: None)
    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("known", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("fused", [True, False], ids=["leaves-out", "masked"])
def test_a_gradient_that_is_not_finite_in_the_middle_of_early_updates(
    fused: bool, known: bool, stage: int, tmp_path: Path
):
    run_ranks(2, spoil_the_middle, stage, known, fused, tmp_path)


def spoil_the_middle(stage: int, known: bool, fused: bool, folder: Path) -> None:
    # Where the host may not wait for the gradient's norm, as with an accelerator.
    with patched((early_updates, "_is_known", lambda _: known)):
        options = {"update_in_backward": True}
        make = partial(torch.optim.AdamW, lr=1e-2, **({} if fused else {"foreach": True}))
        model, optimizer = sharded(CASE, stage, make, **options)
        sharded_steps(model, optimizer, CASE, 1)
        save_state(optimizer, folder)
        spoiled = spoil(model.blocks[1])
        backward(model, 1)
        spoiled.remove()
        with pytest.raises(TornError, match=r"gradient was not finite when \d of 6 units were upd"):
            optimizer.step()
        for value in optimizer.full_state_dict().values():
            assert torch.isfinite(value).all(), "no NaN goes into weights"
        with pytest.raises(TornError, match="not finite"):
            optimizer.state_dict()
        optimizer.zero_grad()
        load_state(optimizer, folder)
        sharded_steps(model, optimizer, CASE, 1)


def test_a_gradient_that_is_not_finite_before_any_update_tears_nothing(stage: int):
    for known in (True, False):
        run_ranks(2, spoil_all, stage, known)


def spoil_all(stage: int, known: bool) -> None:
    with patched((early_updates, "_is_known", lambda _: known)):
        model, optimizer = sharded(CASE, stage, adamw, update_in_backward=True)
        sharded_steps(model, optimizer, CASE, 1)
        before = everything(optimizer)
        rank = dist.get_rank()
        (CASE.loss(model, CASE.inputs(rank, 1), rank, 1) * float("nan")).backward()
        assert not torch.isfinite(optimizer.grad_norm())
        with pytest.raises(ds_zero.ShardError, match="no unit was updated"):
            optimizer.step()
        optimizer.zero_grad()
        assert optimizer.torn is None
        assert_same_bits(everything(optimizer), before, "nothing was updated")
        sharded_steps(model, optimizer, CASE, 1)


def test_a_backward_that_ends_in_the_middle_of_early_updates_tears():
    run_ranks(1, end_in_the_middle)


def end_in_the_middle() -> None:
    model, optimizer = sharded(CASE, 2, update_in_backward=True)
    sharded_steps(model, optimizer, CASE, 1)

    def stop(_: torch.Tensor) -> None:
        raise RuntimeError("stopped")

    handle = model.entry.weight.register_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        backward(model, 1)
    handle.remove()
    optimizer.zero_grad()
    with pytest.raises(TornError, match=r"ended in the middle, after [1-5] of 6 units"):
        optimizer.state_dict()


def test_an_early_update_that_fails_is_told_on_all_ranks_when_the_step_ends(stage: int):
    run_ranks(2, fail_early, stage)


def fail_early(stage: int) -> None:
    model, optimizer = sharded(CASE, stage, update_in_backward=True)
    sharded_steps(model, optimizer, CASE, 1)
    broken = dist.get_rank() == 1
    with failing_step(3) if broken else patched():
        backward(model, 1)
    kind, told = (RuntimeError, "^out of memory") if broken else (TornError, "rank 1: .*out of mem")
    with pytest.raises(kind, match=told):
        optimizer.step()
    with pytest.raises(TornError, match="rank 1"):
        optimizer.state_dict()


# ---------------------------------------------------------------------- beside a save


def test_a_step_ahead_waits_for_a_save_that_reads(tmp_path: Path):
    run_ranks(1, save_and_step_ahead, tmp_path)


def save_and_step_ahead(folder: Path) -> None:
    offload = Offload(
        optimizer="cpu", speculative=True, parameters="nvme", folder=str(folder / "swap")
    )
    model, optimizer = sharded(CASE, 3, offload=offload)
    sharded_steps(model, optimizer, CASE, 2)
    state = optimizer.state_dict()["state"]
    assert not any(value.is_lazy for value in state["exp_avg"].values()), "it is in memory"
    assert any(value.is_lazy for value in optimizer.model_state().values())
    expected = {
        name: optimizer.full_optimizer_state(name, "exp_avg").clone() for name in state["exp_avg"]
    }
    weights = optimizer.full_state_dict()
    gate, keep = threading.Event(), storage.write_data_file

    def slow(*args: Any, **options: Any) -> Any:
        gate.wait(20)
        return keep(*args, **options)

    with patched((storage, "write_data_file", slow)), checkpoint.AsyncSaver() as saver:
        optimizer.before_change = saver.wait_for_reads
        parts = {"model": optimizer.model_state(), "optimizer": optimizer.state_dict()["state"]}
        saver.save(folder / "saved", "a", parts)
        opens = threading.Timer(0.2, gate.set)
        opens.start()
        backward(model, 2)
        optimizer.step()
        saver.wait()
        opens.join()
    found = checkpoint.full_state_dict(folder / "saved", "a", prefix="")
    for name, value in expected.items():
        assert torch.equal(found[f"optimizer.exp_avg.{name}"], value)
        assert torch.equal(found[f"model.{name}"], weights[name])
    optimizer.close()


def test_two_threads_read_what_is_on_disk(tmp_path: Path):
    run_ranks(1, read_from_two_threads, tmp_path)


def read_from_two_threads(folder: Path) -> None:
    offload = Offload(optimizer="nvme", parameters="nvme", folder=str(folder), piece_numel=200)
    model, optimizer = sharded(CASE, 3, offload=offload)
    sharded_steps(model, optimizer, CASE, 1)
    shards = [*optimizer.model_state().values()]
    for values in optimizer.state_dict()["state"].values():
        shards += [value for value in values.values() if hasattr(value, "is_lazy")]
    errors: list[BaseException] = []

    def read_all() -> None:
        try:
            for shard in 4 * shards:
                with shard.opened() as local:
                    assert torch.isfinite(local).all()
        except BaseException as error:
            errors.append(error)

    names = [spec.name for unit in optimizer.units for spec in unit.specs]
    expected = {name: optimizer.full_optimizer_state(name, "exp_avg") for name in names}
    reader = threading.Thread(target=read_all)
    reader.start()
    while reader.is_alive():
        for name in names:
            assert torch.equal(optimizer.full_optimizer_state(name, "exp_avg"), expected[name])
            assert torch.isfinite(optimizer.full_parameter(name)).all()
        with torch.no_grad():
            assert torch.isfinite(model(CASE.inputs(0, 0))).all()
    reader.join()
    assert not errors, errors
    sharded_steps(model, optimizer, CASE, 1, first=1)
    optimizer.close()


def test_whoever_changes_something_says_so_first():
    run_ranks(1, change_everything)


def change_everything() -> None:
    model, optimizer = sharded(CASE, 2, offload=AHEAD)
    sharded_steps(model, optimizer, CASE, 1)
    asked: list[str] = []
    optimizer.before_change = lambda: asked.append(doing)
    value = torch.ones(5)
    doing = "set_full_parameter"
    optimizer.set_full_parameter("exit.bias", value)
    doing = "set_full_optimizer_state"
    optimizer.set_full_optimizer_state("exit.bias", "exp_avg", value)
    doing = "GatheredParameters"
    with ds_zero.GatheredParameters(model.exit.bias, modifier_rank=0):
        model.exit.bias.data.zero_()
    doing = "backward"
    backward(model, 1)
    doing = "update"
    optimizer.step()
    doing = "publish"
    optimizer.publish()
    wanted = (
        "set_full_parameter set_full_optimizer_state GatheredParameters backward update publish"
    )
    assert set(asked) == set(wanted.split())
    model, optimizer = sharded(CASE, 2, update_in_backward=True)
    optimizer.before_change = lambda: asked.append(doing)
    doing = "early"
    backward(model, 0)
    assert "early" in asked
