"""Scenes of accelerate at stage 3: building shards, gathering them, experts, saving the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin
from accelerate.utils import DummyOptim
from accelerate.utils.operations import GatheredParameters
from safetensors.torch import load_file
from scenes_common import (
    BATCH,
    LENGTH,
    WORDS,
    accelerator_of,
    by_hand,
    first,
    fresh,
    loader,
    message_of,
    plugin_of,
    trained,
)
from scenes_training import RATE, STEPS, adamw
from torch import nn

WIDTH = 16


def _llama() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config)


def built_in_shards(out: Path) -> dict[str, Any]:
    """`zero3_init_flag`: `from_config` makes shards; training, gathering and saving the whole."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True, zero3_save_16bit_model=True)
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    accelerator = accelerator_of(plugin)
    told: dict[str, Any] = {"flag": plugin.zero3_init_flag, "zero3": is_deepspeed_zero3_enabled()}
    model = _llama()
    told["statuses"] = sorted({p.ds_status.name for p in model.parameters()})
    told["shapes"] = sum(p.ds_numel for p in model.parameters())
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    losses = []
    for (ids,) in first(data, STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    told["losses"] = losses
    told |= _gathered(accelerator, model)
    state = accelerator.get_state_dict(model)
    told["holds"] = None if state is None else len(state)
    # As accelerate's guide does: every rank calls it, and one has the weights.
    accelerator.unwrap_model(model).save_pretrained(
        out / "llama",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=state,
    )
    accelerator.wait_for_everyone()
    accelerator.save_model(model, out / "shards", max_shard_size="4KB")
    accelerator.wait_for_everyone()
    saved = load_file(out / "llama" / "model.safetensors")
    told["saved"] = saved["lm_head.weight"][0].unique().tolist()
    told["files"] = sorted(path.name for path in (out / "shards").iterdir())
    accelerator.free_memory(model, optimizer)
    return told


def _gathered(accelerator: Any, model: Any) -> dict[str, Any]:
    """`GatheredParameters` of accelerate: to read, and to write on rank 0."""
    head = accelerator.unwrap_model(model).lm_head
    with GatheredParameters(head.weight):
        seen = list(head.weight.shape)
    with GatheredParameters([head.weight], modifier_rank=0, fwd_module=model):
        if dist.get_rank() == 0:
            head.weight.data[0] = 7.0
    with GatheredParameters(model.parameters()):
        row = head.weight[0].detach().clone()
        total = sum(p.numel() for p in model.parameters())
    with GatheredParameters([head.weight], modifier_rank=0, enabled=False):
        disabled = head.weight.ds_status.name
    return {
        "seen": seen,
        "row": row.unique().tolist(),
        "total": total,
        "disabled": disabled,
        "left": head.weight.ds_status.name,
    }


def not_gathered(out: Path) -> dict[str, Any]:
    """`get_state_dict` and `GatheredParameters` where the plugin asks for neither."""
    plugin = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=False, zero3_save_16bit_model=False)
    accelerator = accelerator_of(plugin)
    model, optimizer, _ = accelerator.prepare(m := fresh(), adamw(m.parameters()), loader())
    with GatheredParameters(model.parameters(), modifier_rank=0):
        pass
    told = {"state": message_of(lambda: accelerator.get_state_dict(model))}
    accelerator.free_memory(model, optimizer)
    return told


class Routed(nn.Module):
    """Experts, of which each rank runs those that its tokens choose."""

    def __init__(self, width: int = 8, count: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = ids % len(self.experts) == index
            if chosen.any():
                result = result.masked_scatter(chosen[..., None], torch.tanh(expert(x[chosen])))
        return result


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.layers = nn.ModuleList([Routed() for _ in range(2)])
        self.head = nn.Linear(8, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x, ids)
        return self.head(x)


def experts(out: Path) -> dict[str, Any]:
    """`transformer_moe_cls_names`: leaf modules, whose parameters come and go together."""
    from deepspeed.utils import get_z3_leaf_modules, z3_leaf_module

    zero = {"stage3_param_persistence_threshold": 0}
    plugin = DeepSpeedPlugin(
        hf_ds_config={
            "train_micro_batch_size_per_gpu": BATCH,
            "zero_optimization": {"stage": 3, **zero},
        },
        transformer_moe_cls_names="Routed",
    )
    accelerator = accelerator_of(plugin)
    torch.manual_seed(2)
    model = Mixture()
    # Tokens that make each rank choose experts of its own.
    batches = [
        [torch.full((BATCH, LENGTH), 4 * i + rank) % WORDS for rank in (0, 1)] for i in range(3)
    ]
    expected = by_hand(model, batches, adamw, clip=1.0)
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    told: dict[str, Any] = {
        "leaves": sorted({type(leaf).__name__ for leaf in get_z3_leaf_modules(model.module)}),
        "is_leaf": z3_leaf_module(model.module.layers[0]),
        "losses": trained(
            accelerator, model, optimizer, [[each[dist.get_rank()]] for each in batches]
        ),
        "expected": expected,
    }
    plugin.transformer_moe_cls_names = "Gone"
    told["unknown"] = message_of(lambda: accelerator.prepare(Mixture()))
    accelerator.free_memory(model, optimizer)
    return told


def filled_in(out: Path) -> dict[str, Any]:
    """Every "auto" of a file, with what accelerate knows, and what the engine makes of it."""
    config = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {
            "stage": "auto",
            "offload_optimizer": {"device": "auto"},
            "offload_param": {"device": "auto"},
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_gather_16bit_weights_on_model_save": "auto",
        },
    }
    plugin = DeepSpeedPlugin(
        hf_ds_config=config,
        zero_stage=3,
        gradient_clipping=0.75,
        offload_optimizer_device="none",
        offload_param_device="none",
        zero3_save_16bit_model=True,
    )
    accelerator = accelerator_of(plugin, gradient_accumulation_steps=3)
    small = torch.utils.data.DataLoader(loader().dataset, batch_size=2)
    model = _llama()
    prepared = accelerator.prepare(
        model, DummyOptim(model.parameters(), lr=RATE, weight_decay=0.25), loader(), small
    )
    engine, optimizer = prepared[:2]
    told = {
        "config": accelerator.deepspeed_config,
        "engine": {
            "clip": engine.gradient_clipping(),
            "stage": engine.zero_optimization_stage(),
            "bucket": engine.zero_reduce_bucket_size(),
            "prefetch": engine.zero_prefetch_bucket_size(),
            "persistence": engine.zero_param_persistence_threshold(),
            "gathers": engine.zero_gather_16bit_weights_on_model_save(),
            "batch": list(engine.get_batch_info()),
        },
        "prints": str(accelerator.deepspeed_config.pop("steps_per_print")),
        "rate": optimizer.param_groups[0]["lr"],
        "decay": optimizer.param_groups[0]["weight_decay"],
    }
    accelerator.free_memory(engine, optimizer)
    accelerator = accelerator_of(plugin_of(3, zero={"reduce_bucket_size": "auto"}))
    told["no_config"] = message_of(lambda: accelerator.prepare(fresh(), loader()))
    return told


SCENES = {scene.__name__: scene for scene in (built_in_shards, not_gathered, experts, filled_in)}
