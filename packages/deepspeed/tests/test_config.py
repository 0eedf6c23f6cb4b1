from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.config_reading import read_config, translate
from deepspeed.runtime.config_table import LEFT_OUT, RENAMED, SWITCHES
from ds_core import plugins

BASE: dict[str, Any] = {"train_batch_size": 4}


def loaded(**keys: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig({**BASE, **keys})


def nested(path: str, value: Any) -> dict[str, Any]:
    *outer, last = path.split(".")
    found: dict[str, Any] = {last: value}
    for key in reversed(outer):
        found = {key: found}
    return found


#: A value of each key of the table that ds_core alone would refuse or not know.
ASKS = {
    "amp": {"enabled": False, "opt_level": "O1"},
    "bf16.check_grad_overflow": False,
    "checkpoint.checkpoint_serialization": False,
    "checkpoint.use_node_local_storage": True,
    "compile.passes": ["z3"],
    "data_types.buffer_dtype": None,
    "data_types.param_dtype": None,
    "datastates_ckpt": {"host_cache_size": 1},
    "expert_parallel": {"enabled": False, "ep_size": 2},
    "gradient_predivide_factor": 2.0,
    "hybrid_engine": {"enabled": False, "max_out_tokens": 5},
    "inference": {"tensor_parallel": {"tp_size": 1}},
    "pipeline": {"stages": "auto"},
    "tensor_parallel": {"autotp_size": 1},
    "zero_optimization.compute_grad_norm": False,
    "zero_optimization.ignore_unused_parameters": False,
    "zero_optimization.zero_hpz_partition_size": 2,
}


@pytest.mark.parametrize("path", sorted(LEFT_OUT))
def test_a_key_of_the_table_is_accepted_with_its_reason(path: str):
    value = nested(path, ASKS.get(path, True))
    value.setdefault("optimizer", {})["type"] = "AdamW"
    if path.startswith("activation_checkpointing."):
        value["activation_checkpointing"]["blocks"] = "repeated"
    if path == "optimizer.params.set_grad_none":
        value = {"optimizer": {"type": "AdamW", "params": {"set_grad_none": False}}}
    config = loaded(**value)
    asked = path not in ("data_types.buffer_dtype", "data_types.param_dtype", "amp")
    assert any(w.startswith(f"{path}: ") for w in config.warnings) == asked
    assert all(LEFT_OUT[path].reason in w for w in config.warnings if w.startswith(f"{path}: "))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("amp", {"enabled": True}, "apex"),
        ("tensor_parallel", {"autotp_size": 2}, "ds-pipe"),
        ("expert_parallel", {"enabled": True}, "ds-moe"),
        ("hybrid_engine", {"enabled": True}, "ds-inference"),
        ("sequence_parallel_size", 2, "ds-pipe"),
        ("compression_training", {"layer_reduction": {"enabled": True}}, "ds-compress"),
        ("quantize_training", {"enabled": True}, "ds-compress"),
        ("data_types", {"param_dtype": "bf16"}, "param_dtype"),
        ("data_types", {"buffer_dtype": "bf16"}, "buffer_dtype"),
        ("compile", {"passes": ["autosp"]}, "passes"),
        ("fp16", {"enabled": True, "fp16_master_weights_and_grads": True}, "master"),
        ("zero_optimization", {"stage": 3, "zero_quantized_weights": True}, "dense"),
        ("zero_optimization", {"stage": 3, "zero_quantized_gradients": True}, "dense"),
        ("zero_optimization", {"stage": 1, "load_from_fp32_weights": False}, "fp32 weights"),
        ("zero_optimization", {"stage": 7}, "stage"),
        ("zero_optimization", {"stagee": 2}, "did you mean stage"),
        ("optimizer", {"type": "OneBitAdam"}, "ds-comm"),
        ("optimizer", {"type": "Adam", "params": {"lr": "auto"}}, "auto"),
        ("train_micro_batch_size_per_gpu", 3, "train_batch_size"),
    ],
)
def test_what_would_change_the_results_is_an_error(key: str, value: Any, named: str):
    with pytest.raises(DeepSpeedConfigError, match=named):
        loaded(**{key: value})


def test_unknown_keys_at_the_top_are_ignored_aloud():
    dotted = {"zero_optimization.reduce_bucket_size": 0.9 * 64 * 64}
    config = loaded(zero_optimisation={"stage": 3}, msamp={"enabled": False}, **dotted)
    assert config.zero_optimization_stage == 0
    assert len(config.warnings) == 3
    assert "did you mean zero_optimization?" in config.warnings[0]


def test_unknown_keys_where_the_original_reads_by_key():
    config = loaded(
        activation_checkpointing={"blocks": "repeated", "future": 1},
        aio={"block_size": 1048576, "thread_count": 1},
        checkpoint={"tag_validation": "WARN", "other": 1},
        flops_profiler={"enabled": False, "future": 1},
    )
    assert [w.partition(":")[0] for w in config.warnings] == [
        "activation_checkpointing.future",
        "aio.thread_count",
        "checkpoint.other",
        "flops_profiler.future",
    ]


@pytest.mark.parametrize("path", sorted(RENAMED))
def test_former_names_mean_the_new_ones(path: str):
    section, _, old = path.partition(".")
    new = RENAMED[path].rpartition(".")[2]
    value = True if "gather" in old or "use_all" in old else 7
    config = loaded(**{section: {"stage": 3, old: value}})
    assert getattr(config.zero_config, new) == value
    assert new in config.warnings[0]
    with pytest.raises(DeepSpeedConfigError, match="given too"):
        loaded(**{section: {"stage": 3, old: value, new: value}})


@pytest.mark.parametrize("path", sorted(SWITCHES))
def test_former_switches_mean_the_section(path: str):
    old, new = path.rpartition(".")[2], SWITCHES[path]
    config = loaded(zero_optimization={"stage": 3, old: True})
    assert getattr(config.zero_config, new).device == "cpu"
    assert getattr(loaded(zero_optimization={"stage": 3, old: False}).zero_config, new) is None
    with pytest.raises(DeepSpeedConfigError, match="keep one"):
        loaded(zero_optimization={"stage": 3, old: True, new: {"device": "cpu"}})


def test_the_bool_of_2020_is_stage_1():
    assert loaded(zero_optimization=True).zero_optimization_stage == 1
    assert loaded(zero_optimization=False).zero_optimization_stage == 0


def test_auto_that_nobody_filled_in_is_the_originals_default():
    config = loaded(
        bf16={"enabled": "auto"},
        fp16={"enabled": "auto", "loss_scale": "auto", "loss_scale_window": 10},
        zero_optimization={
            "stage": 2,
            "reduce_bucket_size": "auto",
            "round_robin_gradients": "auto",
            "offload_optimizer": {"device": "auto", "pin_memory": "auto"},
        },
    )
    assert config.bfloat16_config.enabled is False
    assert config.float16_config.enabled is False
    assert config.float16_config.loss_scale_window == 10
    assert config.zero_config.round_robin_gradients is False
    assert config.zero_config.offload_optimizer.device == "none"
    assert config.warnings == []


def test_numbers_and_switches_as_text_as_pydantic_takes_them():
    config = loaded(
        fp16={"enabled": "true", "hysteresis": "3", "loss_scale": "128"},
        zero_optimization={"stage": "2", "reduce_bucket_size": "5e8", "contiguous_gradients": 1},
    )
    assert config.float16_config.enabled is True
    assert (config.float16_config.hysteresis, config.float16_config.loss_scale) == (3, 128.0)
    assert config.zero_config.stage == 2
    assert config.zero_config.contiguous_gradients is True
    with pytest.raises(DeepSpeedConfigError, match="enabled"):
        loaded(fp16={"enabled": "perhaps"})


def test_scalars_at_the_top_as_text():
    config = loaded(
        zero_allow_untested_optimizer="true", gradient_clipping="0.5", steps_per_print="10"
    )
    assert config.ours.zero_allow_untested_optimizer is True
    assert config.gradient_clipping == 0.5
    assert config.steps_per_print == 10
    with pytest.raises(DeepSpeedConfigError, match="gradient_clipping: got"):
        loaded(gradient_clipping="much")


def test_a_bound_of_gradients_below_zero_is_none():
    config = loaded(gradient_clipping=-1)
    assert config.gradient_clipping == 0.0
    assert config.warnings == ["gradient_clipping: -1 is below 0, so gradients are not clipped"]


def test_what_accelerate_and_lightning_write():
    config = loaded(
        steps_per_print=float("inf"),
        zero_allow_untested_optimizer=True,
        activation_checkpointing={
            "number_checkpoints": None,
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "synchronize_checkpoint_boundary": False,
        },
        aio={"block_size": 1048576, "queue_depth": 8, "single_submit": False,
             "overlap_events": True, "thread_count": 1},
        zero_optimization={
            "stage": 2, "contiguous_gradients": True, "overlap_comm": True,
            "allgather_partitions": True, "reduce_scatter": True,
            "allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000,
            "sub_group_size": 1_000_000_000_000,
            "offload_optimizer": {"device": "none", "nvme_path": None},
            "offload_param": {"device": "cpu", "nvme_path": None},
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        fp16={"enabled": False, "loss_scale": 0.0, "initial_scale_power": 16,
              "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        bf16={"enabled": False},
    )  # fmt: skip
    assert config.ours.steps_per_print is None
    assert [w.partition(":")[0] for w in config.warnings] == [
        "aio.thread_count",
        "zero_optimization.offload_param",
    ]


def test_activation_checkpointing_says_how_and_not_which():
    config = loaded(activation_checkpointing={"cpu_checkpointing": True, "number_checkpoints": 4})
    assert "deepspeed.checkpointing" in config.warnings[0]
    assert config.ours.section("activation_checkpointing").number_checkpoints is None


def test_sections_that_name_nothing_are_as_absent():
    config = loaded(optimizer={"params": {"lr": 1}}, scheduler={})
    assert config.optimizer_name is None
    assert config.scheduler_name is None


def test_node_local_storage_on_several_nodes_is_refused():
    keys = {**BASE, "checkpoint": {"use_node_local_storage": True}}
    assert translate(keys, num_nodes=2)[0]["checkpoint"] == {"use_node_local_storage": True}
    assert translate(keys, num_nodes=1)[0]["checkpoint"] == {}


def test_the_user_s_dict_is_not_changed():
    user = {**BASE, "zero_optimization": {"stage": 0, "offload_param": {"device": "cpu"}},
            "optimizer": {"type": "Adam", "params": {"set_grad_none": False}}}  # fmt: skip
    before = json.loads(json.dumps(user))
    config = DeepSpeedConfig(user)
    assert user == before
    assert config.param_dict == before


def test_a_section_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch):
    found = plugins.registered

    def without_zero(seam: Any) -> Any:
        return {k: e for k, e in found(seam).items() if k != "zero_optimization"}

    monkeypatch.setattr(plugins, "registered", without_zero)
    with pytest.raises(DeepSpeedConfigError, match="pip install ds-zero"):
        loaded(zero_optimization={"stage": 2})


def test_a_file_and_base64_are_read(tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BASE))
    encoded = base64.urlsafe_b64encode(json.dumps(BASE).encode()).decode()
    assert read_config(str(file)) == read_config(file) == read_config(encoded) == BASE
    assert DeepSpeedConfig(str(file)).train_micro_batch_size_per_gpu == 4


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a": 1, "a": 2}', "more than once"),
        ("[1]", "JSON object"),
        ('{"a": 1,', "not valid"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, named: str, tmp_path: Path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(DeepSpeedConfigError, match=named):
        read_config(str(file))


@pytest.mark.parametrize("source", ["no_such_file.json", 3, None])
def test_what_is_no_configuration_is_named(source: Any):
    with pytest.raises(DeepSpeedConfigError, match="expected"):
        read_config(source)


def test_names_at_the_top():
    assert deepspeed.DeepSpeedConfig is DeepSpeedConfig
    assert deepspeed.DeepSpeedConfigError is DeepSpeedConfigError
    config = loaded(log_level="INFO", communication_data_type="bfp16")
    assert config.communication_data_type == "bf16"
    config.print("config")
    config.print_user_config()
