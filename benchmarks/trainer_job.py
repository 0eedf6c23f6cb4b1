"""One rank of transformers' Trainer on DeepSpeed's JSON, which takes each step when told to.

Runs in any environment: whose `deepspeed` answers is that environment's affair. Who started it
listens at `--address`: a step begins when it says so, and hears how many seconds it took.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Tokens(Dataset):
    """Token ids drawn at random."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(vocabulary, (count, length), generator=generator)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._ids[index], "labels": self._ids[index]}


class Turns(TrainerCallback):
    """Waits before each step, and says after it how long it took and what the loss was."""

    def __init__(self, line: Connection) -> None:
        self._line, self._begin, self._seconds = line, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._line.recv()
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seconds = time.perf_counter() - self._begin

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._line.send((self._seconds, logs["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--deepspeed", required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    shape = options.shape
    host, port = options.address.split(":")
    line = Client((host, int(port)), authkey=os.environ["TURNS_KEY"].encode())
    line.send(int(os.environ["RANK"]))
    arguments = TrainingArguments(
        output_dir=options.out,
        deepspeed=options.deepspeed,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=shape["micro_batch"],
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocabulary"],
            hidden_size=shape["width"],
            intermediate_size=3 * shape["width"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["width"] // 64,
            num_key_value_heads=shape["width"] // 64,
            max_position_embeddings=shape["tokens"],
        )
    )
    # Two ranks take `micro_batch` each in a step.
    data = Tokens(2 * shape["micro_batch"] * options.steps, shape["tokens"], shape["vocabulary"])
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Turns(line)]).train()


if __name__ == "__main__":
    main()
