"""Figures reach every sink under the names and on the axis that DeepSpeed's users know."""

from __future__ import annotations

import builtins
import csv
import json
import sys
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import DsError
from ds_core.observers import CsvFiles, JsonLines, Metrics, Record, TensorBoard
from ds_core.seams import EventKind
from ds_core.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x).square().mean()


class Kept:
    """A sink of one's own."""

    def __init__(self):
        self.records, self.closed = [], 0

    def write(self, record):
        self.records.append(record)

    def close(self):
        self.closed += 1


def make(*observers, **changes):
    torch.manual_seed(0)
    return ds_core.initialize(Net(), {**CONFIG, **changes}, observers=observers)


def train(engine, steps=2):
    for _ in range(steps):
        engine.train_batch(iter([torch.ones(4, 3)] * 2))
    return engine


def step_record(**values):
    return Record(EventKind.STEP_END, 1, 8, values)


# ---------------------------------------------------------------------------- records


def test_scalars_have_deepspeeds_names():
    record = step_record(loss=torch.tensor(2.0), lr=0.1, grad_norm=3.0, loss_scale=None, note="x")
    assert dict(record.scalars()) == {
        "Train/Samples/train_loss": 2.0,
        "Train/Samples/lr": pytest.approx(0.1),
        "Train/Samples/grad_norm": 3.0,
    }


def test_phases_have_deepspeeds_names_and_milliseconds():
    record = step_record(forward_s=0.25, backward_s=0.5, norm_s=0.125, update_s=0.125)
    scalars = dict(record.scalars())
    assert scalars["Train/Samples/elapsed_time_ms_forward"] == 250.0
    assert scalars["Train/Samples/elapsed_time_ms_backward"] == 500.0
    assert scalars["Train/Samples/elapsed_time_ms_step"] == 250.0


@pytest.mark.parametrize("kind", [EventKind.START, EventKind.CHECKPOINT])
def test_what_is_no_step_has_no_scalars(kind):
    assert list(Record(kind, 0, 0, {"seconds": 1.0}).scalars()) == []


def test_every_sink_gets_the_same_records():
    one, other = Kept(), Kept()
    engine = train(make(Metrics([one, other])))
    engine.log({"Eval/loss": 0.5})
    engine.close()
    assert one.records == other.records
    assert [record.kind.value for record in one.records] == ["start", "step_end", "step_end", "log"]
    assert [record.samples for record in one.records] == [0, 8, 16, 16]
    assert dict(one.records[-1].scalars()) == {"Eval/loss": 0.5}
    assert (one.closed, other.closed) == (1, 1)


def test_records_may_be_some_steps_apart():
    sink = Kept()
    train(make(Metrics([sink], every_steps=2)), steps=5)
    assert [record.step for record in sink.records] == [0, 2, 4]


# ---------------------------------------------------------------------------- files


def test_csv_files_hold_one_scalar_each(tmp_path):
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    train(make(csv_monitor=section)).close()
    with open(tmp_path / "job" / "Train_Samples_lr.csv", newline="") as file:
        assert list(csv.reader(file)) == [["step", "lr"], ["8", "0.1"], ["16", "0.1"]]
    assert (tmp_path / "job" / "Train_Samples_train_loss.csv").exists()


def test_csv_files_go_on_without_a_second_header(tmp_path):
    for value in (1.0, 2.0):
        sink = CsvFiles(tmp_path)
        sink.write(step_record(lr=value))
        sink.close()
    assert (tmp_path / "Train_Samples_lr.csv").read_text().split() == ["step,lr", "8,1.0", "8,2.0"]


@pytest.mark.parametrize("kind", [CsvFiles, TensorBoard])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, kind):
    (tmp_path / "file").write_text("")
    with pytest.raises(DsError, match=r"cannot write into .*output_path"):
        kind(tmp_path / "file")


def test_tensorboard_files_hold_every_scalar(tmp_path):
    pytest.importorskip("tensorboard", reason="needs ds-core[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    engine = train(make(tensorboard=section))
    engine.log({"Eval/loss": 0.5})
    engine.close()
    found = EventAccumulator(str(tmp_path / "job")).Reload()
    lrs = [(event.step, event.value) for event in found.Scalars("Train/Samples/lr")]
    assert lrs == [(8, pytest.approx(0.1)), (16, pytest.approx(0.1))]
    assert found.Scalars("Eval/loss")[0].value == 0.5
    assert {"Train/Samples/train_loss", "Train/Samples/grad_norm"} <= set(found.Tags()["scalars"])
    assert "**batch**: 8 = 4 per" in str(found.Tensors("decisions/text_summary"))


# ---------------------------------------------------------------------------- services


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in with the interface of the package that is used."""
    calls = []
    config = types.SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))
    run = types.SimpleNamespace(
        config=config,
        log=lambda scalars, step: calls.append(("log", scalars, step)),
        finish=lambda: calls.append(("finish",)),
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: calls.append(("init", options)) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_gets_decisions_and_scalars(wandb):
    train(make(wandb={"enabled": True, "team": "t", "group": "g"})).close()
    assert wandb[0] == ("init", {"project": "deepspeed", "group": "g", "entity": "t"})
    assert wandb[1][0] == "config"
    assert wandb[1][1]["device"].startswith("cpu")
    assert [(call[0], *call[2:]) for call in wandb[2:]] == [("log", 8), ("log", 16), ("finish",)]
    assert wandb[2][1]["Train/Samples/lr"] == 0.1


@pytest.fixture
def comet(monkeypatch):
    calls = []
    experiment = types.SimpleNamespace(
        set_name=lambda name: calls.append(("name", name)),
        log_parameters=lambda values: calls.append(("parameters", values)),
        log_metric=lambda name, value, step: calls.append((name, value, step)),
        end=lambda: calls.append(("end",)),
    )
    module = types.ModuleType("comet_ml")
    module.start = lambda **options: calls.append(("start", options)) or experiment
    monkeypatch.setitem(sys.modules, "comet_ml", module)
    return calls


def test_comet_gets_a_scalar_each_so_many_samples(comet):
    section = {"enabled": True, "samples_log_interval": 16, "experiment_name": "n", "online": False}
    train(make(comet=section), steps=4).close()
    assert comet[0][1]["online"] is False
    assert comet[1] == ("name", "n")
    assert [call[2] for call in comet if call[0] == "Train/Samples/lr"] == [8, 24]
    assert comet[-1] == ("end",)


@pytest.mark.parametrize(
    ("section", "module", "extra"),
    [
        ("tensorboard", "tensorboard", "tensorboard"),
        ("wandb", "wandb", "wandb"),
        ("comet", "comet_ml", "comet"),
    ],
)
def test_a_missing_package_is_an_error_at_the_start(monkeypatch, section, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DsError, match=rf"{section}.enabled: .*pip install 'ds-core\[{extra}\]'"):
        make(**{section: {"enabled": True}})


def test_sinks_that_are_open_are_closed_if_another_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    opened = []
    true_open = builtins.open

    def note(*args, **options):
        opened.append(true_open(*args, **options))
        return opened[-1]

    monkeypatch.setattr(builtins, "open", note)
    with pytest.raises(DsError):
        make(wandb={"enabled": True}, metrics={"jsonl": str(tmp_path / "m.jsonl")})
    assert all(file.closed for file in opened if file.name.endswith("m.jsonl"))


# ---------------------------------------------------------------------------- ranks


def log_loss(path, over_ranks):
    metrics = {"jsonl": path, "loss_over_ranks": over_ranks, "every_steps": 2}
    engine = make(metrics=metrics, gradient_accumulation_steps=1)
    before = engine.mesh.ledger.num_calls(caller="loss over ranks")
    mine = []
    for _ in range(2):
        loss = engine(torch.full((4, 3), 1.0 + dist.get_rank()))
        engine.backward(loss)
        engine.step()
        mine.append(float(loss))
    engine.close()
    return mine[-1], engine.mesh.ledger.num_calls(caller="loss over ranks") - before


@pytest.mark.parametrize("over_ranks", [True, False])
def test_the_loss_is_averaged_over_ranks_if_asked(tmp_path, over_ranks):
    path = tmp_path / "metrics.jsonl"
    (first, calls), (second, _) = run_ranks(2, log_loss, str(path), over_ranks)
    logged = json.loads(path.read_text().splitlines()[-1])["loss"]
    assert first != second
    assert logged == pytest.approx((first + second) / 2 if over_ranks else first)
    assert calls == (1 if over_ranks else 0), "only at the steps that are written"


def plain_loss_over_ranks(path):
    engine = make(metrics={"jsonl": path, "loss_over_ranks": True}, gradient_accumulation_steps=1)
    engine(torch.ones(4, 3)).backward()
    engine.step()
    engine.close()


def test_a_loss_that_no_rank_knows_stays_unknown(tmp_path):
    run_ranks(2, plain_loss_over_ranks, str(tmp_path / "m.jsonl"))
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_json_lines_are_a_sink(tmp_path):
    sink = JsonLines(tmp_path / "m.jsonl")
    sink.write(step_record(loss=torch.tensor(float("nan"))))
    sink.close()
    line = json.loads((tmp_path / "m.jsonl").read_text())
    assert line == {"event": "step_end", "step": 1, "samples": 8, "loss": "nan"}
