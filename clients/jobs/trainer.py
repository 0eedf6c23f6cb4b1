"""A program of a user of transformers: `Trainer(deepspeed=...)`, or without it plain DDP.

Knows nothing of whose `deepspeed` is installed. Each rank writes what it saw to `OUT/rankN.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text import Windows, of_bytes
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)


class Losses(TrainerCallback):
    """Keeps what the Trainer logs."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.evaluation: list[float] = []

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        if "loss" in logs:
            self.train.append(logs["loss"])
            self.rates.append(logs["learning_rate"])
            self.norms.append(float(logs["grad_norm"]))
        if "eval_loss" in logs:
            self.evaluation.append(logs["eval_loss"])


def small_llama() -> LlamaForCausalLM:
    """A random Llama of a quarter of a million parameters, one token per byte."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    set_seed(1)
    return LlamaForCausalLM(config)


def tensor_bytes() -> int:
    """Bytes of all tensors that this process holds, shared storages once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu":
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deepspeed", help="a configuration file; without it, DDP")
    parser.add_argument("--model", help="a folder for from_pretrained; without it, a random Llama")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save-at", type=int, default=0)
    parser.add_argument("--resume", help="a checkpoint of the Trainer")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--best", action="store_true", help="evaluate and load the best at the end")
    return parser.parse_known_args()[0]


def main() -> None:
    options = parse()
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        deepspeed=options.deepspeed,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=2,
        max_steps=options.steps,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        lr_scheduler_type="linear",
        weight_decay=0.01,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps" if options.save_at else "no",
        eval_steps=options.save_at or None,
        save_strategy="steps" if options.save_at else "no",
        save_steps=options.save_at or 500,
        load_best_model_at_end=options.best,
        metric_for_best_model="eval_loss",
        report_to=[],
        seed=7,
        disable_tqdm=True,
    )
    told: dict[str, Any] = {"world": arguments.world_size}
    before = tensor_bytes()
    tokenize = of_bytes
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        if (Path(options.model) / "tokenizer.json").exists():
            words = AutoTokenizer.from_pretrained(options.model)
            tokenize = lambda piece: words(piece)["input_ids"]  # noqa: E731
    else:
        model = small_llama()
    told["model_bytes"] = tensor_bytes() - before
    told["full_bytes"] = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    told["partitioned"] = all(hasattr(p, "ds_numel") for p in model.parameters())
    losses = Losses()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(64, options.length, tokenize),
        eval_dataset=Windows(6, options.length, tokenize, skip=64),
        callbacks=[losses],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    told["evaluated"] = trainer.evaluate()["eval_loss"]
    told |= vars(losses)
    wrapped = trainer.model_wrapped
    told["engine"] = type(wrapped).__name__
    told["engine_stage"] = getattr(wrapped, "config", None) if options.deepspeed else None
    if options.deepspeed:
        told["engine_stage"] = wrapped.config["zero_optimization"]["stage"]
        told["micro_batch"] = trainer.accelerator.deepspeed_config["train_micro_batch_size_per_gpu"]
    trainer.save_model(str(options.out / "model"))
    told["draw"] = random.random()
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    trainer.accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
