"""A program of a user of transformers: `Trainer(deepspeed=...)`, or without it plain DDP.

Knows nothing of whose `deepspeed` is installed. Each rank writes what it saw to `OUT/rankN.json`.
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
from llama import Losses, mean_loss, small_llama
from peak import Peak, tensor_bytes
from text import Windows, of_bytes
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


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
    parser.add_argument("--accumulation", type=int, default=2)
    return parser.parse_known_args()[0]


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train and save; what there was to see."""
    arguments = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        deepspeed=options.deepspeed,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulation,
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
        load_best_model_at_end=bool(options.save_at),
        metric_for_best_model="eval_loss",
        report_to=[],
        seed=7,
        disable_tqdm=True,
    )
    told: dict[str, Any] = {"world": arguments.world_size}
    before = tensor_bytes()
    tokenize = of_bytes
    if options.model:
        with Peak() as peak:
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        told["peak_bytes"] = peak.bytes
        if (Path(options.model) / "tokenizer.json").exists():
            words = AutoTokenizer.from_pretrained(options.model)
            tokenize = lambda piece: words(piece)["input_ids"]  # noqa: E731
    else:
        model = small_llama()
    told["model_bytes"] = tensor_bytes() - before
    told["full_bytes"] = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    told["partitioned"] = all(hasattr(p, "ds_numel") for p in model.parameters())
    losses = Losses()
    held_out = Windows(6, options.length, tokenize, skip=64)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(64, options.length, tokenize),
        eval_dataset=held_out,
        callbacks=[losses],
    )
    trainer.train(resume_from_checkpoint=options.resume)
    told["evaluated"] = trainer.evaluate()["eval_loss"]
    told |= vars(losses)
    wrapped = trainer.model_wrapped
    told["engine"] = type(wrapped).__name__
    if options.deepspeed:
        told["engine_stage"] = wrapped.config["zero_optimization"]["stage"]
        told["micro_batch"] = trainer.accelerator.deepspeed_config["train_micro_batch_size_per_gpu"]
    folder = options.out / "model"
    trainer.save_model(str(folder))
    dist.barrier()
    if not options.model and (folder / "model.safetensors").exists():
        # Without stage 3, whatever it was trained with.
        unset_hf_deepspeed_config()
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        told["loaded_loss"] = mean_loss(loaded, held_out)
    return told


def main() -> None:
    options = parse()
    told = train(options)
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    # A DDP that outlives the process group is destroyed by whoever lets go of it last, and then may
    # wait for a thread of gloo that waits for it.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
