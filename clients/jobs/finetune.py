"""A program of a user of trl and peft: SFTTrainer with LoRA, then only the adapter is saved."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PeftModel
from text import Windows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    set_seed(1)
    return LlamaForCausalLM(config)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that SFTTrainer can hold; the data set is tokenized already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({chr(i): i for i in range(256)}, unk_token=chr(2)))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=chr(0), eos_token=chr(1), unk_token=chr(2)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deepspeed")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_known_args()[0]
    arguments = SFTConfig(
        output_dir=str(options.out / "trainer"),
        deepspeed=options.deepspeed,
        use_cpu=True,
        bf16=False,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=options.steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        max_length=64,
        report_to=[],
        seed=7,
        disable_tqdm=True,
        # PEFT at stage 3 needs the reentrant kind, which DDP does not bear.
        gradient_checkpointing=bool(options.deepspeed),
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    rows = Windows(48, 64)
    data = Dataset.from_list([{"input_ids": rows[i]["input_ids"]} for i in range(len(rows))])
    model = small_llama()
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model(str(options.out / "adapter"))
    history = [each for each in trainer.state.log_history if "loss" in each]
    told = {
        "train": [each["loss"] for each in history],
        "engine": type(trainer.model_wrapped).__name__,
        "trained": sum(
            getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad
        ),
    }
    dist.barrier()
    # Whoever has the base model and the adapter has the trained one.
    loaded = PeftModel.from_pretrained(small_llama(), str(options.out / "adapter")).eval()
    loaded_state = {k: v for k, v in loaded.state_dict().items() if "lora_" in k}
    told["largest_b"] = max(float(v.abs().max()) for k, v in loaded_state.items() if "lora_B" in k)
    told["adapter_sum"] = sum(float(v.double().abs().sum()) for v in loaded_state.values())
    with torch.no_grad():
        ids = torch.tensor([rows[0]["input_ids"]])
        told["loaded_loss"] = float(loaded(input_ids=ids, labels=ids).loss)
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
