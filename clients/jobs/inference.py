"""What a user of transformers does at stage 3 without training, and what goes wrong before it.

A program of a user of transformers; see `trainer.py`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llama import Losses, small_llama
from peak import tensor_bytes
from text import Windows
from transformers import AutoModelForCausalLM, Trainer, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def arguments_of(folder: Path, config: dict[str, Any], **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 7,
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(
        output_dir=str(folder), deepspeed=config, use_cpu=True, ddp_backend="gloo", **settings
    )


def infer(folder: Path, config: dict[str, Any], model_folder: str) -> dict[str, Any]:
    """Evaluation, prediction and generation by a model that was never trained here; then it is."""
    arguments = arguments_of(folder, config)
    before = tensor_bytes()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    told: dict[str, Any] = {
        "model_bytes": tensor_bytes() - before,
        "full_bytes": 4 * sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "partitioned": all(hasattr(p, "ds_numel") for p in model.parameters()),
    }
    losses, rows = Losses(), Windows(6, 64, skip=64)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Windows(64, 64),
        eval_dataset=rows,
        callbacks=[losses],
    )
    told["evaluated"] = trainer.evaluate()["eval_loss"]
    told["engine"] = type(trainer.model_wrapped).__name__
    found = trainer.predict(rows)
    told["predicted_loss"] = found.metrics["test_loss"]
    # Ranks of different lengths: generate() of transformers keeps them in step.
    rank = dist.get_rank()
    prompt = torch.tensor([rows[rank]["input_ids"][: 8 + rank]])
    length = {"max_new_tokens": 12 if rank == 0 else 4, "do_sample": False, "pad_token_id": 0}
    made = trainer.model.generate(prompt, attention_mask=torch.ones_like(prompt), **length)
    by_engine = trainer.model_wrapped.generate(
        prompt, attention_mask=torch.ones_like(prompt), **length
    )
    dist.barrier()
    unset_hf_deepspeed_config()
    plain = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    expected = plain.generate(prompt, attention_mask=torch.ones_like(prompt), **length)
    told["generated"], told["expected"] = made.tolist(), expected.tolist()
    told["generated_by_engine"] = by_engine.tolist()
    with torch.no_grad():
        logits = plain(torch.tensor([rows[i]["input_ids"] for i in range(len(rows))])).logits
    told["largest_difference"] = float((torch.from_numpy(found.predictions) - logits).abs().max())
    return told


def error_of(action: Any) -> str:
    try:
        action()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals(folder: Path, config: dict[str, Any], wrong: dict[str, Any]) -> dict[str, str]:
    """transformers' own errors."""
    rows = Windows(8, 64)

    def trainer_of(settings: dict[str, Any], **changes: Any) -> Trainer:
        arguments = arguments_of(folder, settings, **changes)
        return Trainer(
            model=small_llama(layers=1), args=arguments, train_dataset=rows, eval_dataset=rows
        )

    told = {"mismatch": error_of(trainer_of(wrong, max_grad_norm=0.5).train)}
    stage2 = {**config, "zero_optimization": {"stage": 2}}
    told["stage 2"] = error_of(trainer_of(stage2).evaluate)
    # Folders of their own: a rank may be ahead.
    for name, inside in (("empty", "."), ("no latest", "global_step3")):
        checkpoint = folder / f"{name}{dist.get_rank()}"
        (checkpoint / inside).mkdir(parents=True)
        TrainerState(train_batch_size=2).save_to_json(str(checkpoint / "trainer_state.json"))
        resume = functools.partial(trainer_of(config).train, str(checkpoint))
        told[name] = error_of(resume)
    unset_hf_deepspeed_config()
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", type=Path, required=True, help="right and wrong ones, by name")
    parser.add_argument("--model", required=True)
    options = parser.parse_known_args()[0]
    configs = json.loads(options.configs.read_text())
    told = infer(options.out / "inference", configs["right"], options.model)
    gc.collect()
    told |= refusals(options.out / "refusals", configs["right"], configs["wrong"])
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
