"""The engine with speculative, shared and divided steps of the host; optimizers of ds-ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_core
import ds_zero
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_ops.optim import CPUAdagrad, FusedAdam, FusedLion, FusedSGD
from ds_zero.host_steps.speculative import Speculation


class Net(nn.Module):
    """Learns to repeat its input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 19)
        self.layers = nn.ModuleList([nn.Linear(19, 37), nn.Linear(37, 19), nn.Linear(19, 11)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers[:2]:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.layers[2](x).float(), tokens)


PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    # A scale so large that the first steps overflow.
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}},
}


def config(stage: int, precision: str, **offload: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.7,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 6}},
        "zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu", **offload}},
        "progress": False,
        **PRECISIONS[precision],
    }


def engine_of(settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return ds_core.initialize(model=Net(), config=settings)


def train(engine: Any, steps: int, first: int = 0) -> list[float]:
    losses = []
    for number in range(2 * first, 2 * (first + steps)):
        generator = torch.Generator().manual_seed(2 * number + torch.distributed.get_rank())
        loss = engine(torch.randint(11, (8,), generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine.sharding.full_state_dict().items()}


def compare(stage: int, precision: str, offload: dict[str, Any]) -> tuple[int, int, int]:
    plain, ours = (engine_of(config(stage, precision, **more)) for more in ({}, offload))
    found, norms = [], []
    for step in range(12):
        found.append(train(ours, 1, step) == train(plain, 1, step))
        norms.append(plain.grad_norm)
    assert all(found)
    assert min(norms) < 0.7 < max(norms), norms
    expected = weights(plain)
    for name, value in weights(ours).items():
        assert torch.equal(value, expected[name]), name
    ahead = ours.sharding._host_step
    counts = (ahead.taken, ahead.redone) if isinstance(ahead, Speculation) else (0, 0)
    return (*counts, ours.skipped_steps)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_super_offload_learns_the_same_bits(stage: int, precision: str):
    for taken, redone, skipped in run_ranks(2, compare, stage, precision, {"super_offload": True}):
        assert 0 < redone < taken
        assert (skipped > 0) == (precision == "fp16")


@pytest.mark.parametrize("stage", [1, 3])
def test_twin_flow_learns_the_same_bits(stage: int):
    for more in ({"ratio": 0.5}, {"ratio": "auto"}, {"ratio": 0.5, "super_offload": True}):
        run_ranks(2, compare, stage, "bf16", more)


MAKERS = {
    "adam": lambda m: FusedAdam(m.parameters(), lr=0.01, weight_decay=0.1),
    "lion": lambda m: FusedLion(m.parameters(), lr=0.003),
    "adagrad": lambda m: CPUAdagrad(m.parameters(), initial_accumulator_value=0.1),
    "sgd": lambda m: FusedSGD(m.parameters(), lr=0.05, momentum=0.9),
}


def one_pass(name: str, low: bool) -> None:
    """Steps that are right, clipped, or left out, of kernels that undo their own."""
    precision = Precision(compute=torch.bfloat16, master=torch.float32) if low else Precision()
    left = []
    for speculative in (False, True):
        torch.manual_seed(0)
        model = Net()
        offload = ds_zero.Offload(optimizer="cpu", speculative=speculative)
        optimizer = ds_zero.shard(
            model,
            MAKERS[name](model),
            2,
            precision=precision,
            offload=offload,
            min_unit_numel=0,
        )
        for step in range(8):
            tokens = torch.randint(11, (32,), generator=torch.Generator().manual_seed(step))
            model(tokens).backward()
            if step % 4 != 3:
                optimizer.update(0.25 if step % 4 == 1 else 1.0)
            optimizer.zero_grad()
        states = optimizer.state_dict()["state"]
        local = {f"{k} {n}": getattr(v, "local", v) for k in states for n, v in states[k].items()}
        left.append({**optimizer.full_state_dict(), **local})
    assert left[0].keys() == left[1].keys()
    for key, value in left[0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(left[1][key])), key


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_optimizers_of_ds_ops_are_taken_back_exactly(name: str, low: bool):
    run_ranks(1, one_pass, name, low)


def zenflow_resumes(stage: int, precision: str, overlap: bool, folder: Path) -> None:
    settings = config(stage, precision)
    settings["zero_optimization"]["zenflow"] = {"topk_ratio": 0.2, "overlap_step": overlap}
    engine = engine_of(settings)
    train(engine, 6)
    engine.save_checkpoint(folder)
    expected = train(engine, 12, first=6)
    again = engine_of(settings)
    again.load_checkpoint(folder)
    assert train(again, 12, first=6) == expected


@pytest.mark.parametrize("overlap", [False, True], ids=["at-once", "overlapped"])
@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "bf16"), (3, "fp16")])
def test_zenflow_resumes_exactly(stage: int, precision: str, overlap: bool, tmp_path: Path):
    run_ranks(2, zenflow_resumes, stage, precision, overlap, tmp_path)


def start_zenflow_from_a_plain_run(folder: Path) -> None:
    settings = config(2, "bf16")
    plain = engine_of(settings)
    train(plain, 4)
    plain.save_checkpoint(folder)
    settings["zero_optimization"]["zenflow"] = {"topk_ratio": 0.2}
    engine = engine_of(settings)
    # What waits is no part of the other's state.
    engine.load_checkpoint(folder, load_module_strict=False)
    train(engine, 8, first=4)
    engine.save_checkpoint(folder, "zenflow")
    plain.load_checkpoint(folder, "zenflow", load_module_strict=False)
    train(plain, 2)


def test_zenflow_and_plain_steps_load_what_the_other_saved(tmp_path: Path):
    run_ranks(2, start_zenflow_from_a_plain_run, tmp_path)
