"""lightning: its DeepSpeed strategy, which wants a GPU, up to there on a CPU."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def job(launch, tmp_path_factory):
    return launch("lightning_setup.py", tmp_path_factory.mktemp("lightning"))


def test_the_strategy_itself_refuses_a_cpu(job):
    """It is lightning that does; the rest of this file is what comes after that line."""
    assert "only supported on CUDA GPUs" in job["refusal"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_of_the_strategy_trains(job, stage):
    for rank in job.ranks:
        told = rank[f"stage{stage}"]
        assert told["config"]["zero_optimization"]["stage"] == stage
        assert told["engine"] == ["DeepSpeedEngine", True]
        assert told["losses"] == pytest.approx(rank["reference"], abs=1e-5)


def test_the_module_context_of_stage_3_builds_shards(job):
    for rank in job.ranks:
        assert [rank[f"stage{stage}"]["partitioned"] for stage in (1, 2, 3)] == [False, False, True]
        told = rank["stage3"]
        assert told["numbers"] == [320, 32, 32, 1]
        assert told["held"][0] == 160


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_saves_and_loads_with_the_state_of_the_program(job, stage):
    for rank in job.ranks:
        told = rank[f"stage{stage}"]
        assert told["epoch"] == 3
        assert told["again"] == pytest.approx(told["after"], abs=1e-6)


def test_the_names_of_the_trainer(job):
    assert job["is_trainer_strategy"]
    stages = {name: config["stage"] for name, (_, config) in job["made"].items()}
    assert stages == {
        "deepspeed_stage_1": 1,
        "deepspeed_stage_2": 2,
        "deepspeed_stage_2_offload": 2,
        "deepspeed_stage_3": 3,
        "deepspeed_stage_3_offload": 3,
    }
