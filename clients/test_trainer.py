"""transformers: `Trainer(deepspeed=...)` learns as plain DDP does, saves, resumes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS, SAVE_AT = 6, 2
TOLERANCE = 1e-4

AUTO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
}
ZERO = {
    "1": {"stage": 1},
    "2": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
    "3": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
ZERO["2-offload"] = {**ZERO["2"], "offload_optimizer": {"device": "cpu"}}
ZERO["3-offload"] = {
    **{key: value for key, value in ZERO["3"].items() if "gather" not in key},
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}
ZERO["3-nvme"] = {
    **ZERO["3"],
    "offload_optimizer": {"device": "nvme", "nvme_path": "NVME"},
    "offload_param": {"device": "nvme", "nvme_path": "NVME"},
}
#: Through the launcher of this repository, one of them.
LAUNCHERS = {"1": "ds"}
#: The kind of run that goes on from a checkpoint of another.
RESUMED = {"1": "1", "2": "3", "3": "2-offload", "3-offload": "3-offload", "3-nvme": "3-nvme"}
ALONE = ("--nproc_per_node", "1")

Runs = Callable[[str], Any]


def written(folder: Path, name: str, config: dict[str, Any] | None = None) -> str:
    """The path of a configuration of a kind; what is offloaded goes below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path, whole = folder / "ds_config.json", {**AUTO, "zero_optimization": ZERO[name]}
    path.write_text(json.dumps({**whole, **(config or {})}).replace("NVME", str(folder / "nvme")))
    return str(path)


@pytest.fixture(scope="module")
def ddp(launch, tmp_path_factory):
    """What the same program does without deepspeed."""
    folder = tmp_path_factory.mktemp("ddp")
    return launch("trainer.py", folder, "--steps", str(STEPS), "--save-at", str(SAVE_AT))


@pytest.fixture(scope="module")
def trained(launch, is_ours, tmp_path_factory) -> Runs:
    """The run of a kind, with checkpoints on the way; made when it is first asked for."""

    @functools.cache
    def run(name: str) -> Any:
        if "-" in name and not is_ours:
            pytest.skip("the original package compiles its optimizer for the CPU first")
        folder = tmp_path_factory.mktemp(f"stage{name}")
        return launch(
            *("trainer.py", folder, "--deepspeed", written(folder, name)),
            *("--steps", str(STEPS), "--save-at", str(SAVE_AT)),
            launcher=LAUNCHERS.get(name, "torchrun") if is_ours else "torchrun",
        )

    return run


@pytest.mark.parametrize("name", ZERO)
def test_trains_and_evaluates_as_plain_ddp(trained, ddp, name):
    job = trained(name)
    for rank in job.ranks:
        assert (rank["world"], rank["engine"], rank["micro_batch"]) == (2, "DeepSpeedEngine", 2)
        assert rank["engine_stage"] == int(name[0])
    assert job["train"] == pytest.approx(ddp["train"], abs=TOLERANCE)
    assert job["norms"] == pytest.approx(ddp["norms"], rel=1e-4)
    assert job["rates"] == ddp["rates"]
    assert job["evaluation"] == pytest.approx(ddp["evaluation"], abs=TOLERANCE)
    assert job["train"][-1] < job["train"][0] - 0.5


@pytest.mark.parametrize("name", RESUMED)
def test_resumes_from_a_checkpoint_of_the_trainer(trained, launch, is_ours, tmp_path, name):
    """At another stage, too; it loads the best model at the end, from a checkpoint of its own."""
    job = trained(name)
    config = written(tmp_path, RESUMED[name] if is_ours else name)
    again = launch(
        *("trainer.py", tmp_path, "--deepspeed", config, "--steps", str(STEPS)),
        *("--resume", str(job.folder / "trainer" / f"checkpoint-{SAVE_AT}")),
    )
    assert again["train"] == pytest.approx(job["train"][SAVE_AT:], abs=1e-6)
    assert again["rates"] == job["rates"][SAVE_AT:]


def test_resumes_on_another_number_of_ranks(trained, launch, is_ours, tmp_path):
    """Two ranks at stage 2, then one at stage 1, then two at stage 3, with the same batches."""
    if not is_ours:
        pytest.skip("the original package loads on as many ranks as saved")
    job = trained("2")
    checkpoint = job.folder / "trainer" / f"checkpoint-{SAVE_AT}"
    alone = launch(
        *("trainer.py", tmp_path / "one", "--deepspeed", written(tmp_path / "one", "1")),
        *("--steps", str(STEPS), "--save-at", str(SAVE_AT), "--resume", str(checkpoint)),
        *("--accumulation", "4"),
        ranks=1,
        options=ALONE,
    )
    assert alone["world"] == 1
    assert alone["train"] == pytest.approx(job["train"][SAVE_AT:], abs=1e-5)
    checkpoint = alone.folder / "trainer" / f"checkpoint-{2 * SAVE_AT}"
    both = launch(
        *("trainer.py", tmp_path / "two", "--deepspeed", written(tmp_path / "two", "3")),
        *("--steps", str(STEPS), "--resume", str(checkpoint)),
    )
    assert both["world"] == 2
    assert both["train"] == pytest.approx(job["train"][2 * SAVE_AT :], abs=1e-5)
    assert both["evaluated"] == pytest.approx(job["evaluated"], abs=1e-5)


@pytest.mark.parametrize("name", [name for name in ZERO if name != "3-offload"])
def test_what_save_model_wrote_is_the_trained_model(trained, name):
    job = trained(name)
    assert job["loaded_loss"] == pytest.approx(job["evaluated"], abs=1e-5)


def test_a_model_that_may_not_be_gathered_is_saved_as_a_checkpoint(trained, by_hand):
    """`stage3_gather_16bit_weights_on_model_save` off: the script beside it makes the weights."""
    job = trained("3-offload")
    folder = job.folder / "model"
    assert not list(folder.glob("*.safetensors"))
    assert "use zero_to_fp32.py to recover weights" in job.output
    by_hand("zero_to_fp32.py", ".", "whole", "--safe_serialization", cwd=folder)
    found = load_file(folder / "whole" / "model.safetensors")
    gathered = load_file(trained("3").folder / "model" / "model.safetensors")
    assert found.keys() == gathered.keys()
    for name, value in gathered.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_each_checkpoint_has_a_script_for_its_weights(trained, by_hand, tmp_path):
    folder = trained("2").folder / "trainer" / f"checkpoint-{STEPS}"
    by_hand(folder / "zero_to_fp32.py", folder, tmp_path, cwd=tmp_path)
    found = torch.load(tmp_path / "pytorch_model.bin")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(found[name], value), name


def optimizer(is_ours: bool) -> dict[str, Any]:
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    # The original compiles another one first.
    return {"type": "AdamW", "params": params | ({} if is_ours else {"torch_adam": True})}


SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
        "warmup_type": "linear",
    },
}
#: Sections of a configuration, and the run of plain DDP that they equal.
SCHEDULES = {
    "neither": "plain",
    "optimizer": "plain optimizer",
    "scheduler": "plain schedule",
    "optimizer and scheduler": "plain optimizer and schedule",
}


@pytest.fixture(scope="module")
def scheduled(launch, is_ours, tmp_path_factory):
    """Runs with each of the sections, "auto" in them, and without deepspeed; in one program."""
    folder = tmp_path_factory.mktemp("schedules")
    sections = {"optimizer": optimizer(is_ours), "scheduler": SCHEDULER}
    configs = {
        name: {
            **AUTO,
            "zero_optimization": ZERO["2"],
            **{key: value for key, value in sections.items() if key in name},
        }
        for name in SCHEDULES
    }
    path = folder / "configs.json"
    path.write_text(json.dumps(configs))
    return launch("schedules.py", folder, "--configs", str(path))


@pytest.mark.parametrize("name", SCHEDULES)
def test_optimizer_and_schedule_of_the_configuration_follow_the_arguments(scheduled, name):
    found, expected = scheduled[name], scheduled[SCHEDULES[name]]
    assert (found["engine"], expected["engine"]) == ("DeepSpeedEngine", "DistributedDataParallel")
    assert found["train"] == pytest.approx(expected["train"], abs=TOLERANCE)
    assert found["train"][-1] < found["train"][0] - 0.3
    # Where the engine steps the schedule, the Trainer logs the rate of the step to come.
    ahead = int(name != "neither")
    assert found["rates"][: STEPS - ahead] == pytest.approx(expected["rates"][ahead:])


def test_schedules_of_the_configuration_are_their_own(scheduled):
    """So that the test above compares different things: one group, and a step late."""
    runs = [scheduled[name]["train"] for name in SCHEDULES.values()]
    for i, run in enumerate(runs):
        for other in runs[:i]:
            assert run != pytest.approx(other, abs=5 * TOLERANCE)


def test_smaller_batches_are_tried_until_memory_suffices(scheduled):
    """`auto_find_batch_size`: one engine after another on the same model."""
    for stage in (1, 2):
        found = scheduled[f"found {stage}"]
        assert found["batch"] == scheduled["found plain"]["batch"] == 2
        assert found["train"] == pytest.approx(scheduled["found plain"]["train"], abs=TOLERANCE)


#: Each contradicts what the program passes to TrainingArguments.
WRONG = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 7,
    "train_batch_size": 42,
    "gradient_clipping": 2.5,
    "fp16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.1, 0.2], "eps": 1e-3}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.25, "warmup_num_steps": 99}},
    "zero_optimization": ZERO["3"],
}


@pytest.fixture(scope="module")
def inference(launch, trained, tmp_path_factory):
    """What a saved model says without training at stage 3, and errors."""
    folder = tmp_path_factory.mktemp("inference")
    configs = {"right": {**AUTO, "zero_optimization": ZERO["3"]}, "wrong": WRONG}
    path = folder / "configs.json"
    path.write_text(json.dumps(configs))
    model = str(trained("3").folder / "model")
    return launch("inference.py", folder, "--configs", str(path), "--model", model)


def test_from_pretrained_at_stage_3_fills_shards(inference):
    for rank in inference.ranks:
        assert rank["partitioned"]
        assert rank["model_bytes"] < 0.6 * rank["full_bytes"]


def test_evaluates_and_predicts_at_stage_3_without_an_optimizer(inference, trained):
    expected = trained("3")["evaluated"]
    assert inference["engine"] == "DeepSpeedEngine"
    assert inference["evaluated"] == pytest.approx(expected, abs=1e-5)
    assert inference["predicted_loss"] == pytest.approx(expected, abs=1e-5)
    assert inference["largest_difference"] < 1e-4


def test_generates_at_stage_3_as_one_process_does(inference):
    """Although one rank wants fewer tokens than the other."""
    for rank, length in zip(inference.ranks, (8 + 12, 9 + 4), strict=True):
        assert rank["generated"] == rank["generated_by_engine"] == rank["expected"]
        assert len(rank["generated"][0]) == length


def test_values_that_contradict_the_arguments_are_refused(inference):
    for rank in inference.ranks:
        error = rank["mismatch"]
        assert error.startswith("ValueError: Please correct the following DeepSpeed config values")
        for line in (
            *("train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=2",),
            *("gradient_accumulation_steps=7 vs", "train_batch_size=42 vs"),
            *("gradient_clipping=2.5 vs hf max_grad_norm=0.5", "fp16.enabled=True vs"),
            *("optimizer.params.lr=0.5 vs", "optimizer.params.betas=[0.1, 0.2] vs"),
            *("optimizer.params.eps=0.001 vs", "scheduler.params.warmup_max_lr=0.25 vs"),
            "scheduler.params.warmup_num_steps=99 vs",
        ):
            assert f"- ds {line}" in error


def test_what_transformers_refuses_it_refuses_in_its_own_words(inference):
    for rank in inference.ranks:
        assert "ZeRO inference only makes sense with ZeRO Stage 3" in rank["stage 2"]
        assert "Can't find a valid checkpoint at" in rank["empty"]
        assert "[deepspeed] failed to resume from checkpoint" in rank["no latest"]


@pytest.mark.parametrize("name", ["2", "3"])
def test_smollm2_learns_as_under_plain_ddp(launch, smollm2, smollm2_ddp, tmp_path, name):
    config = written(tmp_path, name)
    job = launch(
        *("trainer.py", tmp_path / "ds", "--deepspeed", config, "--model", str(smollm2)),
        *SMOLLM2,
    )
    assert job["train"] == pytest.approx(smollm2_ddp["train"], abs=TOLERANCE)
    assert job["evaluated"] == pytest.approx(smollm2_ddp["evaluated"], abs=TOLERANCE)
    # Real weights: they know English and Python before the first step.
    assert job["train"][0] < 3.5
    for number, rank in enumerate(job.ranks):
        assert rank["partitioned"] == (name == "3")
        assert rank["model_bytes"] / rank["full_bytes"] < (0.6 if name == "3" else 1.1)
        # Beside what stays there is never a whole model in memory, but for the file, which
        # transformers itself maps on rank 0.
        passing = rank["peak_bytes"] - rank["model_bytes"]
        assert name == "2" or passing < (0.85 + (number == 0)) * rank["full_bytes"]


SMOLLM2 = ("--steps", "3", "--batch", "1", "--length", "48", "--lr", "1e-4", "--warmup", "0")


@pytest.fixture(scope="module")
def smollm2_ddp(launch, smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2-ddp")
    return launch("trainer.py", folder, "--model", str(smollm2), *SMOLLM2)
