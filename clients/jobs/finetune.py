"""A program of a user of trl and peft: SFTTrainer with LoRA, then only the adapter is saved.

With `--resume` it goes on from a checkpoint of the SFTTrainer. With `--adapter` an adapter is
loaded on top of a base that is sharded at stage 3, as another program does that has both folders.
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
from datasets import Dataset
from llama import mean_loss
from peft import LoraConfig, PeftModel
from text import Windows
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTConfig, SFTTrainer
from trl.models.utils import prepare_deepspeed, unwrap_model_for_generation

STEPS, SAVE_AT = 4, 2
HELD_OUT = Windows(4, 64, skip=48)
PROMPT = torch.tensor([HELD_OUT[0]["input_ids"][:10]])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that SFTTrainer can hold; the data set is tokenized already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    inner = Tokenizer(WordLevel({chr(i): i for i in range(256)}, unk_token=chr(2)))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=chr(0), eos_token=chr(1), unk_token=chr(2)
    )


def base(folder: str) -> PreTrainedModel:
    """The model to fine-tune; at stage 3 from_pretrained shards it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dataset(rows: Windows) -> Dataset:
    return Dataset.from_list([{"input_ids": rows[i]["input_ids"]} for i in range(len(rows))])


def finetune(options: argparse.Namespace) -> dict[str, Any]:
    arguments = SFTConfig(
        output_dir=str(options.out / "trainer"),
        deepspeed=options.deepspeed,
        use_cpu=True,
        bf16=False,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=SAVE_AT,
        max_length=64,
        report_to=[],
        seed=7,
        disable_tqdm=True,
        # PEFT at stage 3 needs the reentrant kind, which DDP does not bear.
        gradient_checkpointing=bool(options.deepspeed),
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    trainer = SFTTrainer(
        model=base(options.base),
        args=arguments,
        train_dataset=dataset(Windows(48, 64)),
        eval_dataset=dataset(HELD_OUT),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model(str(options.out / "adapter"))
    history = [each for each in trainer.state.log_history if "loss" in each]
    told = {
        "train": [each["loss"] for each in history],
        "engine": type(trainer.model_wrapped).__name__,
        "evaluated": trainer.evaluate()["eval_loss"],
        "trained": sum(
            getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad
        ),
    }
    # As the trainers of trl that generate do: hooks of stage 3 come off and back on.
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as unwrapped:
        told["generated"] = generated(unwrapped)
    told["evaluated_again"] = trainer.evaluate()["eval_loss"]
    if options.deepspeed:
        # A model for reference, such as that of DPO.
        reference = prepare_deepspeed(base(options.base), trainer.accelerator)
        told["reference_loss"] = mean_loss(reference, HELD_OUT)
    dist.barrier()
    return told


def generated(model: Any) -> list[int]:
    mask = torch.ones_like(PROMPT)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=PROMPT, attention_mask=mask, **settings)[0].tolist()


def adapter_on_a_sharded_base(options: argparse.Namespace) -> dict[str, Any]:
    arguments = TrainingArguments(
        output_dir=str(options.out / "loaded"),
        deepspeed=options.deepspeed,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_eval_batch_size=2,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
    )
    model = PeftModel.from_pretrained(base(options.base), options.adapter)
    frozen = [param for name, param in model.named_parameters() if "lora" not in name]
    trainer = Trainer(model=model, args=arguments, eval_dataset=HELD_OUT)
    found = trainer.predict(HELD_OUT)
    return {
        "sharded_base": all(hasattr(param, "ds_numel") for param in frozen),
        "sharded_loss": found.metrics["test_loss"],
        "sharded_logits": found.predictions,
        "sharded_generated": generated(trainer.model),
    }


def adapter_on_a_plain_base(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Whoever has the base model and the adapter has the trained one."""
    unset_hf_deepspeed_config()
    plain = base(options.base)
    told: dict[str, Any] = {"base_loss": mean_loss(plain, HELD_OUT)}
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    state = {k: v for k, v in loaded.state_dict().items() if "lora_" in k}
    told["largest_b"] = max(float(v.abs().max()) for k, v in state.items() if "lora_B" in k)
    told["adapter_sum"] = sum(float(v.double().abs().sum()) for v in state.values())
    told["loaded_loss"] = mean_loss(loaded, HELD_OUT)
    told["loaded_generated"] = generated(loaded)
    ids = torch.tensor([HELD_OUT[i]["input_ids"] for i in range(len(HELD_OUT))])
    with torch.no_grad():
        told["loaded_logits"] = loaded(input_ids=ids).logits.numpy()
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", required=True, help="a folder for from_pretrained")
    parser.add_argument("--deepspeed")
    parser.add_argument("--resume", help="a checkpoint of the SFTTrainer")
    parser.add_argument("--adapter", help="a folder that save_model wrote; for stage 3")
    options = parser.parse_known_args()[0]
    told = finetune(options)
    gc.collect()
    if options.adapter:
        told |= adapter_on_a_sharded_base(options)
    told |= adapter_on_a_plain_base(options, options.adapter or str(options.out / "adapter"))
    plain = told.pop("loaded_logits")
    if options.adapter:
        told["difference"] = float(abs(told.pop("sharded_logits") - plain).max())
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
