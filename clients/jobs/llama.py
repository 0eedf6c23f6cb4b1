"""A small Llama for the jobs, and what a Trainer logs of it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed


def small_llama(layers: int = 3, **changes: Any) -> LlamaForCausalLM:
    """A random Llama, the same everywhere; one token per byte."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **changes,
    )
    set_seed(1)
    return LlamaForCausalLM(config)


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


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: Any) -> float:
    """The loss over rows of one length, without a Trainer."""
    ids = torch.tensor([rows[i]["input_ids"] for i in range(len(rows))])
    return float(model(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    # A base model for fine-tuning, as a folder.
    small_llama(layers=2, pad_token_id=0, eos_token_id=1).save_pretrained(sys.argv[1])
