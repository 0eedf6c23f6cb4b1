from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from user_programs import config, loss_of, make_model, train

import deepspeed
from ds_core.errors import CheckpointError
from ds_core.testing import run_ranks

DATA = Path(__file__).parents[2] / "ds-core" / "tests" / "data" / "deepspeed"


def made(stage: int, **changes: Any) -> Any:
    return deepspeed.initialize(model=make_model(), config=config(stage, **changes))[0]


def test_training_goes_on_from_a_checkpoint_to_the_bit(stage: int, tmp_path: Path):
    run_ranks(2, goes_on, stage, str(tmp_path))


SCHEDULE = {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_max_lr": 1e-2}}


def goes_on(stage: int, folder: str) -> None:
    engine = made(stage, scheduler=SCHEDULE)
    train(engine, 2)
    rng = torch.get_rng_state()
    client = {"epoch": 3, "best": 0.25, "rng": rng, "tuple": (1, 2), "nested": {"a": [1, None]}}
    assert engine.save_checkpoint(folder, client_state=client) is True
    assert (Path(folder) / "latest").read_text() == "global_step2"
    expected = train(engine, 2, first=2)
    other = made((stage + 1) % 4, scheduler=SCHEDULE)
    path, found = other.load_checkpoint(folder)
    assert path == str(Path(folder) / "global_step2")
    assert torch.equal(found.pop("rng"), rng)
    assert found == {key: value for key, value in client.items() if key != "rng"}
    assert (other.global_steps, other.global_samples, other.micro_steps) == (2, 8, 2)
    assert other.lr_scheduler.last_batch_iteration == 1
    tolerance = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(
        torch.tensor(train(other, 2, first=2)), torch.tensor(expected), **tolerance
    )


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_scripts_beside_a_checkpoint_write_whole_weights(stage: int, tmp_path: Path):
    run_ranks(2, saves, stage, str(tmp_path / "saved"))
    expected = torch.load(tmp_path / "saved" / "expected.pt")
    scripts = sorted(path.name for path in (tmp_path / "saved").glob("*.py"))
    assert scripts == ([] if stage == 0 else ["zero_to_fp32.py", "zero_to_torch.py"])
    for script in scripts:
        assert os.access(tmp_path / "saved" / script, os.X_OK)
        out = tmp_path / script
        subprocess.run([sys.executable, script, ".", str(out)], check=True, cwd=tmp_path / "saved")
        found = torch.load(out / "pytorch_model.bin")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def saves(stage: int, folder: str) -> None:
    engine = made(stage)
    train(engine, 1)
    engine.save_checkpoint(folder)
    state = engine.module_state_dict()
    if dist.get_rank() == 0:
        torch.save(dict(state), Path(folder) / "expected.pt")


def test_tags_weights_alone_and_what_is_not_there(tmp_path: Path):
    run_ranks(2, tags, str(tmp_path))


def tags(folder: str) -> None:
    engine = made(2)
    assert engine.load_checkpoint(folder) == (None, None)
    with pytest.raises(CheckpointError, match="pytorch_model"):
        engine.load_checkpoint(folder, "pytorch_model")
    with pytest.raises(ValueError, match="save_dir"):
        engine.save_checkpoint("")
    train(engine, 2)
    engine.save_checkpoint(folder, "pytorch_model", save_latest=False)
    assert not (Path(folder) / "latest").exists()
    other = made(3)
    path, client = other.load_checkpoint(
        folder, "pytorch_model", load_module_only=True, load_lr_scheduler_states=False
    )
    assert path is not None
    assert client == {}
    assert other.global_steps == 0
    weights, ours = engine.module_state_dict(), other.module_state_dict()
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    settings = {key: value for key, value in config(3).items() if key != "optimizer"}
    running, *_ = deepspeed.initialize(model=make_model(), config=settings)
    running.load_checkpoint(folder, "pytorch_model")
    whole = running.module_state_dict()
    assert all(torch.equal(weights[name], whole[name]) for name in weights)


def test_what_a_load_is_told_to_leave_out_stays_as_it_is(stage: int, tmp_path: Path):
    run_ranks(2, leaves_out, stage, str(tmp_path))


def leaves_out(stage: int, folder: str) -> None:
    engine = made(stage, scheduler=SCHEDULE)
    train(engine, 3)
    engine.save_checkpoint(folder, None, {"epoch": 1}, True, False)
    expected = engine._engine.state_dict()
    weights, step = "0.weight", "exp_avg"

    def momentum(of: Any) -> torch.Tensor:
        return of._engine.sharding.full_optimizer_state(weights, step)

    other = made(stage, scheduler=SCHEDULE)
    train(other, 1)
    before = momentum(other)
    _, client = other.load_checkpoint(
        folder, load_optimizer_states=False, load_lr_scheduler_states=False
    )
    assert client == {"epoch": 1}
    assert torch.equal(momentum(other), before)
    assert other.lr_scheduler.last_batch_iteration == 0
    assert other.global_steps == 3
    _, client = other.load_checkpoint(folder, None, True, True, False)
    assert torch.equal(momentum(other), momentum(engine))
    assert other.lr_scheduler.last_batch_iteration == 0
    alone = made(stage, scheduler=SCHEDULE)
    _, client = alone.load_checkpoint(folder, load_module_only=True)
    assert client == {"epoch": 1}
    assert (alone.global_steps, alone.lr_scheduler.last_batch_iteration) == (0, -1)
    for each in (other, alone):
        found = each._engine.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_frozen_parameters_that_were_left_out_keep_the_models_values(stage: int, tmp_path: Path):
    run_ranks(2, leaves_frozen, stage, str(tmp_path))


def leaves_frozen(stage: int, folder: str) -> None:
    def frozen(value: float) -> Any:
        model = make_model()
        model[0].weight.requires_grad_(False).fill_(value)
        return deepspeed.initialize(model=model, config=config(stage))[0]

    engine = frozen(0.5)
    train(engine, 1)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    other = frozen(0.25)
    other.load_checkpoint(folder)
    found, expected = other._engine.state_dict(), engine._engine.state_dict()
    assert found.pop("0.weight").eq(0.25).all()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_tags_that_ranks_name_differently(tmp_path: Path):
    run_ranks(2, names_tags, str(tmp_path))


def names_tags(folder: str) -> None:
    mine = f"rank{dist.get_rank()}"
    for policy in ("Ignore", "Warn", "Fail"):
        engine = made(1, checkpoint={"tag_validation": policy})
        assert engine.checkpoint_tag_validation_enabled() == (policy != "Ignore")
        assert engine.checkpoint_tag_validation_fail() == (policy == "Fail")
        if policy == "Fail":
            with pytest.raises(CheckpointError, match="rank1"):
                engine.save_checkpoint(folder, mine)
        else:
            engine.save_checkpoint(folder, mine)
            assert engine.load_checkpoint(folder)[0] == str(Path(folder) / "rank0")


class Wrapped(nn.Module):
    """The model under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()
        for param in self.parameters():
            nn.init.zeros_(param)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.body(inputs)


def into_body(src: Any, dst: Any) -> None:
    dst.body.load_state_dict(src)


def test_a_function_of_the_program_puts_the_weights_into_the_model(stage: int, tmp_path: Path):
    run_ranks(2, places, stage, str(tmp_path))


def places(stage: int, folder: str) -> None:
    half = {"bf16": {"enabled": True}, "scheduler": SCHEDULE}
    engine = made(stage, **half)
    for number in range(2):
        engine.backward(loss_of(engine, number, dist.get_rank(), torch.bfloat16))
        engine.step()
    engine.save_checkpoint(folder, client_state={"epoch": 1})
    expected = engine._engine.state_dict()
    other = deepspeed.initialize(model=Wrapped(), config=config(stage, **half))[0]
    path, client = other.load_checkpoint(
        folder, load_optimizer_states=False, custom_load_fn=into_body
    )
    assert (path is not None, client) == (True, {"epoch": 1})
    assert (other.global_steps, other.lr_scheduler.last_batch_iteration) == (2, 1)
    found = other._engine.state_dict()
    for name, value in expected.items():
        assert torch.equal(found[f"body.{name}"], value.bfloat16().float()), name
    # What the function took as it is has all its digits, and its optimizer goes on.
    same = made(stage, **half)
    same.load_checkpoint(folder, custom_load_fn=lambda src, dst: dst.load_state_dict(src))
    found = same._engine.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for each in (engine, same):
        each.backward(loss_of(each, 2, dist.get_rank(), torch.bfloat16))
        each.step()
    later = engine._engine.state_dict()
    assert all(torch.equal(v, later[name]) for name, v in same._engine.state_dict().items())
    weights = {name: value + 1 for name, value in expected.items()}
    same.load_module_state_dict({"module": weights}, custom_load_fn=into_itself)
    assert torch.equal(same._engine.state_dict()["0.bias"], weights["0.bias"])

    def fails_on_one(src: Any, dst: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyError("body")

    with pytest.raises(CheckpointError, match="custom_load_fn failed on rank 1: KeyError"):
        same.load_module_state_dict({"module": weights}, custom_load_fn=fails_on_one)


def into_itself(src: Any, dst: Any) -> None:
    dst.load_state_dict(src)


def test_names_that_may_be_missing(stage: int):
    engine = made(stage)
    weights = {name: torch.ones_like(v) for name, v in make_model().state_dict().items()}
    del weights["4.bias"]
    with pytest.raises(CheckpointError, match=r"lacks: 4\.bias"):
        engine.load_module_state_dict({"module": weights})
    with pytest.raises(CheckpointError, match=r"model alone has \['4\.bias'\]"):
        engine.load_module_state_dict({"module": weights}, allowed_missing_keys=["0.bias"])
    engine.load_module_state_dict({"module": weights}, allowed_missing_keys=["4.bias"])
    assert engine._engine.state_dict()["4.weight"].eq(1).all()
    engine.load_module_state_dict({"module": weights}, False, None, True, None, None)


class Notes:
    """Of a class that no program has allowed to be loaded."""


def test_objects_in_a_client_state_need_leave_to_be_loaded(tmp_path: Path, caplog: Any):
    engine = made(0)
    engine.save_checkpoint(tmp_path, client_state={"args": Namespace(lr=1), "note": Notes()})
    assert "add_safe_globals" in caplog.text
    with pytest.raises(CheckpointError, match="add_safe_globals"):
        engine.load_checkpoint(tmp_path)
    with torch.serialization.safe_globals([Namespace, Notes]):
        _, client = engine.load_checkpoint(tmp_path)
    assert client["args"] == Namespace(lr=1)


# ---------------------------------------------------------------------- whole weights


def test_weights_as_one_dictionary_and_one_file(stage: int, tmp_path: Path):
    run_ranks(2, weights, stage, str(tmp_path))


def weights(stage: int, folder: str) -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    engine, *_ = deepspeed.initialize(
        model=model, config=config(stage, zero_optimization=zero, bf16={"enabled": True})
    )
    names = list(make_model().state_dict())
    if stage == 3:
        whole = engine._zero3_consolidated_16bit_state_dict()
        assert (whole is None) == (dist.get_rank() > 0)
        if whole is not None:
            assert list(whole) == names
            assert {value.dtype for value in whole.values()} == {torch.bfloat16}
        trained = engine._consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        assert trained is None or list(trained) == names[1:]
    else:
        with pytest.raises(ValueError, match="stage 3"):
            engine._zero3_consolidated_16bit_state_dict()
    assert list(engine.module_state_dict(exclude_frozen_parameters=True)) == names[1:]
    assert engine.save_16bit_model(folder) is True
    comparison = make_model().bfloat16().state_dict()
    if dist.get_rank() == 0:
        saved = torch.load(Path(folder) / "pytorch_model.bin")
        assert all(torch.equal(saved[name], comparison[name]) for name in names)
    blocked = Path(folder) / "pytorch_model.bin" / "inside"
    with pytest.raises(CheckpointError, match="save_16bit_model"):
        engine.save_16bit_model(blocked)


def test_stage_3_writes_no_model_unless_it_may_gather(tmp_path: Path):
    engine = made(3)
    assert engine.save_16bit_model(tmp_path) is False
    assert not engine.zero_gather_16bit_weights_on_model_save()
    assert list(tmp_path.iterdir()) == []


def test_states_are_parked_and_come_back():
    class Kind:
        value = "optim_states"

    engine = made(2)
    expected = train(made(2), 3)
    assert train(engine, 1) == expected[:1]
    engine.offload_states(device="none")
    engine.offload_states(include=[Kind()])
    engine.reload_states()
    assert train(engine, 2, first=1) == expected[1:]


# ---------------------------------------------------------------------- of DeepSpeed


class Tiny(nn.Module):
    """The model of scripts/make_deepspeed_checkpoints.py."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.frozen = nn.Linear(5, 5)
        self.hidden = nn.Linear(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(5.0))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)


@pytest.mark.parametrize("case", ["stage0-fp32-w1", "stage1-fp32-w2", "stage3-bf16-w2"])
def test_checkpoints_that_deepspeed_wrote_are_loaded_as_they_are(case: str, tmp_path: Path):
    with tarfile.open(DATA / f"{case}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run_ranks(2, loads_deepspeeds, str(tmp_path / case))


def loads_deepspeeds(folder: str) -> None:
    from safetensors.torch import load_file

    before = sorted(path.name for path in Path(folder).rglob("*"))
    expected = load_file(Path(folder) / "expected.safetensors")
    for stage in (1, 3):
        model = Tiny()
        trained = [param for param in model.parameters() if param.requires_grad]
        groups = [{"params": trained}]
        if "stage0" not in folder:
            groups = [
                {"params": [param for param in trained if param.dim() > 1]},
                {"params": [param for param in trained if param.dim() <= 1]},
            ]
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=groups, config=config(stage)
        )
        path, client = engine.load_checkpoint(folder)
        assert path is not None
        assert Path(path).parent == Path(folder)
        assert isinstance(client, dict)
        assert engine.global_steps == 3
        assert engine.global_samples > 0
        state = engine.module_state_dict()
        for name in ("embed.weight", "hidden.weight", "out.weight"):
            reference = expected.get(f"fp32.{name}", expected.get(name))
            assert torch.equal(state[name].float(), reference.float()), name
        engine.destroy()
    assert sorted(path.name for path in Path(folder).rglob("*")) == before
