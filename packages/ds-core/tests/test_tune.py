"""`ds_core.tuning`: spaces, what is never run, failures, results that survive an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

from ds_core.cli.tune_report import as_json, render
from ds_core.config import load
from ds_core.errors import ConfigError, PlanError, TuningError
from ds_core.planning import find_device
from ds_core.testing import run_ranks
from ds_core.tuning import Outcome, tune
from ds_core.tuning.space import Point, Space, default_space, micro_batches, parse_knob
from ds_core.tuning.trial import run as run_trial
from ds_core.tuning.trial_runner import TrialRunner, _outcome

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1000, 1000)

    def forward(self, x):
        return {"loss": self.linear(x).square().mean()}

def example(micro_batch_size):
    return Net(), torch.ones(micro_batch_size, 1000)

def model():
    return Net()
"""


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "tuned_model.py"
    path.write_text(MODEL)
    return f"{path}:example"


@pytest.fixture
def document(tmp_path):
    return {
        "train_batch_size": 16,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "autotuning": {
            "results_dir": str(tmp_path / "results"),
            "exps_dir": str(tmp_path / "trials"),
            "num_tuning_micro_batch_sizes": 9,
        },
    }


class Machine:
    """Stands for trials: larger micro-batches are faster, until 8; "fails" names one that fails."""

    def __init__(self, fails=()):
        self.fails, self.ran = fails, []

    def __call__(self, name, config, steps):
        micro = config["train_micro_batch_size_per_gpu"]
        self.ran.append(micro)
        if micro in self.fails:
            return Outcome(None, "out of memory: made up")
        return Outcome(1.0 / micro if micro <= 8 else 0.3)


def search(target, document, machine, **options):
    options.setdefault("max_runs", 5)
    return tune(target, document, runner=machine, space={"gradient_clipping": (1.0,)}, **options)


# ---------------------------------------------------------------------- searching


def test_the_best_config_is_found_and_written(target, document, tmp_path):
    result = search(target, document, Machine())
    assert result.best_point["train_micro_batch_size_per_gpu"] == 8
    assert result.best["gradient_accumulation_steps"] == 2
    assert result.samples_per_second == 16 * 8
    written = json.loads((tmp_path / "results" / "best_config.json").read_text())
    assert written == result.best
    assert load(written).train_batch_size == 16


def test_failures_are_recorded_with_their_reason(target, document):
    machine = Machine(fails=(8, 16))
    result = search(target, document, machine)
    assert result.best_point["train_micro_batch_size_per_gpu"] == 4
    reasons = {row.reason for row in result.records if row.step_s is None}
    assert reasons == {"out of memory: made up"}


def test_an_interrupted_search_goes_on_without_running_anything_twice(target, document):
    search(target, document, first := Machine())
    document["autotuning"]["overwrite"] = False
    result = search(target, document, again := Machine())
    assert first.ran
    assert again.ran == []
    assert result.best_point["train_micro_batch_size_per_gpu"] == 8


def test_results_of_another_search_are_not_taken_up(target, document):
    search(target, document, Machine())
    document["autotuning"]["overwrite"] = False
    document["train_batch_size"] = 32
    search(target, document, machine := Machine())
    assert machine.ran


def test_what_cannot_fit_is_never_run(target, document):
    # 8 MB of parameters and gradients, and 8 kB of activations per sample.
    small = find_device("cpu").with_overrides(memory_bytes=12_040_000)
    result = search(target, document, machine := Machine(), device=small)
    assert set(machine.ran) <= {1, 2, 4}
    assert "does not fit" in "".join(result.excluded.values())


def test_only_the_largest_micro_batches_are_tried(target, document):
    document["autotuning"]["num_tuning_micro_batch_sizes"] = 2
    result = search(target, document, machine := Machine())
    assert set(machine.ran) == {8, 16}
    assert len(result.excluded) == 3


@pytest.mark.parametrize("kind", ["gridsearch", "random"])
def test_other_strategies_run_every_point_once(target, document, kind):
    document["autotuning"] |= {"tuner_type": kind, "tuner_early_stopping": 0}
    search(target, document, machine := Machine(), max_runs=None)
    assert sorted(machine.ran) == [1, 2, 4, 8, 16]


def test_a_search_that_is_not_fast_runs_everything(target, document):
    document["autotuning"]["fast"] = False
    search(target, document, machine := Machine(), max_runs=None)
    assert sorted(machine.ran) == [1, 2, 4, 8, 16]


def test_the_metric_decides_what_is_best(target, document):
    del document["train_batch_size"]
    document["autotuning"] |= {"metric": "latency", "max_train_micro_batch_size_per_gpu": 16}
    document["gradient_accumulation_steps"] = 1

    def slower_when_larger(name, config, steps):
        return Outcome(0.1 + config["train_micro_batch_size_per_gpu"] / 1000)

    result = search(target, document, slower_when_larger)
    assert result.best_point["train_micro_batch_size_per_gpu"] == 1


def test_a_result_is_told_as_text_and_json(target, document):
    result = search(target, document, Machine(fails=(16,)))
    text = render(result, None)
    assert "out of memory: made up" in text
    assert "best: micro=8, gradient_clipping=1.0: 128.0 samples/s" in text
    assert json.loads(as_json(result, None))["best"] == result.best


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train_batch_size": 16, "nproc": 3}, TuningError, "no micro-batch from 1 to 1024"),
        ({"fails": (1, 2, 4, 8, 16)}, TuningError, "every one of 5 runs failed: out of memory"),
        ({"function": "model"}, PlanError, "returned a model only"),
        ({"max_runs": 0}, TuningError, "--max-runs: got 0"),
        ({"autotuning": {"metric": "speed"}}, ConfigError, 'autotuning.metric: got "speed"'),
    ],
    ids=["batch", "all-fail", "no-batch", "runs", "section"],
)
def test_a_search_that_cannot_be_done_says_why(target, document, change, error, message):
    machine = Machine(change.pop("fails", ()))
    options = {key: change.pop(key) for key in ("nproc", "max_runs") if key in change}
    where = target.replace(":example", f":{change.pop('function', 'example')}")
    with pytest.raises(error, match=message):
        search(where, {**document, **change}, machine, **options)


# ---------------------------------------------------------------------- space and section


def test_a_knob_without_effect_does_not_multiply_the_points():
    space = Space(
        {
            "zero_optimization.stage": (0, 3),
            "zero_optimization.stage3_prefetch_bucket_size": (5, 0),
        }
    )
    assert [point.key for point in space.points()] == [
        "stage=0",
        "stage=3, prefetch=5",
        "stage=3, prefetch=0",
    ]


def test_a_point_replaces_values_in_a_copy_of_the_config():
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "overlap_comm": True}}
    point = Point((("zero_optimization.stage", 2), ("train_micro_batch_size_per_gpu", 2)))
    changed = point.applied_to(config)
    assert changed["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert config["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("total", "ranks", "sizes"),
    [(16, 2, [1, 2, 4, 8]), (24, 1, [1, 2, 4, 8, 24]), (None, 4, [1, 2, 4, 8, 16, 32])],
)
def test_micro_batches_divide_a_ranks_share(total, ranks, sizes):
    data = {} if total is None else {"train_batch_size": total}
    assert micro_batches(data, ranks, least=1, most=32) == sizes


def test_one_rank_has_no_stages_to_choose_from():
    assert list(default_space({}, 1, [1, 2]).knobs) == ["train_micro_batch_size_per_gpu"]


def test_knobs_of_the_command_line_are_json_or_words():
    assert parse_knob("a.b=1,true,null,word") == ("a.b", [1, True, None, "word"])
    with pytest.raises(TuningError, match=r"--set: got 'a\.b', expected KEY=VALUE"):
        parse_knob("a.b")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"mp_size": 2}, "autotuning.mp_size: got 2, expected 1: ds-pipe"),
        ({"arg_mappings": {"a": "--a"}}, "handed over as a whole"),
        ({"metric_path": "m.json"}, "a trial measures itself"),
        ({"model_info": {"num_params": 1}}, "built without data and counted"),
        ({"start_profile_step": 5}, "must be above start_profile_step"),
        ({"tuner_typ": "random"}, "did you mean tuner_type"),
    ],
)
def test_keys_that_cannot_be_honoured_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        load({"train_batch_size": 1, "autotuning": section})


# ---------------------------------------------------------------------- trials


def test_a_trial_measures_steps(target):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    results = run_ranks(2, run_trial, target, config, 1, 3)
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert len(result["seconds"]) == 3
        assert result["memory"]["parameters"] == 4 * 1_001_000
    json.dumps(results)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("noise\nValueError: too large\nlogs are in /x\n", "exit code 1: ValueError: too large"),
        ("only noise\n", "exit code 1: only noise"),
        ("", "exit code 1: no output"),
    ],
)
def test_a_failed_trial_is_told_by_its_last_error(tmp_path, stderr, reason):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    assert _outcome(tmp_path / "result.json", done) == Outcome(None, reason)


def test_a_trial_that_ran_out_of_memory_says_so(tmp_path):
    (tmp_path / "result.json").write_text('{"failed": "out of memory: 80 GiB"}')
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="x")
    assert _outcome(tmp_path / "result.json", done).reason == "out of memory: 80 GiB"


def test_a_trial_leaves_its_task_and_output_behind(tmp_path, monkeypatch):
    def fake(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout="hello", stderr="")

    monkeypatch.setattr(subprocess, "run", fake)
    outcome = TrialRunner("m:f", 2, 1, tmp_path).run("000", {"a": 1}, 3)
    task = json.loads((tmp_path / "000" / "trial.json").read_text())
    assert task == {"target": "m:f", "config": {"a": 1}, "warmup": 1, "steps": 3}
    assert (tmp_path / "000" / "output.txt").read_text() == "hello"
    assert outcome.step_s is None


def test_a_trial_ends_with_a_search_that_is_killed(tmp_path):
    trial = "import sys; open('begun', 'w'); sys.stdin.read(); open('ended', 'w')"
    source = f"""
        import sys
        from ds_core.tuning.trial_runner import _run_tied
        _run_tied([sys.executable, "-c", {trial!r}])
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    search = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE)

    def wait_for(name):
        deadline = time.monotonic() + 60
        while not (tmp_path / name).exists():
            assert time.monotonic() < deadline, f"{name} did not happen in time"
            time.sleep(0.02)

    with search:
        try:
            wait_for("begun")
        finally:
            search.kill()
        wait_for("ended")


@pytest.mark.parametrize("shape", ["tensor", "mapping", "attribute", "tuple"])
def test_the_loss_is_found_in_what_a_model_returns(shape):
    from types import SimpleNamespace

    from ds_core.tuning.trial import _loss

    loss = torch.ones(())
    output = {
        "tensor": loss,
        "mapping": {"loss": loss, "logits": None},
        "attribute": SimpleNamespace(loss=loss),
        "tuple": (loss, None),
    }[shape]
    assert _loss(output) is loss
    with pytest.raises(TuningError, match="there is no loss"):
        _loss(nn.Linear(1, 1))
