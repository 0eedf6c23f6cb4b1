"""Effective values with their origins, and the JSON Schema."""

from __future__ import annotations

import json
import subprocess
import sys

from pydantic import Field

from ds_core import config


class ShardSection(config.Section):
    stage: int = Field(0, ge=0, le=3, description="What is sharded.")
    sizes: tuple[int, ...] = Field((1, 2), description="Some sizes.")


SECTIONS = {"zero_optimization": ShardSection}


def rows(source: dict, **options) -> dict[str, config.Row]:
    loaded = config.load(source, sections=SECTIONS, **options)
    return {row.key: row for row in config.explain(loaded)}


def test_every_value_has_its_origin():
    found = rows(
        {
            "train_batch_size": 32,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "bfloat16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2},
        },
        world_size=4,
    )

    assert found["train_batch_size"][1:3] == (32, "file")
    assert found["train_micro_batch_size_per_gpu"][1:3] == (8, "auto")
    assert found["gradient_accumulation_steps"][1:3] == (1, "derived")
    assert found["gradient_clipping"][1:3] == (1.0, "auto")
    assert found["bf16.enabled"][1:3] == ("auto", "auto")
    assert found["zero_optimization.stage"] == (
        "zero_optimization.stage",
        2,
        "file",
        "What is sharded.",
    )
    assert found["zero_optimization.sizes"][1:3] == ([1, 2], "default")
    assert found["seed"][1:3] == (None, "default")


def test_defaults_of_the_optimizer_and_the_schedule_are_listed():
    found = rows(
        {
            "train_batch_size": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 1e3}},
        }
    )

    assert found["optimizer.params.lr"][1:3] == (0.1, "file")
    assert found["optimizer.params.weight_decay"][1:3] == (0.0, "default")
    assert found["optimizer.params.betas"][1] == [0.9, 0.999]
    assert found["scheduler.params.total_num_steps"][1:3] == (1000, "file")
    assert found["scheduler.params.warmup_type"][1:3] == ("log", "default")


def test_every_field_of_ds_core_says_what_it_does():
    undescribed = [row.key for row in rows({"train_batch_size": 1}).values() if not row.meaning]

    assert undescribed == []


def test_schema_describes_the_file_with_its_sections():
    schema = config.json_schema(SECTIONS)

    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert "required" not in schema
    assert {"const": "auto"} in schema["properties"]["train_batch_size"]["anyOf"]
    assert "bfloat16" in schema["properties"]
    assert schema["$defs"]["ShardSection"]["additionalProperties"] is False
    assert schema["properties"]["gradient_allreduce_op"]["enum"] == ["mean", "sum"]


def test_building_an_optimizer_does_not_import_pydantic():
    script = (
        "import sys, ds_core.optimizers, ds_core.lr_schedules; print('pydantic' in sys.modules)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "False"
