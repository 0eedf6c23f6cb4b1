"""A program that says nothing of deepspeed: `accelerate launch` gave it all its settings."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from scenes_common import BATCH, first, fresh, loader, trained
from scenes_training import adamw

KEPT = ("zero_stage", "offload_optimizer_device", "offload_param_device", "zero3_init_flag")
KEPT += ("gradient_clipping", "gradient_accumulation_steps", "zero3_save_16bit_model")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    # Where a command is started on each host, the launcher adds --local_rank.
    options = parser.parse_known_args()[0]
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    model = fresh()
    model, optimizer, data = accelerator.prepare(model, adamw(model.parameters()), loader())
    told = {
        "plugin": {key: getattr(accelerator.state.deepspeed_plugin, key) for key in KEPT},
        "classes": accelerator.state.deepspeed_plugin.transformer_moe_cls_names,
        "precision": accelerator.mixed_precision,
        "world": accelerator.num_processes,
        "local_rank": int(os.environ["LOCAL_RANK"]),
        "launcher": os.environ.get("ACCELERATE_USE_DEEPSPEED"),
        "stage": model.zero_optimization_stage(),
        "clip": model.gradient_clipping(),
        "steps": model.gradient_accumulation_steps(),
        "batch": model.train_batch_size() // BATCH,
        "gathers": model.zero_gather_16bit_weights_on_model_save(),
        "offload": [
            str(getattr(section, "device", None))
            for section in (model.zero_offload_optimizer(), model.zero_offload_param())
        ],
        "inner": type(model.basic_optimizer).__name__,
        "losses": trained(accelerator, model, optimizer, first(data, 4)),
    }
    (options.out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
    accelerator.end_training()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
