"""Training without an fp32 master copy and with states of 16 and 8 bits: bytes, losses, resuming.

That a plan knows them is in test_plan_exact.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
import ds_ops
import ds_zero
from ds_core import comm, config
from ds_core.errors import ConfigError
from ds_core.precision import Precision
from ds_core.replicated import Replicated
from ds_core.testing import run_ranks

NO_MASTER = {"enabled": True, "bf16_master_weights_and_grads": True}
BF16_STATES = {**NO_MASTER, "bf16_optimizer_states": True}
ADAM = {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.99]}}
ADAM8 = {"type": "Adam8bit", "params": {"lr": 3e-3, "betas": [0.9, 0.99]}}
#: name: (the bf16 section, the optimizer, bytes per parameter of states)
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fp32-states": (NO_MASTER, ADAM, 8),
    "bf16-states": (BF16_STATES, ADAM, 4),
    "8-bit-states": (NO_MASTER, ADAM8, 2 + 8 / 256),
    "master-and-8-bit": ({"enabled": True}, ADAM8, 2 + 8 / 256),
    "master": ({"enabled": True}, ADAM, 8),
}


def document(name: str, stage: int, **more: Any) -> dict[str, Any]:
    section, optimizer, _ = CHOICES[name]
    return {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": section,
        "optimizer": optimizer,
        "zero_optimization": {"stage": stage},
        **more,
    }


# ---------------------------------------------------------------------------- configuration


def loaded(bf16: dict[str, Any], optimizer: dict[str, Any]) -> config.Config:
    return config.load({"train_batch_size": 1, "bf16": bf16, "optimizer": optimizer})


def test_what_the_section_asks_for_reaches_the_optimizer():
    found = loaded(BF16_STATES, {"type": "AdamW", "params": {"lr": 1e-3}})
    assert found.optimizer is not None
    derived = {"stochastic_rounding": True, "fp32_optimizer_states": False}
    assert found.optimizer.params == {"lr": 1e-3, **derived}
    assert {found.origin(f"optimizer.params.{key}") for key in derived} == {"derived"}
    formats = found.resolve_precision(bf16_is_fast=True)
    assert (formats.compute, formats.master, formats.grad) == ("bf16", None, "bf16")
    with_master = loaded({"enabled": True, "bf16_optimizer_states": True}, {"type": "Adam"})
    assert with_master.optimizer is not None
    assert with_master.optimizer.params == {"fp32_optimizer_states": False}
    assert with_master.resolve_precision(bf16_is_fast=True).master == "fp32"


def test_gradients_may_still_be_summed_in_fp32():
    document = {"train_batch_size": 1, "bf16": NO_MASTER, "optimizer": {"type": "AdamW"}}
    found = config.load({**document, "data_types": {"grad_accum_dtype": "fp32"}})
    assert found.resolve_precision(bf16_is_fast=True).grad == "fp32"


@pytest.mark.parametrize(
    ("bf16", "optimizer", "message"),
    [
        (NO_MASTER, {"type": "RMSprop"}, "RMSprop here rounds to nearest; use AdamW, Adam8bit"),
        (
            NO_MASTER,
            {"type": "AdamW", "params": {"torch_adam": True}},
            "AdamW here rounds to nearest; .* set bf16.stochastic_rounding to false, with which "
            "updates of less than 1/512 of a weight are lost",
        ),
        (
            NO_MASTER,
            {"type": "AdamW", "params": {"stochastic_rounding": False}},
            "params.stochastic_rounding: got false, but bf16.bf16_master_weights_and_grads is true",
        ),
        (
            BF16_STATES,
            {"type": "AdamW", "params": {"fp32_optimizer_states": True}},
            "fp32_optimizer_states: got true, but bf16.bf16_optimizer_states is true",
        ),
        (BF16_STATES, {"type": "Adam8bit"}, "got true, but Adam8bit keeps them in 8 bits"),
        (
            {"enabled": True, "bf16_optimizer_states": True},
            {"type": "RMSprop"},
            "the states of RMSprop here are fp32",
        ),
    ],
    ids=["class", "torchs", "rounding", "states", "8-bit", "states-of-torch"],
)
def test_what_does_not_go_together_is_refused(
    bf16: dict[str, Any], optimizer: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        loaded(bf16, optimizer)


def test_rounding_to_nearest_is_had_by_saying_so():
    nearest = {**BF16_STATES, "stochastic_rounding": False}
    found = loaded(nearest, {"type": "RMSprop"})
    assert found.optimizer is not None
    assert found.optimizer.params == {}


def given(optimizer: str, section: dict[str, Any]) -> None:
    model = nn.Linear(3, 3)
    made: Any = {
        "torch": lambda: torch.optim.AdamW(model.parameters()),
        "nearest": lambda: ds_ops.FusedAdam(model.parameters()),
        "random": lambda: ds_ops.FusedAdam(model.parameters(), stochastic_rounding=True),
    }[optimizer]()
    ds_core.initialize(
        model, {"train_micro_batch_size_per_gpu": 1, "bf16": section}, optimizer=made
    ).close()


@pytest.mark.parametrize(
    ("optimizer", "section", "message"),
    [
        ("torch", NO_MASTER, "the given AdamW rounds to nearest"),
        ("nearest", NO_MASTER, "the given FusedAdam rounds to nearest"),
        ("random", BF16_STATES, "the given FusedAdam keeps other states"),
        ("random", NO_MASTER, None),
        ("torch", {**BF16_STATES, "stochastic_rounding": False}, None),
    ],
)
def test_a_given_optimizer_must_do_as_asked(
    optimizer: str, section: dict[str, Any], message: str | None
):
    if message is None:
        run_ranks(1, given, optimizer, section)
        return
    with pytest.raises(Exception, match=message):
        run_ranks(1, given, optimizer, section)


# ---------------------------------------------------------------------------- memory


class Even(nn.Module):
    """Without padding, and whole blocks of 256 elements on each of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(ids, 64).to(self.layers[0].weight.dtype)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x.float().square().mean()


def held(name: str, stage: int) -> dict[str, int]:
    engine = ds_core.initialize(Even(), document(name, stage))
    engine.backward(engine(torch.arange(4)))
    engine.step()
    memory = engine.memory()
    engine.close()
    return memory


def held_at_every_stage(name: str) -> list[dict[str, int]]:
    return [held(name, stage) for stage in range(4)]


@pytest.mark.parametrize("name", ["fp32-states", "bf16-states", "8-bit-states"])
def test_bytes_without_master_copy_are_the_formula(name: str):
    """2P + 2P + kP at stage 0; 2P + 2P + kP/N, 2P + (2 + k) P/N and (4 + k) P/N at 1 to 3."""
    p, n, k = 4 * 64 * 64, 2, CHOICES[name][2]
    optimizer = {4: "adamw-bf16", 8: "adamw"}.get(int(k), "adam8bit")
    shares = [(1, 1, 1), (1, 1, n), (1, n, n), (n, n, n)]
    found = run_ranks(2, held_at_every_stage, name)
    for stage, (params, grads, states) in enumerate(shares):
        expected = {
            "parameters": 2 * p // params,
            "gradients": 2 * p // grads,
            "master": 0,
            "optimizer": int(k * p) // states,
            "padding": 0,
        }
        assert [of_rank[stage] for of_rank in found] == [expected] * 2
        estimate = ds_zero.estimate_memory(
            p, stage=stage, world_size=n, master=False, optimizer=optimizer
        )
        assert {key: estimate[key] for key in expected if key in estimate} == {
            key: value for key, value in expected.items() if key in estimate
        }


# ---------------------------------------------------------------------------- learning

TEXT = Path(argparse.__file__).read_bytes()
HELD_OUT = len(TEXT) - 8192


class Reader(nn.Module):
    """Predicts the next byte of a text from the last eight."""

    def __init__(self, width: int = 48, context: int = 8) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(256, width // 3)
        self.mix = nn.Linear(context * (width // 3), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(windows[:, :-1]).flatten(1))
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return nn.functional.cross_entropy(self.head(self.norm(x)).float(), windows[:, -1])


def windows(step: int, rank: int, *, heldout: bool = False) -> torch.Tensor:
    text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(1000 * step + rank)
    low, high, rows = (HELD_OUT, len(TEXT) - 9, 2048) if heldout else (0, HELD_OUT - 9, 64)
    starts = torch.randint(low, high, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(9)].long()


def reader(name: str, stage: int, **more: Any) -> Any:
    torch.manual_seed(0)
    return ds_core.initialize(Reader(), document(name, stage, gradient_clipping=1.0, **more))


def read(engine: Any, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        loss = engine(windows(step, dist.get_rank()))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def heldout_loss(name: str, stage: int, steps: int) -> float:
    engine = reader(name, stage)
    read(engine, 0, steps)
    with torch.no_grad():
        loss = float(engine(windows(0, 0, heldout=True)))
    engine.close()
    return loss


def test_losses_on_text_are_those_with_a_master_copy():
    """Of 200 steps at stage 2 of two ranks; held-out nats per byte."""
    names = ("master", "bf16-states", "8-bit-states")
    found = {name: run_ranks(2, heldout_loss, name, 2, 200, timeout_s=120)[0] for name in names}
    assert found["master"] < 3.0
    for loss in found.values():
        assert loss == pytest.approx(found["master"], rel=0.02), found


def small_updates(stochastic: bool) -> float:
    """How far weights of 1 come in 400 steps of 1/1000."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.ones_(model.weight)
    section = {**NO_MASTER, "stochastic_rounding": stochastic}
    engine = ds_core.initialize(
        model,
        {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0,
            "bf16": section,
            "optimizer": {"type": "FusedSGD", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 1},
        },
    )
    for _ in range(400):
        engine.backward(engine(torch.ones(1, 64).bfloat16()).float().sum())
        engine.step()
    mean = float(model.weight.detach().float().mean())
    engine.close()
    return mean


def test_small_updates_are_lost_unless_rounding_is_random():
    assert run_ranks(1, small_updates, False) == [1.0]
    assert run_ranks(1, small_updates, True) == [pytest.approx(0.6, abs=0.01)]


# ---------------------------------------------------------------------------- checkpoints


def whole(engine: Any) -> dict[str, torch.Tensor]:
    sharding = engine.sharding
    found = {name: sharding.full_parameter(name) for name, _ in engine.module.named_parameters()}
    return {name: value.float().clone() for name, value in found.items()}


def resumes(folder: str, name: str, stage: int) -> None:
    engine = reader(name, stage)
    read(engine, 0, 4)
    engine.save_checkpoint(folder)
    expected = read(engine, 4, 6)
    values = whole(engine)
    engine.close()
    again = reader(name, stage)
    read(again, 50, 2)  # what came before must not matter
    again.load_checkpoint(folder)
    assert read(again, 4, 6) == expected
    for key, value in whole(again).items():
        assert torch.equal(value, values[key]), key
    again.close()


@pytest.mark.parametrize("name", ["bf16-states", "8-bit-states", "master-and-8-bit"])
def test_a_resumed_run_rounds_as_it_would_have(name: str, tmp_path: Path):
    for stage in (0, 3):
        run_ranks(2, resumes, str(tmp_path / str(stage)), name, stage, timeout_s=120)


def two_groups(stage: int) -> tuple[nn.Module, Any]:
    """Groups that go through all units, so that state is not made in the order of steps."""
    torch.manual_seed(0)
    model = Reader()
    others = [p for p in model.parameters() if p.dim() < 2]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = ds_ops.FusedAdam(
        groups, lr=3e-3, stochastic_rounding=True, fp32_optimizer_states=False
    )
    precision = Precision(compute=torch.bfloat16)
    if stage == 0:
        return model, Replicated(model, optimizer, mesh=comm.Mesh.world(), precision=precision)
    return model, ds_zero.shard(model, optimizer, stage, precision=precision, min_unit_numel=0)


def steps(model: nn.Module, sharding: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        loss = model(windows(step, dist.get_rank()))
        loss.backward()
        sharding.update()
        sharding.zero_grad()
        losses.append(loss.item())
    return losses


def rounds_alike(stage: int) -> None:
    model, sharding = two_groups(stage)
    # The first step leaves the norm out, so that its parameters are stepped last of all.
    kept = model.norm
    model.norm = nn.Identity()
    steps(model, sharding, 0, 1)
    model.norm = kept
    steps(model, sharding, 1, 2)
    saved, values = sharding.state_dict()["state"], sharding.full_state_dict()
    saved = {k: {n: local(v).clone() for n, v in of.items()} for k, of in saved.items()}

    again, other = two_groups(stage)
    steps(again, other, 7, 1)
    for name, _ in again.named_parameters():
        if stage == 0:
            other.full_parameter(name).copy_(values[name])
        else:
            other.set_full_parameter(name, values[name])
    other.prepare_load()
    filled = other.state_dict()
    for key, by_name in filled["state"].items():
        for name, value in by_name.items():
            local(value).copy_(saved[key][name])
    other.load_state_dict(filled)
    assert steps(model, sharding, 3, 4) == steps(again, other, 3, 4)


def local(value: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(value, "local", value)
    return found


def test_random_rounding_does_not_depend_on_which_parameter_came_first():
    for stage in (0, 1, 3):
        run_ranks(2, rounds_alike, stage, timeout_s=120)


def moves(folder: str, source: str, target: str, stage: int) -> None:
    """Save with one choice of formats, load with another, at another stage."""
    engine = reader(source, 3 - stage)
    read(engine, 0, 3)
    engine.save_checkpoint(folder)
    values = whole(engine)
    engine.close()
    other = reader(target, stage)
    other.load_checkpoint(folder)
    for key, value in whole(other).items():
        expected = values[key] if target.startswith("master") else values[key].bfloat16().float()
        assert torch.equal(value, expected), key
    before = read(other, 3, 1)
    after = read(other, 4, 8)
    assert after[-1] < before[0]
    groups = other.sharding.param_groups
    is_random = target != "master"
    assert all(bool(group.get("stochastic_rounding")) is is_random for group in groups)
    other.close()


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("8-bit-states", "master"),
        ("master", "8-bit-states"),
        ("bf16-states", "master-and-8-bit"),
        ("fp32-states", "master"),
    ],
)
def test_checkpoints_move_between_formats(source: str, target: str, tmp_path: Path):
    for stage in (0, 2):
        run_ranks(2, moves, str(tmp_path / str(stage)), source, target, stage, timeout_s=120)
