"""Who watches a run: the order of events, the file of metrics, and the progress line."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import DsError
from ds_core.observers import JsonLines, Progress
from ds_core.seams import EventKind
from ds_core.testing import run_ranks

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


MICRO_BATCH = ["forward_begin", "forward", "backward_begin", "backward"]
#: The events of a step of two micro-batches.
STEP = ["step_begin", *MICRO_BATCH, *MICRO_BATCH, "update_begin", "reduced", "step_end"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x).square().mean()


class Log:
    def __init__(self):
        self.events = []

    def on_event(self, engine, event):
        self.events.append(event)

    def kinds(self):
        return [event.kind.value for event in self.events]


def make(*observers, **changes):
    torch.manual_seed(0)
    return ds_core.initialize(Net(), {**CONFIG, **changes}, observers=observers)


def batches(count=2):
    return iter([torch.ones(4, 3)] * count)


def test_events_come_in_order():
    log = Log()
    engine = make(log)
    engine.train_batch(batches())
    engine.close()
    assert log.kinds() == ["start", *STEP, "close"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_plain_backward_is_an_event_too(dtype):
    log = Log()
    engine = make(log, fp16={"enabled": dtype == "fp16", "initial_scale_power": 4})
    for _ in range(2):
        x = torch.ones(4, 3, dtype=torch.float16 if dtype == "fp16" else torch.float32)
        engine(x).backward()
        engine.step()
    assert log.kinds() == ["start", *STEP]


def gradients_at_the_end_of_a_plain_backward():
    seen = []

    class Look:
        def on_event(self, engine, event):
            if event.kind is EventKind.BACKWARD:
                seen.append(float(engine.sharding.grad_norm()))

    engine = make(Look(), gradient_accumulation_steps=1)
    engine(torch.full((4, 3), 1.0 + dist.get_rank())).backward()
    return seen


def test_a_plain_backward_has_ended_when_gradients_are_averaged():
    first, second = run_ranks(2, gradients_at_the_end_of_a_plain_backward)
    assert first == second
    assert len(first) == 1


def test_figures_of_ones_own_are_an_event():
    log = Log()
    engine = make(log)
    engine.log({"Eval/loss": 0.5, "kind": torch.tensor(2.0)})
    assert log.events[-1].kind is EventKind.LOG
    assert dict(log.events[-1].values) == {"Eval/loss": 0.5, "kind": torch.tensor(2.0)}


def test_events_carry_the_figures_of_the_step():
    log = Log()
    engine = make(log)
    loss = engine.train_batch(batches())
    start, end = log.events[0], log.events[-1]
    assert start.values["batch"] == "8 = 4 per micro-batch x 2 accumulated x 1 ranks"
    assert {"ranks", "device", "precision", "sharding", "optimizer"} <= set(start.values)
    assert start.values["trained parameters"] == "4"
    assert float(end.values["loss"]) == pytest.approx(float(loss))
    assert end.values["lr"] == 0.1
    assert end.values["grad_norm"] == engine.grad_norm
    assert end.values["skipped"] is False
    assert [event.step for event in log.events] == [0] * len(STEP) + [1]


def test_checkpoints_are_events(tmp_path):
    log = Log()
    engine = make(log)
    engine.save_checkpoint(tmp_path)
    engine.load_checkpoint(tmp_path)
    events = [event for event in log.events if event.kind is EventKind.CHECKPOINT]
    assert [event.values["action"] for event in events] == ["saved", "loaded"]
    assert {event.values["path"] for event in events} == {str(tmp_path / "step0")}


def test_evaluation_is_no_event():
    log = Log()
    engine = make(log)
    engine.eval()
    engine(torch.ones(4, 3))
    with torch.no_grad():
        engine.train()
        engine(torch.ones(4, 3))
    assert log.kinds() == ["start"]


def test_observers_are_called_in_the_order_given():
    order = []

    class Named:
        def __init__(self, name):
            self.name = name

        def on_event(self, engine, event):
            order.append(self.name)

    make(Named("first"), Named("second"))
    assert order == ["first", "second"]


# ---------------------------------------------------------------------------- JSON lines


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_start_steps_and_checkpoints(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    engine = make(metrics={"jsonl": str(path)})
    for _ in range(2):
        engine.train_batch(batches())
    engine.save_checkpoint(tmp_path / "checkpoints")
    lines = lines_of(path)
    assert [line["event"] for line in lines] == ["start", "step_end", "step_end", "checkpoint"]
    step = lines[1]
    assert step["step"] == 1
    assert {"loss", "lr", "grad_norm", "skipped", "step_s", "samples_per_s"} <= set(step)
    assert step["sent_bytes_per_step"] == 0
    assert step["memory_bytes"] == 2 * 4 * 4
    assert step["samples_per_s"] == pytest.approx(8 / step["step_s"])


def test_json_lines_append_to_a_file_that_exists(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        engine = make(metrics={"jsonl": str(path)})
        engine.train_batch(batches())
        engine.close()
    assert [line["step"] for line in lines_of(path)] == [0, 1, 0, 1]


def test_what_is_not_finite_stays_readable_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fp16 = {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}

    class Half(Net):
        def forward(self, x):
            return self.linear(x.half()).square().mean().float()

    engine = ds_core.initialize(Half(), {**CONFIG, "fp16": fp16, "metrics": {"jsonl": str(path)}})
    engine.train_batch(batches())
    step = lines_of(path)[-1]
    assert step["skipped"] is True
    assert step["grad_norm"] in ("inf", "nan")
    assert step["loss_scale"] == 2**30


def test_a_dropped_engine_closes_its_file(tmp_path):
    engine = make(metrics={"jsonl": str(tmp_path / "metrics.jsonl")})
    engine.train_batch(batches())
    del engine  # a file left open would be a warning, and warnings are errors here


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(DsError, match=rf"metrics.jsonl: cannot write '{tmp_path}'"):
        JsonLines(tmp_path)


@pytest.mark.parametrize("breakdown", [True, False])
def test_phases_are_timed_if_asked(tmp_path, breakdown):
    path = tmp_path / "metrics.jsonl"
    engine = make(metrics={"jsonl": str(path)}, wall_clock_breakdown=breakdown)
    engine.train_batch(batches())
    step = lines_of(path)[-1]
    phases = {"data_s", "forward_s", "backward_s", "norm_s", "update_s"}
    assert (phases <= set(step)) == breakdown
    if breakdown:
        total = sum(step[phase] for phase in (*phases, "loss_s", "other_s"))
        assert total == pytest.approx(step["step_s"], rel=0.5)


def write_from_every_rank(path):
    engine = make(metrics={"jsonl": path})
    engine.train_batch(batches())
    engine.close()


def test_only_rank_0_writes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    run_ranks(2, write_from_every_rank, str(path))
    lines = lines_of(path)
    assert [line["event"] for line in lines] == ["start", "step_end"]
    assert lines[1]["sent_bytes_per_step"] > 0


# ---------------------------------------------------------------------------- progress


def test_progress_tells_decisions_then_steps(tmp_path):
    stream = io.StringIO()
    engine = make(Progress(every_steps=2, stream=stream))
    for _ in range(4):
        engine.train_batch(batches())
    engine.save_checkpoint(tmp_path)
    text = stream.getvalue()
    assert re.search("^batch +8 = 4 per micro-batch x 2 accumulated x 1 ranks$", text, re.M)
    assert re.search("^model state per rank +parameters 16 B, gradients 16 B", text, re.M)
    assert re.findall(r"^step (\d+)  loss \d+\.\d{4}  lr 1\.00e-01", text, re.M) == ["2", "4"]
    assert re.search(r"step 4 .*  [\d.]+ (us|ms|s)/step  [\d.,]+ samples/s$", text, re.M)
    assert f"checkpoint saved: {tmp_path / 'step4'}" in text


def test_progress_of_other_ranks_is_silent():
    stream = io.StringIO()
    make(Progress(rank=1, every_steps=1, stream=stream)).train_batch(batches())
    assert stream.getvalue() == ""


def test_progress_speaks_now_and_then_if_no_interval_is_given(monkeypatch):
    monkeypatch.setattr("ds_core.observers.progress.SECONDS", 3600.0)
    stream = io.StringIO()
    engine = make(Progress(stream=stream))
    for _ in range(5):
        engine.train_batch(batches())
    assert stream.getvalue().count("loss") == 1


@pytest.mark.parametrize("sinks", [False, True], ids=["alone", "beside-a-file"])
def test_who_says_how_often_lines_come_sees_them(sinks, tmp_path, capsys):
    metrics = {"jsonl": str(tmp_path / "m.jsonl")} if sinks else {}
    engine = unasked(steps_per_print=2, metrics=metrics)
    for _ in range(4):
        engine.train_batch(batches())
    assert capsys.readouterr().err.count("loss") == 2


def unasked(**changes):
    """An engine whose config does not mention progress."""
    config = {key: value for key, value in CONFIG.items() if key != "progress"}
    return ds_core.initialize(Net(), {**config, **changes})


def test_progress_goes_to_standard_error(capsys):
    make(progress=True, steps_per_print=1).train_batch(batches())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 1  loss" in captured.err
