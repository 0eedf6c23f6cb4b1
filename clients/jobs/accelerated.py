"""A program of a user of accelerate: its loop with gradient accumulation, clipping, save and load.

What `accelerate launch` said counts, which may be no deepspeed at all.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, ACCUMULATE, BATCH = 4, 2, 4


class Net(nn.Module):
    """A classifier with a tied pair and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32)
        self.middle = nn.Linear(32, 32, bias=False)
        self.twin = nn.Linear(32, 32, bias=False)
        self.twin.weight = self.middle.weight
        self.last = nn.Linear(32, 3)
        self.register_buffer("offset", torch.arange(10.0) / 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x + self.offset))
        return self.last(torch.tanh(self.twin(torch.tanh(self.middle(x)))))


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 10, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=BATCH)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true", help="DDP on CPU; deepspeed finds it itself")
    return parser.parse_args()


def main() -> None:
    options = parse()
    accelerator = Accelerator(
        cpu=options.cpu,
        gradient_accumulation_steps=ACCUMULATE,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=123))],
    )
    job = Job(accelerator, options)
    job.train()
    job.save_and_load()
    job.states()
    job.end()
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(job.told))
    if dist.is_initialized():
        dist.destroy_process_group()


class Job:
    """The loop, and what it saw in `told`."""

    def __init__(self, accelerator: Accelerator, options: argparse.Namespace) -> None:
        self.accelerator, self.out = accelerator, options.out
        set_seed(5)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        prepared = accelerator.prepare(model, optimizer, loader(), scheduler)
        self.model, self.optimizer, self.loader, self.scheduler = prepared
        self.batches = list(self.loader)
        group = dist.distributed_c10d._get_default_group()
        self.told: dict[str, Any] = {
            "world": accelerator.num_processes,
            "kind": accelerator.distributed_type.value,
            "backend": dist.get_backend(),
            "timeout_s": group._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
            "wrappers": [type(each).__name__ for each in prepared],
            "is_model": accelerator.unwrap_model(self.model) is model,
            "losses": [],
            "norms": [],
            "rates": [],
            "synced": [],
        }
        if plugin := accelerator.state.deepspeed_plugin:
            config = plugin.deepspeed_config
            self.told["config"] = {k: config.get(k) for k in ("train_micro_batch_size_per_gpu",)}
            self.told["prints_every"] = str(config["steps_per_print"])
            self.told["optimizer"] = type(self.model.optimizer).__name__
            self.told["inner"] = type(getattr(self.model, "basic_optimizer", None)).__name__
            self.told["groups"] = len(self.optimizer.param_groups)

    def step(self, index: int) -> float:
        """One micro batch; returns its loss."""
        x, y = self.batches[index]
        with self.accelerator.accumulate(self.model):
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.accelerator.backward(loss)
            self.told["synced"].append(self.accelerator.sync_gradients)
            if self.accelerator.sync_gradients:
                norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.told["norms"].append(None if norm is None else float(norm))
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.told["rates"].append(self.optimizer.param_groups[0]["lr"])
        return float(self.accelerator.reduce(loss.detach(), "mean"))

    def train(self) -> None:
        count = STEPS * ACCUMULATE
        self.told["losses"] += [self.step(index) for index in range(count)]
        self.told["skipped"] = bool(self.accelerator.optimizer_step_was_skipped)
        with self.accelerator.no_sync(self.model):
            self.model(self.batches[0][0])
        try:
            self.accelerator.clip_grad_value_(self.model.parameters(), 1.0)
            self.told["clip_value"] = "done"
        except Exception as error:
            self.told["clip_value"] = str(error)

    def save_and_load(self) -> None:
        """Save, go on, load, and go on again: the same losses."""
        self.accelerator.save_state(str(self.out / "state"))
        count = STEPS * ACCUMULATE
        more = range(count, count + 2 * ACCUMULATE)
        first = [self.step(index) for index in more]
        self.accelerator.load_state(str(self.out / "state"))
        self.told["again"] = [first, [self.step(index) for index in more]]
        self.told["saved"] = sorted(
            str(path.relative_to(self.out / "state"))
            for path in (self.out / "state").rglob("*")
            if path.is_file()
        )

    def states(self) -> None:
        """The whole weights, on rank 0, and that they are the model's."""
        try:
            state = self.accelerator.get_state_dict(self.model)
        except ValueError as error:
            self.told["state_error"] = str(error)
            return
        if self.accelerator.is_main_process:
            torch.save(state, self.out / "state.pt")
        self.accelerator.wait_for_everyone()
        state = torch.load(self.out / "state.pt")
        self.told["keys"] = sorted(state)
        whole = Net()
        whole.load_state_dict(state)
        x = self.batches[0][0]
        self.model.eval()
        with torch.no_grad():
            self.told["difference"] = float((whole(x) - self.model(x)).abs().max())

    def end(self) -> None:
        self.model, self.optimizer, self.scheduler = self.accelerator.free_memory(
            self.model, self.optimizer, self.scheduler
        )
        self.told["freed"] = self.model is None
        self.accelerator.end_training()


if __name__ == "__main__":
    main()
