"""A program of DeepSpeed that trains a little, saves or loads, and goes on."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed

STAGES = (1, 2, 3)
BEFORE, AFTER = 3, 4


class Net(nn.Module):
    """Odd sizes, a tied head, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 9)
        self.frozen = nn.Linear(9, 9).requires_grad_(False)
        self.blocks = nn.ModuleList([nn.Linear(9, 9) for _ in range(2)])
        self.register_buffer("offset", torch.arange(9.0) / 9)
        self.head = nn.Linear(9, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.embed(ids)) + self.offset
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return nn.functional.cross_entropy(self.head(x), (ids + 1) % 13)


def config_of(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.7,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1}},
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 5, "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }


def train(engine: Any, first: int, count: int) -> list[float]:
    told = []
    for step in range(first, first + count):
        ids = (torch.arange(8) * 5 + step * 2 + dist.get_rank() * 3) % 13
        loss = engine(ids)
        engine.backward(loss)
        engine.step()
        told.append(loss.item())
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--load", type=Path, help="where another run saved; default: save here")
    options = parser.parse_known_args()[0]
    deepspeed.init_distributed("gloo")
    told: dict[str, Any] = {"version": deepspeed.__version__}
    for stage in STAGES:
        torch.manual_seed(0 if options.load is None else 9)
        model = Net()
        engine, _, _, schedule = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=config_of(stage),
        )
        if options.load is None:
            train(engine, 0, BEFORE)
            state = {"note": f"stage {stage}"}
            engine.save_checkpoint(str(options.out / f"stage{stage}"), client_state=state)
        else:
            path, state = engine.load_checkpoint(str(options.load / f"stage{stage}"))
            told[f"path{stage}"] = path
        told[f"note{stage}"] = state["note"]
        told[f"steps{stage}"] = engine.global_steps
        told[f"losses{stage}"] = train(engine, BEFORE, AFTER)
        told[f"rate{stage}"] = schedule.get_last_lr()
        engine.destroy()
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
