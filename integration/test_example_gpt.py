"""The GPT example as its users run it: every stage and number of ranks, resuming, bad input."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ds_core import config
from ds_core.errors import DsError
from ds_core.testing import run_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
GPT = EXAMPLES / "gpt"
CONFIGS = sorted(GPT.glob("*.json"))
TEXT = [argparse.__file__, inspect.__file__]
SMALL = ("--size", "tiny", "--seq-tokens", "32", "--vocab", "400")
QUICK = ("--steps", "6", "--eval-every", "3", "--eval-windows", "20", "--sample-tokens", "4")


def run_in_rank(arguments: list[str]) -> int:
    """`train.py ARGUMENTS` in this process; returns its exit code."""
    known = set(sys.modules)
    sys.path.insert(0, str(GPT))
    try:
        return int(importlib.import_module("train").main(arguments))
    finally:
        sys.path.remove(str(GPT))
        # Names such as `model` and `text` must not stay for the tests of others.
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GPT)):
                del sys.modules[name]


def train(num_ranks: int, out: Path, settings: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train on that many ranks; returns the lines of the run's metrics."""
    command = ["--out", str(out), "--config", str(settings), *arguments]
    codes = run_ranks(num_ranks, run_in_rank, command, initialized=False)
    assert codes == [0] * num_ranks
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def new_run(num_ranks: int, out: Path, settings: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train a new tiny model for six steps."""
    base = (*SMALL, "--data", *TEXT, *QUICK, "--save-every", "3")
    return train(num_ranks, out, settings, *base, *arguments)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    """Training and held-out losses in the order of their lines."""
    return [line.get("loss", line.get("heldout_nats_per_token")) for line in metrics]


def settings_file(folder: Path, *, stage: int, bf16: bool = False, accumulation: int = 1) -> Path:
    """The config of a stage as it is shipped, but for number format and accumulation."""
    content = json.loads((GPT / f"zero{stage}.json").read_text())
    content["bf16"]["enabled"] = bf16
    content["gradient_accumulation_steps"] = accumulation
    path = folder / f"zero{stage}-{bf16}-{accumulation}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds all runs, so that the text is tokenized once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> list[float]:
    """Losses of one process without ZeRO."""
    return losses(new_run(1, folder / "one-rank", settings_file(folder, stage=0)))


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the example, for the length of a test."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(GPT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GPT)):
            del sys.modules[name]


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "num_ranks"),
    [(0, 2), (1, 2), (2, 1), (2, 4), (3, 2), (3, 4)],
    ids=lambda n: str(n),
)
def test_losses_are_those_of_one_process(
    folder: Path, one_rank: list[float], stage: int, num_ranks: int
) -> None:
    out = folder / f"stage{stage}-ranks{num_ranks}"

    found = losses(new_run(num_ranks, out, settings_file(folder, stage=stage)))

    assert len(found) == 6 + 3  # steps, and evaluations at steps 0, 3 and 6
    assert found == pytest.approx(one_rank, abs=1e-4)
    assert found[-1] < found[0] - 0.02


def test_accumulation_does_not_change_the_losses(folder: Path, one_rank: list[float]) -> None:
    settings = settings_file(folder, stage=2, accumulation=2)

    found = losses(new_run(2, folder / "accumulation", settings))

    assert found == pytest.approx(one_rank, abs=1e-4)


def test_untied_recomputed_model_trains_in_bf16(folder: Path) -> None:
    settings = settings_file(folder, stage=3, bf16=True)

    found = losses(new_run(2, folder / "untied", settings, "--untied", "--recompute"))

    assert found[-1] < found[0] - 0.02


@pytest.mark.parametrize(
    ("stage", "bf16"),
    [(2, False), (3, True)],
    ids=["stage2-fp32", "stage3-bf16"],
)
def test_resumed_run_has_identical_losses(folder: Path, stage: int, bf16: bool) -> None:
    settings, out = settings_file(folder, stage=stage, bf16=bf16), folder / f"again-{stage}-{bf16}"
    whole = losses(new_run(2, out, settings))

    both = train(2, out, settings, "--resume", "step3", *QUICK)

    # Held-out loss at step 3 once more, steps 4 to 6, held-out loss at step 6.
    assert losses(both)[len(whole) :] == whole[4:]
    assert both[len(whole)]["step"] == 3
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_run_resumes_on_other_ranks_at_another_stage(folder: Path, one_rank: list[float]) -> None:
    out = folder / "moved"
    new_run(4, out, settings_file(folder, stage=3))

    both = train(2, out, settings_file(folder, stage=1), "--resume", "step3", *QUICK)

    assert losses(both)[-5:] == pytest.approx(one_rank[-5:], abs=1e-4)


# --- What it writes -------------------------------------------------------------------------------


def test_sample_continues_the_prompt_alike_every_time(
    folder: Path, one_rank: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--sample", "import os", "--out", str(folder / "one-rank")]
    command += ["--sample-tokens", "40"]

    told = []
    for _ in range(2):
        assert run_in_rank(command) == 0
        told.append(capsys.readouterr().out)

    assert told[0].startswith("import os")
    assert len(told[0]) > len("import os") + 40
    assert told[0] == told[1]


def test_metrics_tell_speed_and_bytes(folder: Path, one_rank: list[float]) -> None:
    metrics = new_run(2, folder / "metrics", settings_file(folder, stage=2))

    step = next(line for line in metrics if line["event"] == "step")

    parameters = 132_416  # half of 4 bytes to send, and half to send back
    assert step["sent_bytes"] == pytest.approx(4 * parameters, rel=0.01)
    assert step["tokens_per_s"] > 0
    assert {"loss", "lr", "grad_norm"} <= set(step)


def test_missing_matplotlib_leaves_the_run_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = folder / "no-matplotlib"

    code = run_in_rank(["--out", str(out), *SMALL, *QUICK, "--data", *TEXT, "--steps", "1"])

    assert code == 0
    assert "matplotlib is not installed (python -m pip install -r" in capsys.readouterr().out
    assert not (out / "loss.png").exists()


# --- Configs and sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 4], ids=lambda n: f"N{n}")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_has_the_same_global_batch(path: Path, num_ranks: int) -> None:
    loaded = config.load(path, world_size=num_ranks)

    reference = config.load(GPT / "zero2.json", world_size=1)
    assert loaded.train_batch_size == reference.train_batch_size
    assert loaded.optimizer == reference.optimizer
    assert loaded.scheduler == reference.scheduler


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_differ_in_nothing_else(stage: int) -> None:
    content = json.loads((GPT / f"zero{stage}.json").read_text())

    assert content.pop("zero_optimization") == {"stage": stage}
    other = json.loads((GPT / "zero2.json").read_text())
    del other["zero_optimization"]
    assert content == other


@pytest.mark.parametrize(
    ("name", "millions"),
    [("10m", 10), ("30m", 30), ("125m", 125), ("350m", 350), ("760m", 760), ("1.3b", 1300)],
)
def test_size_has_the_parameters_that_its_name_says(
    module: Any, name: str, millions: float
) -> None:
    model = module("model")

    with torch.device("meta"):
        gpt = model.GPT(model.SIZES[name], 4096, 128)

    assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(millions * 1e6, rel=0.05)


def test_prediction_does_not_see_the_future(module: Any) -> None:
    model = module("model")
    gpt = model.GPT(model.SIZES["tiny"], 300, 16)
    tokens = torch.randint(300, (2, 16))
    changed = tokens.clone()
    changed[:, 9:] = 7

    same = gpt(tokens)[:, :9], gpt(changed)[:, :9]

    torch.testing.assert_close(*same)


# --- Text -----------------------------------------------------------------------------------------


def test_end_of_each_file_is_held_out(module: Any, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 95 + name.upper() * 5)

    found = module("corpus").read([str(tmp_path)])

    assert sorted(found.train) == ["a" * 95, "b" * 95]
    assert sorted(found.heldout) == ["A" * 5, "B" * 5]
    assert "the last 5% of each" in found.summary


def test_cap_cuts_the_text_between_characters(module: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 1000, encoding="utf-8")

    found = module("corpus").read([str(tmp_path / "a.txt")], 101)

    assert "".join(found.train + found.heldout) == "é" * 50


def test_folder_tells_what_it_leaves_out(module: Any, tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("some text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / ".hidden").write_text("secret")

    found = module("corpus").read([str(tmp_path)])

    assert "".join(found.train + found.heldout) == "some text"
    assert "left out as not text: 1 (" in found.summary
    assert "picture.png" in found.summary


def test_tokens_are_the_same_every_time_and_give_the_text_back(module: Any, tmp_path: Path) -> None:
    text = module("text")
    corpus = module("corpus").read(TEXT)
    once, twice = tmp_path / "once", tmp_path / "twice"

    digests = [text.prepare(corpus, 400, cache) for cache in (once, twice)]

    names = ("tokenizer.json", "train.npy", "heldout.npy")
    first, second = (
        [(cache / f"text-{digests[0]}" / name).read_bytes() for name in names]
        for cache in (once, twice)
    )
    assert first == second
    tokens = text.load(once, digests[0])
    tokenizer = text.load_tokenizer(once / f"text-{digests[0]}")
    told = tokenizer.decode(tokens.train.tolist(), skip_special_tokens=False)
    assert told == "".join(part + text.END for part in corpus.train)
    assert tokens.bytes_of[tokens.train.tolist()].sum() == sum(
        len(part.encode()) for part in corpus.train
    )


def test_windows_tile_the_text_and_targets_follow(module: Any) -> None:
    import numpy as np

    windows = module("text").Windows(np.arange(10), 3, multiple_of=2)

    assert len(windows) == 2
    assert [part.tolist() for part in windows[1]] == [[3, 4, 5], [4, 5, 6]]


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.txt"], "--data: 'absent.txt' does not exist"),
        (["--data", "empty.txt"], "--data: 'empty.txt' is empty"),
        (["--data", "words.txt", "picture.png"], "--data: 'picture.png' is not UTF-8 text: byte"),
        (["--data", "zeros.txt"], "--data: 'zeros.txt' is not UTF-8 text: byte 0x00 at offset 3"),
        (["--data", "bare"], "--data: folder 'bare' has no text file that is not empty"),
        (["--data", "words.txt"], "the text is too short: a step needs 8 windows of 32 tokens"),
        (["--config", "absent.json"], "absent.json"),
        (["--config", "typo.json"], "zero_optimisation: unknown key; did you mean"),
        (["--resume"], "no run in"),
        (["--resume", "--out", "bare"], "'bare' holds no run"),
        (["--sample", "x", "--out", "bare"], "'bare' holds no run"),
        (["--out", "words.txt/run", "--data", *TEXT], "cannot write to"),
    ],
    ids=lambda value: "-".join(value[:2]).strip("-") if isinstance(value, list) else "",
)
def test_bad_input_is_told_without_a_traceback(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "words.txt").write_text("a few words")
    (tmp_path / "zeros.txt").write_bytes(b"abc\0def")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "typo.json").write_text('{"train_batch_size": 8, "zero_optimisation": {}}')

    code = run_in_rank([*SMALL, *arguments] if "--resume" not in arguments else arguments)

    told = capsys.readouterr().err
    assert code == 2
    assert told.startswith("error: ")
    assert message in told


def test_unreadable_file_is_named(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "private.txt"
    path.write_text("secret")
    monkeypatch.setattr(Path, "read_bytes", refuse)

    with pytest.raises(DsError, match=r"cannot read '.*private.txt': P"):
        module("corpus").read([str(path)])


def test_started_run_is_not_overwritten_and_keeps_its_model(
    folder: Path, one_rank: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(folder / "one-rank")

    assert run_in_rank(["--out", out]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run_in_rank(["--out", out, "--resume", "--size", "30m"]) == 2
    assert "--size: got '30m', but the run in" in capsys.readouterr().err
    assert run_in_rank(["--out", out, "--resume", "step5"]) == 2
    assert "step5" in capsys.readouterr().err


# --- From the command line ------------------------------------------------------------------------


def ds_run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ds")), "run", "--nproc", "2", *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False, timeout=120
    )


def test_command_of_the_readme_shows_what_a_user_wants_to_know(tmp_path: Path) -> None:
    options = (*SMALL, *QUICK, "--data", *TEXT, "--steps", "10")

    done = ds_run(str(GPT / "train.py"), *options, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    for fragment in (
        "precision: ", "sharding: ZeRO stage 2", "held out: the last 5% of each",
        "tokens/s", "MiB sent/step", "rank 1: ", "a sample, continuing", "bits/byte",
    ):  # fmt: skip
        assert fragment in done.stdout
    assert "Warning" not in done.stderr
    run = tmp_path / "runs" / "gpt-001"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "loss.png", "metrics.jsonl", "settings.json", "tokenizer.json",
    }  # fmt: skip


def test_command_ends_with_one_message_for_bad_input(tmp_path: Path) -> None:
    done = ds_run(str(GPT / "train.py"), "--data", "absent.txt", cwd=tmp_path)

    output = done.stdout + done.stderr
    assert done.returncode == 2
    assert output.count("error: --data: 'absent.txt' does not exist") == 1
    assert "Traceback" not in output


def run_plain_loop() -> None:
    runpy.run_path(str(EXAMPLES / "plain_loop.py"), run_name="__main__")


def test_plain_loop_learns_on_two_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(2, run_plain_loop, initialized=False)

    told = [line for line in capfd.readouterr().out.splitlines() if "loss" in line]
    loss = [float(line.split()[-1]) for line in told]
    assert len(loss) == 4
    assert loss[-1] < 0.05
    assert loss[-1] < loss[0]
