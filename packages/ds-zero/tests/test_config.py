"""The `zero_optimization` section."""

from __future__ import annotations

import sys

import pytest

from ds_core import config
from ds_core.errors import ConfigError
from ds_zero import Offload
from ds_zero.config import ZeroSection


def load(section: object) -> ZeroSection:
    source = {"train_batch_size": 1, "zero_optimization": section}
    loaded = config.load(source, sections={"zero_optimization": ZeroSection})
    parsed = loaded.section("zero_optimization")
    assert isinstance(parsed, ZeroSection)
    return parsed


def refusal(section: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(section)
    return str(caught.value)


def test_defaults_are_those_of_deepspeed():
    section = load({})

    assert section.stage == 0
    assert (section.reduce_bucket_size, section.allgather_bucket_size) == (500_000_000,) * 2
    assert section.stage3_prefetch_bucket_size == 50_000_000
    assert section.stage3_param_persistence_threshold == 100_000
    assert section.stage3_model_persistence_threshold == sys.maxsize
    assert len(section.leaf_module.classes) == 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 2.0])
def test_stages(stage):
    section = load({"stage": stage})

    assert section.stage == stage
    assert type(section.stage) is int


@pytest.mark.parametrize("stage", [4, -1, True, "2", 1.5, None])
def test_other_stages_are_refused(stage):
    assert "zero_optimization.stage: got " in refusal({"stage": stage})
    assert "expected one of 0, 1, 2, 3" in refusal({"stage": stage})


def test_a_common_file_of_deepspeed_is_accepted_as_it_is():
    section = load(
        {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": 5e8,
            "allgather_bucket_size": 2e8,
            "reduce_scatter": True,
            "round_robin_gradients": True,
            "stage3_prefetch_bucket_size": 5e7,
            "stage3_param_persistence_threshold": 1e6,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "offload_param": {"device": "none"},
        }
    )

    assert section.stage3_param_persistence_threshold == 1_000_000
    assert section.offload_optimizer is not None


def test_leaf_modules_may_be_one_string():
    leaves = load({"leaf_module": {"classes": "Block", "names": ["a.b"]}}).leaf_module

    assert (leaves.classes, leaves.names, leaves.name_suffixes) == (("Block",), ("a.b",), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_quantized_weights", True),
        ("zero_quantized_nontrainable_weights", True),
        ("zero_quantized_gradients", True),
        ("zeropp_loco_param", {"err_beta": 0.8}),
        ("zero_hpz_partition_size", 8),
        ("mics_shard_size", 4),
        ("mics_hierarchical_params_gather", True),
        ("load_from_fp32_weights", False),
        ("ignore_unused_parameters", False),
        ("save_muon_momentum_buffer_in_memory", True),
    ],
)
def test_what_is_not_there_yet_is_refused_by_name(key, value):
    message = refusal({"stage": 3, key: value})

    assert message.startswith(f"zero_optimization.{key}")
    assert "not in ds-zero 0.1" in message


@pytest.mark.parametrize(
    ("key", "replacement"),
    [
        ("stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"),
        ("cpu_offload_use_pin_memory", "offload_optimizer.pin_memory"),
        ("cpu_offload", '"offload_optimizer": {"device": "cpu"}'),
        ("cpu_offload_param", '"offload_param": {"device": "cpu"}'),
        ("allgather_size", "allgather_bucket_size"),
        ("grad_hooks", "never a key of its code"),
        ("legacy_stage1", "gone"),
    ],
)
def test_old_names_are_refused_with_their_replacement(key, replacement):
    assert replacement in refusal({key: False})


def test_misspelt_keys_name_the_nearest():
    assert "did you mean reduce_bucket_size?" in refusal({"reduce_buket_size": 1})
    assert "did you mean name_suffixes?" in refusal({"leaf_module": {"name_suffix": []}})


def test_bare_switch_of_2020_is_refused():
    assert 'got true, the form of 2020; use {"stage": 1}' in refusal(True)


def test_every_key_says_what_it_does():
    assert [name for name, field in ZeroSection.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 0, "offload_optimizer": {"device": "cpu"}}, "set stage to 1 or higher"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "set stage to 3"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, 'add "nvme_path"'),
        ({"stage": 1, "offload_optimizer": {"device": "disk"}}, "none, cpu"),
        ({"stage": 1, "offload_optimizer": {"device": "cpu", "ratio": 2}}, "ratio"),
    ],
)
def test_offload_that_makes_no_sense(section, message):
    assert message in refusal(section)


def test_what_a_section_says_of_offload():
    section = load(
        {
            "stage": 3,
            "sub_group_size": 1000,
            "offload_optimizer": {"device": "nvme", "nvme_path": "a", "buffer_count": 6},
            "offload_param": {"device": "nvme", "nvme_path": "b", "max_in_cpu": 7},
        }
    )

    assert section.offload() == Offload(
        optimizer="nvme",
        parameters="nvme",
        folder="a",
        parameters_folder="b",
        piece_numel=1000,
        buffers=6,
        parameter_buffers=5,
        max_numel_in_cpu=7,
    )
    assert section.steps_on_host
    assert not load({"stage": 3}).steps_on_host


def test_an_offload_has_the_buffers_of_a_config():
    disk = {"device": "nvme", "nvme_path": "/d"}
    section = load({"stage": 3, "offload_optimizer": disk, "offload_param": disk})
    told, plain = section.offload(), Offload("nvme", "nvme", folder="/d")
    assert (told.buffers, told.parameter_buffers) == (plain.buffers, plain.parameter_buffers)
