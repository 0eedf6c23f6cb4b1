"""A training run: `initialize`, the engine, its configuration, data and schedules."""

from __future__ import annotations

from deepspeed._names import names_of

__getattr__, __dir__ = names_of(
    __name__,
    {},
    submodules=(
        *("activation_checkpointing", "arguments", "base_optimizer", "config", "dataloader"),
        *("engine", "initialize", "lr_schedules", "utils", "zero"),
    ),
    missing={
        "pipe": "ds-pipe will bring pipelines; use ZeRO stage 3",
        "hybrid_engine": "ds-inference will bring it; generate with the module of a stage 3 engine "
        "inside deepspeed.zero.GatheredParameters",
        "compression": "ds-compress will bring it",
    },
)
