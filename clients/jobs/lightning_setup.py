"""lightning's DeepSpeed strategy, as far as it goes without a GPU.

Its `setup_environment` refuses a CPU; all that it does after that is done here, in its order.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.fabric.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies import DeepSpeedStrategy as TrainerStrategy
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

STAGES = (1, 2, 3)


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return torch.randn(4, 10, generator=generator)


def strategy_of(stage: int, **options: Any) -> DeepSpeedStrategy:
    """A strategy on two CPU ranks, where `setup_environment` would have left it."""
    strategy = DeepSpeedStrategy(
        accelerator=CPUAccelerator(),
        parallel_devices=[torch.device("cpu", index) for index in range(2)],
        cluster_environment=TorchElasticEnvironment(),
        stage=stage,
        zero_allow_untested_optimizer=True,
        **options,
    )
    if not dist.is_initialized():
        strategy._init_deepspeed_distributed()
    strategy._format_config()
    strategy._config_initialized = True
    return strategy


def train(engine: Any, first: int, count: int) -> list[float]:
    losses = []
    for step in range(first, first + count):
        x = batch(step)
        loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def reference(count: int) -> list[float]:
    """The same on one rank after the other, without any library: means of both ranks' gradients."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(count):
        x = batch(step)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        # What DeepSpeed does unless the configuration says otherwise.
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def run_stage(stage: int, folder: Path) -> dict[str, Any]:
    strategy = strategy_of(stage)
    told: dict[str, Any] = {"config": strategy.config}
    with strategy.module_sharded_context():
        model = model_of()
    told["partitioned"] = all(hasattr(p, "ds_numel") for p in model.parameters())
    if stage == 3:  # what a rank draws under Init is its own affair: the same values for the test
        strategy._restore_zero_state(model, {"state_dict": model_of().state_dict()})
        told["numbers"] = [p.ds_numel for p in model.parameters()]
        told["held"] = [p.partition_numel() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, (wrapped,), _ = strategy.setup_module_and_optimizers(model, [optimizer])
    told["engine"] = [type(engine).__name__, isinstance(engine, nn.Module)]
    told["losses"] = train(engine, 0, 4)
    state = {"model": engine, "optimizer": wrapped, "epoch": 3}
    strategy.save_checkpoint(folder / f"stage{stage}", state)
    told["after"] = train(engine, 4, 2)
    state["epoch"] = 0
    strategy.load_checkpoint(folder / f"stage{stage}", state)
    told["epoch"] = state["epoch"]
    told["again"] = train(engine, 4, 2)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    folder = parser.parse_args().out
    told: dict[str, Any] = {}
    try:
        Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(stage=2)).launch()
        told["refusal"] = ""
    except Exception as error:
        told["refusal"] = str(error)
    told |= {f"stage{stage}": run_stage(stage, folder) for stage in STAGES}
    told["reference"] = reference(4)
    # Names that `Trainer(strategy=...)` knows, and the largest configuration that one makes.
    names = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload")
    names += ("deepspeed_stage_3", "deepspeed_stage_3_offload")
    made = {name: StrategyRegistry.get(name) for name in names}
    told["made"] = {k: (type(v).__name__, v.config["zero_optimization"]) for k, v in made.items()}
    told["is_trainer_strategy"] = all(isinstance(v, TrainerStrategy) for v in made.values())
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
