"""Optimizer and schedule of the configuration, of the Trainer, and mixed; and plain DDP with each.

A program of a user of transformers that trains several times; see `trainer.py`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import Losses, small_llama
from text import Windows
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

STEPS, WARMUP, RATE, DECAY = 6, 2, 3e-3, 0.5


def train(folder: Path, config: dict[str, Any] | None, plain: str = "") -> dict[str, Any]:
    """Losses and rates of a run with a configuration, or without one of plain torch.

    plain: "optimizer" for one group of all parameters, "schedule" for one that is a step late as
    DeepSpeed's are, or both.
    """
    model, losses = small_llama(layers=2), Losses()
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        lr_scheduler_type="linear",
        weight_decay=DECAY,
        adam_beta2=0.98,
        adam_epsilon=1e-6,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=7,
        disable_tqdm=True,
    )
    optimizer = schedule = None
    if "optimizer" in plain:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=DECAY
        )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Windows(64, 64), callbacks=[losses]
    )
    trainer.optimizer = optimizer
    if "schedule" in plain:
        trainer.create_optimizer()
        schedule = LambdaLR(trainer.optimizer, lambda step: linear(max(step - 1, 0)))
        trainer.lr_scheduler = schedule
    trainer.train()
    unset_hf_deepspeed_config()
    engine = type(trainer.model_wrapped).__name__
    return {"train": losses.train, "rates": losses.rates, "engine": engine}


def find_batch_size(folder: Path, config: dict[str, Any] | None) -> dict[str, Any]:
    """A run whose first attempts have too little memory: the Trainer tries smaller batches."""
    model, losses = small_llama(layers=2), Losses()
    model.register_forward_pre_hook(check_memory, with_kwargs=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        deepspeed=config,
        use_cpu=True,
        ddp_backend="gloo",
        auto_find_batch_size=True,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=7,
        disable_tqdm=True,
    )
    rows = Windows(64, 64)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[losses])
    trainer.train()
    unset_hf_deepspeed_config()
    return {"train": losses.train, "batch": trainer.state.train_batch_size}


def check_memory(module: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    if len(named["input_ids"]) > 2:
        raise RuntimeError("CUDA out of memory.")


def linear(step: int) -> float:
    """A rise over the warm-up, then a fall to zero."""
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", type=Path, required=True, help="a file of them, by name")
    options = parser.parse_known_args()[0]
    told: dict[str, Any] = {}
    # First those without deepspeed: it leaves variables in the environment that turn it on again.
    for name in ("", "optimizer", "schedule", "optimizer and schedule"):
        told[f"plain {name}".strip()] = train(options.out / "plain", None, name)
        gc.collect()
    told["found plain"] = find_batch_size(options.out / "found", None)
    gc.collect()
    for name, config in json.loads(options.configs.read_text()).items():
        told[name] = train(options.out / name, config)
        gc.collect()
    sizes = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto"}
    for stage in (1, 2):
        config = {**sizes, "zero_optimization": {"stage": stage}}
        told[f"found {stage}"] = find_batch_size(options.out / "found", config)
        gc.collect()
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
