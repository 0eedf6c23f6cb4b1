"""Train a classifier of pictures with DeepSpeed's interface; any ZeRO stage, any number of ranks.

deepspeed --num_gpus 2 examples/fashion_mnist/train.py --deepspeed_config FILE

Nothing in here says whose `deepspeed` it is.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images import CLASSES, FOLDER, read
from torch import nn
from torch.utils.data import TensorDataset

import deepspeed


class Classifier(nn.Module):
    """Two convolutions and two linear layers; 207 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 7 * 7, 128)
        self.classes = nn.Linear(128, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), 2)
        return self.classes(F.relu(self.hidden(x.flatten(1))))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a classifier on Fashion-MNIST.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of the data set")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, help="how many to train on (default: 60,000)")
    parser.add_argument("--out", type=Path, help="write losses and accuracy of each rank there")
    return deepspeed.add_config_arguments(parser).parse_args()


def train(engine: Any, loader: Any, epochs: int) -> list[float]:
    """Losses of this rank, one per micro batch."""
    losses = []
    for epoch in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(engine(x.to(engine.device)), y.to(engine.device))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        deepspeed.log_dist(f"epoch {epoch}: loss {sum(losses[-50:]) / 50:.3f}", ranks=[0])
    return losses


def accuracy(engine: Any, data: TensorDataset) -> float:
    """The share of right answers; every rank answers all, as at stage 3 all have to take part."""
    engine.eval()
    right = 0
    with torch.no_grad():
        for x, y in zip(*(each.split(500) for each in data.tensors), strict=True):
            right += int((engine(x.to(engine.device)).argmax(1).cpu() == y).sum())
    engine.train()
    return right / len(data)


def main() -> None:
    arguments = parse()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = Classifier()
    engine, _, loader, _ = deepspeed.initialize(
        args=arguments,
        model=model,
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        training_data=read(arguments.data, "train", arguments.images),
    )
    losses = train(engine, loader, arguments.epochs)
    share = accuracy(engine, read(arguments.data, "t10k", 2000))
    deepspeed.log_dist(f"accuracy on 2,000 pictures never trained on: {share:.1%}", ranks=[0])
    if arguments.out:
        told = {"losses": losses, "accuracy": share, "stage": engine.zero_optimization_stage()}
        (arguments.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    engine.destroy()


if __name__ == "__main__":
    main()
