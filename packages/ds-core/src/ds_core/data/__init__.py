"""The data of a run: loaders that resume exactly, curricula, analysis, token files, batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ds_core.data.loader import PlannedLoader, RepeatingLoader, ResumableLoader

def build_loader(config, dataset, *, collate_fn=None, rank=0, num_ranks=1):
    return ResumableLoader(
            dataset,
            config.train_micro_batch_size_per_gpu,
            rank=rank,
            num_ranks=num_ranks,
            collate_fn=collate_fn,
            drop_last=config.dataloader_drop_last,
            seed=config.seed or 0,
        )

__all__ = ["PlannedLoader", "RepeatingLoader", "ResumableLoader", "build_loader"]
