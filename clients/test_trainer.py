"""transformers: `Trainer(deepspeed=...)` learns as plain DDP does, saves, resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STEPS, SAVE_AT = 6, 3
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
    **ZERO["3"],
    "offload_optimizer": {"device": "cpu"},
    "offload_param": {"device": "cpu"},
}
#: One of them through the launcher of this repository.
LAUNCHERS = {"1": "ds"}


@pytest.fixture(scope="module")
def ddp(launch, tmp_path_factory):
    """Losses of the same program without deepspeed."""
    folder = tmp_path_factory.mktemp("ddp")
    return launch("trainer.py", folder, "--steps", str(STEPS), "--save-at", str(SAVE_AT))


def written(folder: Path, config: dict) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module", params=list(ZERO))
def trained(request, launch, is_ours, tmp_path_factory):
    """(name, job) of a run of each kind, with checkpoints at 3 and 6."""
    name = request.param
    if "offload" in name and not is_ours:
        pytest.skip("the original package compiles its optimizer for the CPU first")
    folder = tmp_path_factory.mktemp(f"stage{name}")
    config = written(folder, {**AUTO, "zero_optimization": ZERO[name]})
    job = launch(
        *("trainer.py", folder, "--deepspeed", config),
        *("--steps", str(STEPS), "--save-at", str(SAVE_AT)),
        launcher=LAUNCHERS.get(name, "torchrun") if is_ours else "torchrun",
    )
    return name, job


def test_trains_and_evaluates_as_plain_ddp(trained, ddp):
    name, job = trained
    for rank in job.ranks:
        assert (rank["world"], rank["engine"], rank["micro_batch"]) == (2, "DeepSpeedEngine", 2)
        assert rank["engine_stage"] == int(name[0])
    assert job["train"] == pytest.approx(ddp["train"], abs=TOLERANCE)
    assert job["norms"] == pytest.approx(ddp["norms"], rel=1e-4)
    assert job["rates"] == ddp["rates"]
    assert job["evaluation"] == pytest.approx(ddp["evaluation"], abs=TOLERANCE)
    assert job["train"][-1] < job["train"][0] - 0.5


def test_resumes_from_a_checkpoint_of_the_trainer(trained, launch, tmp_path):
    _, job = trained
    checkpoint = job.folder / "trainer" / f"checkpoint-{SAVE_AT}"
    again = launch(
        *("trainer.py", tmp_path, "--deepspeed", str(job.folder / "ds_config.json")),
        *("--steps", str(STEPS), "--resume", str(checkpoint)),
    )
    assert again["train"] == pytest.approx(job["train"][SAVE_AT:], abs=1e-6)
    assert again["rates"] == job["rates"][SAVE_AT:]


def test_what_save_model_wrote_loads_and_is_the_trained_model(trained, launch, tmp_path):
    """At stage 3, `from_pretrained` builds and fills shards: no rank holds the whole model."""
    name, job = trained
    if "offload" in name or name == "1":
        pytest.skip("the same code as without it")
    again = launch(
        *("trainer.py", tmp_path, "--deepspeed", str(job.folder / "ds_config.json")),
        *("--model", str(job.folder / "model"), "--steps", "1", "--lr", "0", "--warmup", "0"),
    )
    assert again["evaluated"] == pytest.approx(job["evaluated"], abs=1e-5)
    for rank in again.ranks:
        assert rank["partitioned"] == (name == "3")
        share = rank["model_bytes"] / rank["full_bytes"]
        assert (share < 0.6) if name == "3" else (0.99 < share < 1.1)


def test_optimizer_and_scheduler_of_the_configuration(launch, tmp_path):
    """With "auto" in them: they follow the Trainer's arguments."""
    config = {
        **AUTO,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
                "total_num_steps": "auto",
                "warmup_type": "linear",
            },
        },
        "zero_optimization": ZERO["2"],
    }
    job = launch("trainer.py", tmp_path / "ds", "--deepspeed", written(tmp_path, config))
    lr = 3e-3
    # The rate that the Trainer logs is the one of the step to come.
    assert max(job["rates"]) == pytest.approx(lr)
    assert job["rates"][-1] < lr / 2
    assert job["train"][-1] < job["train"][0] - 0.5


def test_a_value_that_contradicts_the_arguments_is_refused(launch, tmp_path):
    config = {**AUTO, "train_micro_batch_size_per_gpu": 3, "zero_optimization": ZERO["2"]}
    path = written(tmp_path, config)
    job = launch("trainer.py", tmp_path / "ds", "--deepspeed", path, fails=True)
    assert "train_micro_batch_size_per_gpu=3" in job.output


@pytest.mark.parametrize("name", ["2", "3"])
def test_smollm2_learns_as_under_plain_ddp(launch, smollm2, smollm2_ddp, tmp_path, name):
    config = written(tmp_path, {**AUTO, "zero_optimization": ZERO[name]})
    job = launch(
        *("trainer.py", tmp_path / "ds", "--deepspeed", config, "--model", str(smollm2)),
        *SMOLLM2,
    )
    assert job["train"] == pytest.approx(smollm2_ddp["train"], abs=TOLERANCE)
    assert job["evaluated"] == pytest.approx(smollm2_ddp["evaluated"], abs=TOLERANCE)
    # Real weights: they know English and Python before the first step.
    assert job["train"][0] < 3.5
    for rank in job.ranks:
        assert rank["partitioned"] == (name == "3")
        assert rank["model_bytes"] / rank["full_bytes"] < (0.6 if name == "3" else 1.1)


SMOLLM2 = ("--steps", "3", "--batch", "1", "--length", "48", "--lr", "1e-4", "--warmup", "0")


@pytest.fixture(scope="module")
def smollm2_ddp(launch, smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2-ddp")
    return launch("trainer.py", folder, "--model", str(smollm2), *SMOLLM2)
