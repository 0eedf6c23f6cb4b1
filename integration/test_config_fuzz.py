"""A config that was changed anyhow is honoured as it stands or refused: never anything between."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_core import config
from ds_core.config.reference import reference
from ds_core.errors import ConfigError

# Configs as users have them: each loads as it stands.
SEEDS: list[dict[str, Any]] = [
    {"train_batch_size": 8},
    {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8},
    },
    {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": 1e5,
            "leaf_module": {"classes": ["torch.nn.Linear"]},
        },
        "checkpoint": {"tag_validation": "Fail", "parallel_write": {"pipeline_stage": True}},
        "zero_allow_untested_optimizer": True,
    },
]
# What arithmetic fills in, which may therefore change when something else does.
DERIVED = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
KNOWN = sorted({part for key in reference() for part in key.path.split(".")})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)
likely_values = st.sampled_from([0, 1, -1, 2, 3, 1e9, 0.5, "auto", "", "none", True, False, None])
keys = st.sampled_from(KNOWN) | st.text(max_size=12)


def objects(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all objects within a JSON value, itself first."""
    if not isinstance(value, dict):
        return []
    return [path, *(p for k, v in value.items() for p in objects(v, (*path, k)))]


def inside(document: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path:
        document = document[part]
    return document


@st.composite
def mutated(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A valid config, the same with one change, and the path of the key that was changed."""
    before = draw(st.sampled_from(SEEDS))
    after = copy.deepcopy(before)
    path = draw(st.sampled_from(objects(after)))
    home = inside(after, path)
    kind = draw(st.sampled_from(["add", "replace", "rename", "remove"]))
    if kind == "add" or not home:
        key = draw(keys)
        home[key] = draw(json_values | likely_values)
    else:
        key = draw(st.sampled_from(sorted(home)))
        value = home.pop(key)
        if kind == "replace":
            home[key] = draw(json_values | likely_values)
        elif kind == "rename":
            at = draw(st.integers(0, len(key) - 1))
            key = key[:at] + draw(st.sampled_from("xe_1")) + key[at + 1 :]
            home[key] = value
    return before, after, ".".join((*path, key))


@functools.cache
def top_keys() -> frozenset[str]:
    return frozenset(key.path.partition(".")[0] for key in reference())


def effective(document: dict[str, Any] | Path) -> dict[str, config.Row]:
    return {row.key: row for row in config.explain(config.load(document))}


def effective_or_refusal(document: dict[str, Any] | Path) -> tuple[dict[str, config.Row], str]:
    """The effective values and nothing, or nothing and what the refusal says."""
    try:
        return effective(document), ""
    except ConfigError as error:
        return {}, str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutated())
def test_a_change_is_honoured_or_refused_by_name(case: tuple[dict[str, Any], dict[str, Any], str]):
    before, after, changed = case
    kept = json.dumps(after)

    rows, refusal = effective_or_refusal(after)

    assert json.dumps(after) == kept, "loading changed what it was given"
    if refusal:
        assert changed.partition(".")[0] in refusal or "batch" in refusal
        return
    for path, value in leaves(after):
        if path in DERIVED and value is None:
            continue  # null leaves a batch size to be solved for
        assert path in rows, f"{path} was accepted and has no effect"
        assert rows[path].origin in ("file", "auto")
        if rows[path].origin == "file":
            assert same(rows[path].value, value), path
    # What nobody touched is as it was.
    for path, row in effective(before).items():
        if path not in DERIVED and not related(path, changed) and path in rows:
            assert rows[path].value == row.value, path


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value of a document that is no object, by path, in the names that the config uses."""
    if not isinstance(value, dict):
        return [(path, value)]
    found = []
    for key, item in value.items():
        if path == "" and key in ("bfloat16",):
            key = "bf16"
        if path == "" and key not in top_keys():
            continue  # a key of DeepSpeed that switches off what is not there anyway
        found += leaves(item, f"{path}.{key}" if path else key)
    return found


def same(effective_value: Any, written: Any) -> bool:
    """Whether a value is what was written, but for spellings that the format has several of."""
    if isinstance(effective_value, str) and isinstance(written, str):
        # "Warn" for "WARN", "bf16" for "torch.bfloat16".
        return effective_value.lower() == written.lower() or effective_value[:2] in written
    if isinstance(effective_value, list) and isinstance(written, str):
        return effective_value == [written]
    return effective_value == written


def related(path: str, changed: str) -> bool:
    """Whether a change at one path may rightly show at another: its own section's."""
    return path.partition(".")[0] == changed.partition(".")[0]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    where=st.floats(0, 1, exclude_max=True),
    damage=st.sampled_from(["", "{", "}", '"', ",", "x", "//", "\x00", "é"]),
)
def test_damaged_text_is_refused_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, seed: dict[str, Any], where: float, damage: str
):
    text = json.dumps(seed, indent=2)
    at = int(where * len(text))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_text(text[:at] + damage + text[at + 1 :], encoding="utf-8")

    _, refusal = effective_or_refusal(path)

    assert not refusal or path.name in refusal


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_a_repeated_key_is_refused_at_every_level(seed: int, tmp_path: Path):
    for path in objects(SEEDS[seed]):
        for key in inside(SEEDS[seed], path):
            text = json.dumps(SEEDS[seed])
            written = json.dumps(key) + ": " + json.dumps(inside(SEEDS[seed], path)[key])
            file = tmp_path / "twice.json"
            file.write_text(text.replace(written, f"{written}, {written}", 1))
            with pytest.raises(ConfigError, match="given more than once"):
                config.load(file)
