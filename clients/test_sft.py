"""trl and peft: SFTTrainer with LoRA on two ranks; only the adapter is saved."""

from __future__ import annotations

import json
from pathlib import Path

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
SAVE_AT = 2


@pytest.fixture(scope="module")
def base(by_hand, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    by_hand(Path(__file__).with_name("jobs") / "llama.py", folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def ddp(launch, base, tmp_path_factory):
    return launch("finetune.py", tmp_path_factory.mktemp("ddp"), "--base", str(base))


@pytest.fixture(scope="module", params=ZERO)
def tuned(request, launch, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"stage{request.param}")
    path = folder / "ds_config.json"
    path.write_text(json.dumps({**CONFIG, "zero_optimization": ZERO[request.param]}))
    return launch("finetune.py", folder, "--base", str(base), "--deepspeed", str(path))


def test_lora_learns_as_under_ddp_and_saves_the_adapter_only(tuned, ddp):
    assert [rank["engine"] for rank in tuned.ranks] == ["DeepSpeedEngine"] * 2
    assert tuned["train"] == pytest.approx(ddp["train"], abs=1e-4)
    assert tuned["evaluated"] == pytest.approx(ddp["evaluated"], abs=1e-4)
    assert tuned["trained"] == ddp["trained"]
    files = {each.name: each.stat().st_size for each in (tuned.folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert "model.safetensors" not in files
    # float32 values of the trained parameters and a header; the base model has far more.
    assert files["adapter_model.safetensors"] < 4 * tuned["trained"] + 8192
    assert tuned["largest_b"] > 1e-3
    for key in ("adapter_sum", "loaded_loss"):
        assert tuned[key] == pytest.approx(ddp[key], rel=1e-3)


def test_the_adapter_on_the_base_is_the_trained_model(tuned):
    assert tuned["loaded_loss"] == pytest.approx(tuned["evaluated"], abs=1e-4)
    assert tuned["loaded_loss"] < tuned["base_loss"] - 0.01
    assert tuned["generated"] == tuned["loaded_generated"]


def test_generation_of_trl_leaves_the_engine_as_it_was(tuned):
    assert tuned["evaluated_again"] == tuned["evaluated"]
    assert tuned["reference_loss"] == pytest.approx(tuned["base_loss"], abs=1e-5)


def test_a_checkpoint_has_the_adapter_alone_and_the_run_goes_on(tuned, launch, base, tmp_path):
    """At stage 3, where the adapter is loaded on a sharded base besides."""
    config = json.loads((tuned.folder / "ds_config.json").read_text())
    if config["zero_optimization"]["stage"] != 3:
        pytest.skip("the same code as at stage 3")
    checkpoint = tuned.folder / "trainer" / f"checkpoint-{SAVE_AT}"
    saved = sum(path.stat().st_size for path in checkpoint.glob("global_step*/**/*"))
    assert saved < (base / "model.safetensors").stat().st_size / 2
    again = launch(
        *("finetune.py", tmp_path, "--base", str(base)),
        *("--deepspeed", str(tuned.folder / "ds_config.json"), "--resume", str(checkpoint)),
        *("--adapter", str(tuned.folder / "adapter")),
    )
    assert again["train"][-(4 - SAVE_AT) :] == pytest.approx(tuned["train"][SAVE_AT:], abs=1e-6)
    for rank in again.ranks:
        assert rank["sharded_base"]
        assert rank["sharded_loss"] == pytest.approx(tuned["evaluated"], abs=1e-4)
        assert rank["sharded_generated"] == tuned["generated"]
        assert rank["difference"] < 1e-4
