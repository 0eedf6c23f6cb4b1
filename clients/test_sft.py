"""trl and peft: SFTTrainer with LoRA on two ranks; only the adapter is saved."""

from __future__ import annotations

import json

import pytest

CONFIG = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
ZERO = {
    2: {"stage": 2},
    3: {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}


@pytest.fixture(scope="module")
def ddp(launch, tmp_path_factory):
    return launch("finetune.py", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_learns_as_under_ddp_and_saves_the_adapter_only(launch, ddp, tmp_path, stage):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({**CONFIG, "zero_optimization": ZERO[stage]}))
    job = launch("finetune.py", tmp_path / "run", "--deepspeed", str(path))
    assert [rank["engine"] for rank in job.ranks] == ["DeepSpeedEngine"] * 2
    assert job["train"] == pytest.approx(ddp["train"], abs=1e-4)
    assert job["trained"] == ddp["trained"]
    files = {each.name: each.stat().st_size for each in (tmp_path / "run" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert "model.safetensors" not in files
    # float32 values of the trained parameters and a header; the base model has far more.
    assert files["adapter_model.safetensors"] < 4 * job["trained"] + 8192
    assert job["largest_b"] > 1e-3
    for key in ("adapter_sum", "loaded_loss"):
        assert job[key] == pytest.approx(ddp[key], rel=1e-3)
