"""What must work where only ds-zero and its closure (ds-core) are installed.

`nox -s alone` runs it from the built wheel, outside the source tree: `python -I smoke.py`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

import ds_core
import ds_zero


def main() -> None:
    assert "site-packages" in Path(ds_zero.__file__).parts, ds_zero.__file__
    assert ds_zero.__version__ == version("ds-zero")
    expected = losses_of_plain_loop()
    for stage in (1, 2, 3):
        assert losses_of_sharded_loop(stage) == expected, stage
    engine_finds_the_section()
    print("ds-zero", ds_zero.__version__, "works alone")


def losses_of_plain_loop() -> list[float]:
    model = _model()
    return _losses(model, _optimizer(model))


def losses_of_sharded_loop(stage: int) -> list[float]:
    model = _model()
    return _losses(model, ds_zero.shard(model, _optimizer(model), stage=stage))


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    # One formula for both loops: foreach and fused kernels round differently.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def _losses(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for seed in range(10):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(round(loss.item(), 5))
    return found


def engine_finds_the_section() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 16,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": 2},
    }
    engine = ds_core.initialize(_model(), config)
    loss = engine(torch.randn(16, 8)).square().mean()
    engine.backward(loss)
    engine.step()


if __name__ == "__main__":
    main()
