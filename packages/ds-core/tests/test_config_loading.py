"""`ds_core.config.load`: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from ds_core import config, plugins
from ds_core.errors import ConfigError, PluginError


class InnerSection(config.Section):
    names: tuple[str, ...] = ()


class ShardSection(config.Section):
    """A section as a package would register it."""

    removed: ClassVar = {"old_stage": "renamed; use stage"}

    stage: int = Field(0, ge=0, le=3, description="What is sharded.")
    bucket: int = Field(10, gt=0, description="Elements.")
    quantized: Annotated[bool, config.Only(False, because="not yet; remove the key")] = False
    inner: InnerSection = Field(default_factory=InnerSection, description="Deeper.")


SECTIONS = {"zero_optimization": ShardSection}
MINIMAL = {"train_batch_size": 8}


def load(extra: dict, **options) -> config.Config:
    return config.load({**MINIMAL, **extra}, sections=SECTIONS, **options)


def refusal(extra: dict, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load(extra, **options)
    return str(caught.value)


def refusal_of_file(tmp_path, text: str) -> str:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode())
    with pytest.raises(ConfigError) as caught:
        config.load(path, sections=SECTIONS)
    return str(caught.value)


def test_defaults_are_those_of_deepspeed():
    loaded = load({})

    assert loaded.gradient_clipping == 1.0
    assert (loaded.fp16.initial_scale_power, loaded.fp16.loss_scale_window) == (16, 1000)
    assert (loaded.fp16.hysteresis, loaded.fp16.min_loss_scale) == (2, 1.0)
    assert loaded.checkpoint.tag_validation == "Warn"
    assert loaded.optimizer is None
    assert loaded.scheduler is None


@pytest.mark.parametrize(
    ("extra", "path", "suggestion"),
    [
        pytest.param({"zero_optimisation": {}}, "zero_optimisation", "zero_optimization", id="top"),
        pytest.param({"fp16": {"enable": True}}, "fp16.enable", "enabled", id="own-section"),
        pytest.param(
            {"zero_optimization": {"stge": 1}}, "zero_optimization.stge", "stage", id="package"
        ),
        pytest.param(
            {"zero_optimization": {"inner": {"name": []}}},
            "zero_optimization.inner.name",
            "names",
            id="nested",
        ),
        pytest.param(
            {"checkpoint": {"parallel_write": {"pipline_stage": True}}},
            "checkpoint.parallel_write.pipline_stage",
            "pipeline_stage",
            id="own-nested",
        ),
        pytest.param(
            {"optimizer": {"type": "adamw", "parms": {}}}, "optimizer.parms", "params", id="factory"
        ),
        pytest.param(
            {"optimizer": {"type": "adamw", "params": {"weight_decy": 0.1}}},
            "optimizer.params.weight_decy",
            "weight_decay",
            id="optimizer-params",
        ),
        pytest.param(
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 5}}},
            "scheduler.params.warmup_steps",
            "warmup_num_steps",
            id="scheduler-params",
        ),
    ],
)
def test_misspelt_key_names_the_nearest_one(extra, path, suggestion):
    assert refusal(extra) == f"{path}: unknown key; did you mean {suggestion}?"


def test_unknown_key_far_from_all_lists_the_valid_ones():
    assert refusal({"metrics": {"qqq": 1}}) == (
        "metrics.qqq: unknown key; valid here: every_steps, jsonl, loss_over_ranks"
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        pytest.param(
            {"steps_per_print": "2"},
            'steps_per_print: got "2", expected an integer > 0 or null',
            id="string-for-int",
        ),
        pytest.param({"seed": True}, "seed: got true, expected an integer", id="bool-for-int"),
        pytest.param({"seed": 2.5}, "seed: got 2.5, expected an integer", id="fraction-for-int"),
        pytest.param(
            {"gradient_clipping": True}, "gradient_clipping: got true, expected a number", id="bool"
        ),
        pytest.param(
            {"gradient_clipping": -1},
            "gradient_clipping: got -1, expected a number >= 0",
            id="range",
        ),
        pytest.param(
            {"fp16": {"loss_scale": float("inf")}}, "fp16.loss_scale: got Infinity", id="infinite"
        ),
        pytest.param({"progress": 1}, "progress: got 1, expected true or false", id="int-for-bool"),
        pytest.param({"fp16": True}, "fp16: got true, expected an object", id="bool-for-section"),
        pytest.param(
            {"bf16": {"enabled": "yes"}},
            'bf16.enabled: got "yes", expected true or false or "auto"',
            id="union",
        ),
        pytest.param(
            {"log_level": "loud"},
            "expected one of debug, info, warning, error, critical",
            id="choice",
        ),
        pytest.param(
            {"zero_optimization": {"inner": {"names": ["a", 1]}}},
            "zero_optimization.inner.names[1]: got 1, expected a string",
            id="list-item",
        ),
        pytest.param(
            {"optimizer": {"params": {}}},
            "optimizer.type: missing; expected a string",
            id="missing",
        ),
        pytest.param(
            {"optimizer": {"type": "sgd", "params": {"lr": "0.1"}}},
            'optimizer.params.lr: got "0.1", expected a number',
            id="optimizer-param",
        ),
        pytest.param(
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cosine"}}},
            'scheduler.params.warmup_type: got "cosine", expected one of log, linear',
            id="scheduler-param",
        ),
    ],
)
def test_wrong_value_names_path_value_and_what_is_allowed(extra, message):
    assert message in refusal(extra)


def test_integral_floats_are_integers_and_integers_are_floats():
    loaded = load({"zero_optimization": {"bucket": 5e8}, "seed": 3.0, "gradient_clipping": 2})

    bucket = loaded.section("zero_optimization").bucket
    assert (bucket, type(bucket)) == (500_000_000, int)
    assert (loaded.seed, type(loaded.seed)) == (3, int)
    assert loaded.gradient_clipping == 2.0


def test_all_problems_are_listed_at_once():
    message = refusal(
        {
            "fp17": {},
            "seed": "x",
            "zero_optimization": {"stage": 4, "bucket": "1"},
            "amp": {"enabled": True},
            "optimizer": {"type": "adamw", "params": {"rate": 1, "eps": "small"}},
        }
    )

    assert message.splitlines()[0] == "config: 7 problems"
    for path in ("fp17", "seed", "amp", "optimizer.params.rate", "optimizer.params.eps"):
        assert f"\n  {path}: " in message
    assert "\n  zero_optimization.stage: got 4, expected an integer >= 0 and <= 3" in message
    assert "\n  zero_optimization.bucket: got" in message


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"seed": "auto"}, id="top"),
        pytest.param({"zero_optimization": {"bucket": "auto"}}, id="package"),
        pytest.param({"optimizer": {"type": "adamw", "params": {"lr": "auto"}}}, id="optimizer"),
    ],
)
def test_auto_is_refused_where_nothing_resolves_it(extra):
    assert "which only Hugging Face's Trainer fills in; expected" in refusal(extra)


def test_auto_clipping_is_the_default():
    assert load({"gradient_clipping": "auto"}).gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("extra", "fragment"),
    [
        pytest.param({"amp": {"enabled": True}}, "amp: apex is not supported", id="amp"),
        pytest.param({"cpu_offload": True}, "offload_optimizer", id="cpu-offload"),
        pytest.param({"max_grad_norm": 1.0}, "use gradient_clipping", id="renamed"),
        pytest.param({"gradient_predivide_factor": 2.0}, "no sum overflows", id="predivide"),
        pytest.param({"compile": {"deepcompile": True}}, "DeepCompile", id="deepcompile"),
        pytest.param(
            {"bf16": {"bf16_optimizer_states": True}},
            "set bf16.enabled to true",
            id="bf16-states",
        ),
        pytest.param(
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}},
            "set communication_data_type",
            id="safe-modules",
        ),
        pytest.param(
            {"zero_optimization": {"old_stage": 1}},
            "zero_optimization.old_stage: renamed; use stage",
            id="removed-by-package",
        ),
        pytest.param(
            {"zero_optimization": {"quantized": True}},
            "zero_optimization.quantized: got true, expected false: not yet; remove the key",
            id="refused-by-package",
        ),
    ],
)
def test_unsupported_key_says_what_to_do_instead(extra, fragment):
    assert fragment in refusal(extra)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"nebula": {"enabled": False, "job_name": "x"}}, id="disabled-section"),
        pytest.param({"disable_allgather": False}, id="false-switch"),
        pytest.param({"sequence_parallel_size": 1}, id="size-one"),
    ],
)
def test_unsupported_key_that_asks_for_nothing_is_accepted(extra):
    assert load(extra) == load({})


def test_section_of_a_missing_package_says_what_to_install():
    with pytest.raises(ConfigError) as caught:
        config.load({**MINIMAL, "zero_optimization": {"stage": 1}}, sections={})

    assert str(caught.value) == (
        "zero_optimization: section zero_optimization belongs to ds-zero, which is not installed: "
        "pip install ds-zero"
    )


def test_bfloat16_is_another_name_of_bf16():
    assert load({"bfloat16": {"enabled": True}}).bf16.enabled is True
    assert "another name of bf16" in refusal({"bfloat16": {}, "bf16": {}})


def test_sections_are_attributes_with_defaults():
    loaded = load({})

    assert loaded.zero_optimization == ShardSection()
    assert loaded.section("zero_optimization") is loaded.zero_optimization
    assert loaded.section("fp16") is loaded.fp16
    assert loaded.section("pipeline") is None
    with pytest.raises(AttributeError, match="pipeline"):
        _ = loaded.pipeline


def test_config_is_frozen_and_detached_from_its_source():
    source = {**MINIMAL, "optimizer": {"type": "sgd", "params": {"lr": 0.1}}}
    loaded = config.load(source, sections=SECTIONS)
    source["optimizer"]["params"]["lr"] = 7.0

    assert loaded.optimizer.params == {"lr": 0.1}
    with pytest.raises(ValueError, match="frozen"):
        loaded.seed = 1


def test_config_survives_pickle_copy_and_its_own_dump():
    loaded = load({"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}, world_size=4)

    assert pickle.loads(pickle.dumps(loaded)) == loaded
    assert copy.deepcopy(loaded) == loaded
    again = config.load(loaded.model_dump(), world_size=4, sections=SECTIONS)
    assert again.model_dump() == loaded.model_dump()
    assert json.loads(loaded.model_dump_json())["zero_optimization"]["stage"] == 2


def test_file_is_read_and_named_in_errors(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**MINIMAL, "zero_optimization": {"stage": 3}}))

    assert config.load(str(path), sections=SECTIONS).zero_optimization.stage == 3
    assert refusal_of_file(tmp_path, '{"train_batch_size": "x"}').startswith(f"{path}: train_")


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        pytest.param('{"a": 1,\n "b" 2}', "ds.json:2:6: not valid JSON", id="position"),
        pytest.param('{"a": 1,\n}', "comma before the closing bracket", id="trailing-comma"),
        pytest.param('{\n// note\n"a": 1}', "JSON has no comments", id="comment"),
        pytest.param("{'a': 1}", "strings take double quotes", id="single-quotes"),
        pytest.param('{"a": True}', "JSON writes true, false, null", id="python-bool"),
        pytest.param("", "the file is empty", id="empty"),
        pytest.param('{"a": NaN}', "NaN is not JSON", id="nan"),
        pytest.param("[1]", "got [1], expected a JSON object", id="not-an-object"),
        pytest.param("[" * 100_000, "nested too deeply", id="bomb"),
    ],
)
def test_file_that_is_no_json_object_says_where(tmp_path, text, fragment):
    assert fragment in refusal_of_file(tmp_path, text)


def test_duplicate_keys_are_refused_at_every_level(tmp_path):
    text = (
        '{"seed": 1, "seed": 2, "train_batch_size": 8, "fp16": {"enabled": true, "enabled": false}}'
    )

    message = refusal_of_file(tmp_path, text)

    assert "seed: given more than once" in message
    assert "fp16.enabled: given more than once" in message


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        pytest.param("nowhere.json", "no such file", id="missing"),
        pytest.param('{"train_batch_size": 1}', "use json.loads", id="text"),
        pytest.param(17, "got int, expected a mapping", id="number"),
        pytest.param({"train_batch_size": 1, 2: 3}, "keys are strings in JSON, got 2", id="key"),
    ],
)
def test_source_that_is_no_config_is_refused(source, fragment):
    with pytest.raises(ConfigError, match=fragment):
        config.load(source, sections=SECTIONS)


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="not UTF-8 text"):
        config.load(path, sections=SECTIONS)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path, sections=SECTIONS)


class FakeEntry:
    """An entry point of one installed distribution."""

    dist = None
    value = "somewhere:Section"

    def __init__(self, name, target):
        self.name = name
        self.load = lambda: target


def install(monkeypatch, name, target):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [FakeEntry(name, target)])


def test_installed_sections_are_found_by_their_entry_points(monkeypatch):
    install(monkeypatch, "zero_optimization", ShardSection)

    loaded = config.load({**MINIMAL, "zero_optimization": {"stage": 1}})

    assert loaded.section("zero_optimization") == ShardSection(stage=1)


@pytest.mark.parametrize(
    ("name", "target", "fragment"),
    [
        pytest.param("fp16", ShardSection, "a key of ds-core itself", id="clash"),
        pytest.param("extra", dict, "expected a class derived from", id="no-section"),
    ],
)
def test_registration_that_cannot_work_is_refused(monkeypatch, name, target, fragment):
    install(monkeypatch, name, target)

    with pytest.raises(PluginError, match=fragment):
        config.load(MINIMAL)
