"""accelerate, behaviour by behaviour: short programs in two processes, `jobs/scenes_*.py`."""

from __future__ import annotations

from typing import Any

import pytest

TOLERANCE = 1e-5
#: Losses of 16-bit models against those in fp64.
HALF = 5e-3


@pytest.fixture(scope="module")
def job(launch, is_ours, tmp_path_factory):
    if not is_ours:
        pytest.skip("the original package compiles its optimizers first")
    return launch("accelerate_scenes.py", tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def seen(job):
    """What rank 0 saw in a scene; fails with the traceback of one that failed on any rank."""

    def of(name: str) -> dict[str, Any]:
        for rank in job.ranks:
            assert "error" not in rank[name], rank[name]["error"]
        return job[name]

    return of


def assert_learns_as_expected(told, tolerance=TOLERANCE):
    assert told["losses"] == pytest.approx(told["expected"], abs=tolerance)


# --- settings -------------------------------------------------------------------------------------


def test_one_plugin_of_several_is_in_force_and_transformers_is_told(seen):
    told = seen("plugins")
    assert (told["first"], told["second"]) == ([True, False], [False, True])
    assert told["active"]
    assert told["known"] == [2, 3]
    assert "must be enabled manually" in told["own"]
    assert "cannot pass in a `deepspeed_plugin`" in told["another"]


def test_flags_of_the_plugin(seen):
    told = seen("plugin_flags")
    assert told["init"] == [False, True, True]
    assert (told["steps"], told["stage"], told["offload"]) == (1, 3, "cpu")
    assert "Please specify the ZeRO optimization config" in told["no_zero"]
    assert "cannot be set to `fp16` when `bf16` is set" in told["two_precisions"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no_section", "without specifying an optimizer in the config file"),
        ("no_schedule", "Either specify a scheduler in the config file"),
        ("both", "cannot specify an optimizer in the config file and in the code"),
        ("both_schedules", "cannot specify a scheduler in the config file and in the code"),
        ("mixed", "only specify `accelerate.utils.DummyScheduler`"),
    ],
)
def test_what_is_given_twice_or_not_at_all_is_refused(seen, case, message):
    assert message in seen("refused")[case]


def test_sequence_parallelism_names_its_package_at_the_moment_of_use(seen):
    told = seen("sequence_parallel")
    for use in ("prepare", "loader"):
        assert told[use].startswith("NotProvidedError")
        assert "ds-pipe will bring sequence parallelism" in told[use]
    assert "expects the model object to have a config" in told["plain_model"]
    assert told["sizes"] == [1, 0]
    assert told["same_loader"]


def test_tensor_parallelism_names_its_package_and_one_rank_is_none(seen):
    told = seen("tensor_parallel")
    assert "ds-pipe" in told["prepare"]
    assert told["one"] == ""


def test_msamp_needs_its_own_package(seen):
    told = seen("msamp")
    assert told["section"] == {"enabled": True, "opt_level": "O2"}
    assert told["prepare"] == "ModuleNotFoundError: No module named 'msamp'"


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scene", "precision", "dtype"),
    [
        ("fp16", "fp16", "float16"),
        ("bf16", "bf16", "bfloat16"),
        ("bf16_stage3", "bf16", "bfloat16"),
    ],
)
def test_mixed_precision(seen, scene, precision, dtype):
    told = seen(scene)
    assert told["enabled"] == {key: key == precision for key in ("fp16", "bf16")}
    assert told["precision"] == precision
    assert told["dtype"] == told["logits"] == f"torch.{dtype}"
    assert told["norm"] == "float"
    assert_learns_as_expected(told, HALF)


def test_a_step_that_overflows_is_skipped_and_the_scale_falls(seen):
    told = seen("fp16")
    assert told["skipped"] == [True, True, False]
    assert told["scales"] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert told["unchanged"]


def test_fp16_casts_the_inputs(seen):
    told = seen("fp16_casts_inputs")
    assert (told["cast"], told["said"]) == (True, "torch.float16")


# --- accumulation ---------------------------------------------------------------------------------


def test_the_end_of_the_loader_is_the_end_of_a_step(seen):
    told = seen("accumulation")
    assert told["synced"] == [False, True, False, True, True] * 2
    assert told["steps"] == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6]
    assert_learns_as_expected(told)


def test_the_number_of_micro_batches_in_the_configuration_wins(seen):
    told = seen("accumulation_of_the_plugin")
    assert (told["accelerator"], told["engine"], told["batch"], told["steps"]) == (4, 4, 32, 1)


def test_arguments_of_backward_reach_the_engine(seen):
    assert_learns_as_expected(seen("backward_arguments"))


def test_no_sync_at_every_stage(seen):
    assert all(seen("no_sync")[str(stage)] for stage in range(4))


# --- optimizers and schedules ---------------------------------------------------------------------


def test_dummies_stand_for_what_the_file_names(seen):
    told = seen("dummies")
    assert told["wrapper"] == "DeepSpeedSchedulerWrapper"
    assert told["rates"] == pytest.approx([0.0, 0.005, 0.01, 0.00875, 0.0075, 0.00625])
    assert told["last"] == pytest.approx(told["rates"][-1:])
    params = told["config"]["params"]
    # accelerate divides the steps by the processes.
    assert (params["warmup_num_steps"], params["total_num_steps"]) == (2, 10)
    assert (told["decay"], told["betas"]) == (0.125, [0.9, 0.999])


def test_a_dummy_without_warmup_steps_has_one(seen):
    told = seen("dummy_without_warmup")
    assert told["config"]["params"] == {"warmup_num_steps": 1}
    assert told["rates"][-1] > 0


def test_groups_of_a_dummy_optimizer(seen):
    assert seen("dummy_groups")["decays"] == [0.5, 0.0]


def test_a_callable_makes_the_schedule(seen):
    told = seen("schedule_callable")
    assert told["rates"] == pytest.approx([0.01, 0.005, 0.005, 0.0025, 0.0025, 0.00125])
    assert told["wrapper"] == "DeepSpeedSchedulerWrapper"


def test_a_schedule_of_deepspeed_is_stepped_by_the_engine(seen):
    told = seen("schedule_of_deepspeed")
    assert told["wrapper"] == "DeepSpeedSchedulerWrapper"
    assert told["rates"] == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_a_schedule_of_transformers_is_stepped_by_accelerate(seen):
    told = seen("schedule_of_transformers")
    assert told["wrapper"] == "AcceleratedScheduler"
    # Two steps for each of the loop's: one for each process.
    assert told["rates"] == pytest.approx([0.01 * (18 - 2 * i) / 18 for i in range(6)])


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad", "kept"])
def test_the_optimizer_under_cpu_offload(seen, name):
    """`expected` is what accelerate's choice does: Adam, for SGD too, unless told to leave it."""
    told = seen("offloaded")[name]
    used = {"Adagrad": "DeepSpeedCPUAdagrad", "kept": "AdamW"}.get(name, "DeepSpeedCPUAdam")
    assert told["inner"] == used
    assert_learns_as_expected(told)


# --- models ---------------------------------------------------------------------------------------


def test_two_models_are_trained_by_two_accelerators(seen):
    told = seen("two_models")
    assert told["is_active"]
    assert told["is_own"] == [True, True]
    assert told["stages"] == [2, 3]
    for losses in (told["losses1"], told["losses2"]):
        assert losses == pytest.approx(told["expected"], abs=TOLERANCE)


def test_a_model_at_stage_3_only_runs_while_another_trains(seen):
    told = seen("judged")
    assert told["is_first"]
    assert told["noise"] == pytest.approx(0.1)
    assert_learns_as_expected(told)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_a_model_is_prepared_to_be_evaluated(seen, stage):
    told = seen("evaluated")
    assert told[stage]["same"]
    assert told[stage]["engine"] == "DeepSpeedEngine"
    assert told[stage]["is_module"]
    assert not told[stage]["training"]
    assert told["loader"] == "DataLoaderShard"
    assert "requires you to pass at least one" in told["no_batch_size"]


def test_states_of_two_engines_are_saved_and_loaded(seen):
    told = seen("saved_states")
    assert told["again"] == pytest.approx(told["there"], abs=1e-6)
    assert told["names"] == ["checkpoint_1"]
    assert {"latest", "pytorch_model", "pytorch_model_1"} <= set(told["inside"])


def test_the_whole_model_or_its_blocks_are_compiled(seen):
    told = seen("compiled")
    for each in told.values():
        if isinstance(each, dict):
            assert_learns_as_expected(each)
    assert told["whole"]["is_compiled"]
    assert all(told["regions"]["blocks"])
    assert all(told["regions3"]["blocks"])


# --- stage 3 --------------------------------------------------------------------------------------


def test_a_model_is_built_in_shards_and_its_parameters_are_gathered(seen):
    told = seen("built_in_shards")
    assert told["flag"]
    assert told["zero3"]
    assert told["statuses"] == ["NOT_AVAILABLE"]
    assert told["shapes"] == told["total"] > 0
    # Nothing is to be learned from the order of random words: about log(16) all along.
    assert told["losses"] == pytest.approx([2.773] * len(told["losses"]), abs=0.1)
    assert told["saved"] == [7.0]
    assert told["seen"] == [16, 16]
    # Rank 0 wrote it, and every rank reads it.
    assert told["row"] == [7.0]
    assert told["disabled"] == told["left"] == "NOT_AVAILABLE"
    assert "model.safetensors.index.json" in told["files"]


def test_without_gathering_get_state_dict_says_which_key_to_set(seen):
    assert "stage3_gather_16bit_weights_on_model_save" in seen("not_gathered")["state"]


def test_classes_of_experts_become_leaf_modules(seen):
    told = seen("experts")
    assert told["leaves"] == ["Routed"]
    assert told["is_leaf"]
    assert_learns_as_expected(told)
    assert "Could not find a transformer layer class called 'Gone'" in told["unknown"]


def test_auto_is_filled_in_and_reaches_the_engine(seen):
    told = seen("filled_in")
    config, zero = told["config"], told["config"]["zero_optimization"]
    assert config["gradient_accumulation_steps"] == 3
    # The smaller of the two loaders.
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["train_batch_size"] == 12
    assert zero["stage"] == 3
    assert told["engine"] == {
        "clip": 0.75,
        "stage": 3,
        "bucket": 256,
        "prefetch": 230,
        "persistence": 160,
        "gathers": True,
        "batch": [12, 2, 3],
    }
    assert (told["rate"], told["decay"], told["prints"]) == (0.01, 0.25, "inf")
    assert "Can't find `model.config` entry" in told["no_config"]
