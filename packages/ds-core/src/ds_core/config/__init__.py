"""The configuration of a run: DeepSpeed's JSON, checked at every level.

    config = ds_core.config.load("zero2.json", world_size=8)
    config.train_micro_batch_size_per_gpu, config.section("zero_optimization")

`load` reports every problem at once and by path; `explain` lists every effective value with its
origin; `json_schema` is for editors. A package adds a section by deriving from `Section` and
registering the class as an entry point of group `ds_core.config`.
"""

from __future__ import annotations

from ds_core.config.explaining import Row, explain, json_schema
from ds_core.config.formats import LossScaling, NumberFormats
from ds_core.config.loading import load
from ds_core.config.root import Config
from ds_core.config.section import Auto, Only, Section, refusal

__all__ = [
    "Auto",
    "Config",
    "LossScaling",
    "NumberFormats",
    "Only",
    "Row",
    "Section",
    "explain",
    "json_schema",
    "load",
    "refusal",
]
