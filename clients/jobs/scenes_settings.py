"""Scenes of accelerate about settings: plugins, what is refused, parallelism that is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin, ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig, DummyOptim, DummyScheduler
from accelerate.utils.deepspeed import get_active_deepspeed_plugin
from scenes_common import BATCH, accelerator_of, fresh, loader, message_of, plugin_of
from torch.optim import AdamW


def plugins(out: Path) -> dict[str, Any]:
    """One plugin of several is in force; transformers is told which."""
    from transformers.integrations.deepspeed import deepspeed_config

    two, three = plugin_of(2), plugin_of(3)
    told: dict[str, Any] = {"own": message_of(two.select)}
    accelerator = accelerator_of({"two": two, "three": three})
    told["first"] = [two.selected, three.selected]
    told["known"] = [deepspeed_config()["zero_optimization"]["stage"]]
    accelerator.state.select_deepspeed_plugin("three")
    told["second"] = [two.selected, three.selected]
    told["active"] = get_active_deepspeed_plugin(accelerator.state) is three
    told["known"].append(deepspeed_config()["zero_optimization"]["stage"])
    told["another"] = message_of(lambda: type(accelerator)(deepspeed_plugin=plugin_of(2)))
    return told


def plugin_flags(out: Path) -> dict[str, Any]:
    """What a plugin makes of its arguments and of files."""
    shared = {"offload_optimizer_device": "cpu", "offload_param_device": "cpu"}
    two = DeepSpeedPlugin(zero_stage=2, zero3_init_flag=True, **shared)
    three = DeepSpeedPlugin(zero_stage=3, zero3_init_flag=True, **shared)
    path = out / f"config{os.environ['RANK']}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    read = DeepSpeedPlugin(hf_ds_config=str(path))
    path.write_text(json.dumps({"fp16": {"enabled": True}}))
    file = str(path)
    bf16 = DeepSpeedPlugin(
        hf_ds_config={"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    )
    return {
        "init": [two.zero3_init_flag, three.zero3_init_flag, read.zero3_init_flag],
        "steps": read.deepspeed_config["gradient_accumulation_steps"],
        "stage": read.zero_stage,
        "offload": three.deepspeed_config["zero_optimization"]["offload_param"]["device"],
        "no_zero": message_of(lambda: DeepSpeedPlugin(hf_ds_config=file)),
        "two_precisions": message_of(lambda: accelerator_of(bf16, mixed_precision="fp16")),
    }


def refused(out: Path) -> dict[str, Any]:
    """Optimizers and schedules that are given twice, or not at all."""
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}}
    model, told = fresh(), {}
    real, dummy = AdamW(model.parameters()), DummyOptim(model.parameters())
    step = torch.optim.lr_scheduler.StepLR(real, 1)
    for name, config, given in (
        ("no_section", {}, (dummy,)),
        ("no_schedule", {}, (real, DummyScheduler(real))),
        ("both", {"optimizer": optimizer}, (real,)),
        ("both_schedules", {"scheduler": scheduler}, (real, step)),
        ("mixed", {"optimizer": optimizer}, (dummy, step)),
    ):
        accelerator = accelerator_of(plugin_of(2, **config))
        prepare = accelerator.prepare
        told[name] = message_of(lambda prepare=prepare, g=given: prepare(model, *g, loader()))
    return told


def sequence_parallel(out: Path) -> dict[str, Any]:
    """Ulysses: the settings are taken, the sizes add up, and `prepare` meets what is not there."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from deepspeed.utils import groups

    parallel = ParallelismConfig(
        sp_backend="deepspeed",
        sp_size=2,
        sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length=8, sp_attn_implementation="sdpa"),
    )
    accelerator = accelerator_of(plugin_of(2), parallelism_config=parallel)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    data = loader()
    told: dict[str, Any] = {
        "plain_model": message_of(lambda: accelerator.prepare(fresh(), loader())),
        "prepare": message_of(
            lambda: accelerator.prepare(model, AdamW(model.parameters()), loader())
        ),
        "loader": message_of(lambda: accelerator.deepspeed_ulysses_dl_adapter(data, model)),
        "sizes": [
            groups._get_sequence_parallel_world_size(),
            groups._get_sequence_parallel_rank(),
        ],
    }
    # Without sequence parallelism the loader comes back as it is.
    accelerator = accelerator_of(plugin_of(2))
    told["same_loader"] = accelerator.deepspeed_ulysses_dl_adapter(data, model) is data
    return told


def tensor_parallel(out: Path) -> dict[str, Any]:
    accelerator = accelerator_of(plugin_of(2, tensor_parallel={"autotp_size": 2}))
    told = {"prepare": message_of(lambda: accelerator.prepare(fresh(), loader()))}
    accelerator = accelerator_of(plugin_of(0, tensor_parallel={"autotp_size": 1}))
    told["one"] = message_of(lambda: accelerator.prepare(fresh(), loader()))
    return told


def msamp(out: Path) -> dict[str, Any]:
    """The section that accelerate writes for MS-AMP, a package that patches the engine."""
    plugin = DeepSpeedPlugin(zero_stage=2, enable_msamp=True, msamp_opt_level="O2")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
    accelerator = accelerator_of(plugin)
    told = {"section": plugin.deepspeed_config["msamp"]}
    model = fresh()
    told["prepare"] = message_of(
        lambda: accelerator.prepare(model, AdamW(model.parameters()), loader())
    )
    return told


SCENES = {
    scene.__name__: scene
    for scene in (plugins, plugin_flags, refused, sequence_parallel, tensor_parallel, msamp)
}
