"""accelerate: one program under plain DDP and under `accelerate launch --use_deepspeed`."""

from __future__ import annotations

import pytest

TOLERANCE = 1e-5
#: The keys of the model; the tied pair twice, as `state_dict` has it.
KEYS = ["first.bias", "first.weight", "last.bias", "last.weight", "middle.weight", "offset"]
KEYS.append("twin.weight")


@pytest.fixture(scope="module")
def ddp(launch, tmp_path_factory):
    """The same program, plain DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    return launch("accelerated.py", folder, "--cpu")


def options_of(stage: int) -> tuple[str, ...]:
    gather = ("--zero3_save_16bit_model", "true") if stage == 3 else ()
    clip = ("--gradient_clipping", "0.5")
    return ("--use_deepspeed", "--zero_stage", str(stage), *clip, *gather)


@pytest.fixture(scope="module", params=[0, 1, 2, 3], ids=lambda stage: f"stage{stage}")
def launched(request, launch, tmp_path_factory):
    """(stage, job) of `accelerate launch --use_deepspeed`; the program itself does not say so."""
    stage = request.param
    folder = tmp_path_factory.mktemp(f"stage{stage}")
    options = options_of(stage)
    return stage, launch("accelerated.py", folder, launcher="accelerate", options=options)


def test_launch_starts_ranks_and_prepare_returns_the_wrappers(launched):
    _, job = launched
    for rank in job.ranks:
        assert (rank["world"], rank["kind"], rank["backend"]) == (2, "DEEPSPEED", "gloo")
        assert rank["wrappers"] == [
            "DeepSpeedEngine",
            "DeepSpeedOptimizerWrapper",
            "DataLoaderShard",
            # One of the program's own, not of the configuration.
            "AcceleratedScheduler",
        ]
        assert rank["is_model"]
        assert rank["prints_every"] == "inf"
        assert rank["config"] == {"train_micro_batch_size_per_gpu": 4}
        assert rank["groups"] == 1


def test_the_timeout_reaches_the_process_group(launched):
    _, job = launched
    assert job["timeout_s"] == 123


def test_losses_and_norms_are_those_of_ddp(launched, ddp):
    _, job = launched
    assert job["losses"] == pytest.approx(ddp["losses"], abs=TOLERANCE)
    assert job["norms"] == pytest.approx(ddp["norms"], rel=1e-4)
    assert job["rates"] == pytest.approx(ddp["rates"])
    assert job["synced"][:4] == [False, True, False, True]
    assert job["skipped"] is False


def test_clipping_by_value_is_refused(launched):
    _, job = launched
    assert "clip_grad_value_" in job["clip_value"]


def test_save_state_and_load_state(launched):
    _, job = launched
    first, again = job["again"]
    assert again == pytest.approx(first, abs=1e-6)
    # The folder is the tag that accelerate names, and `latest` tells of it.
    assert any(name.startswith("pytorch_model/") for name in job["saved"])
    assert "latest" in job["saved"]


def test_get_state_dict_is_the_whole_model(launched):
    _, job = launched
    assert job["keys"] == KEYS
    assert job["difference"] < 1e-5


def test_free_memory_destroys_the_engine(launched):
    _, job = launched
    assert all(rank["freed"] for rank in job.ranks)
