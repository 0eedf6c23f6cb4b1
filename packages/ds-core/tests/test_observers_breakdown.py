"""Time and memory by phase, NVTX ranges, and where a breakdown is shown."""

from __future__ import annotations

import io
import json
import time

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import DsError
from ds_core.observers import MemoryByPhase, Metrics, NvtxRanges, Progress, Throughput
from ds_core.observers.memory import peak_resident_bytes, resident_bytes

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


class Net(nn.Module):
    def __init__(self, pause_s=0.0):
        super().__init__()
        self.linear, self.pause_s = nn.Linear(3, 1), pause_s

    def forward(self, x):
        time.sleep(self.pause_s)
        return self.linear(x).square().mean()


class Kept:
    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def close(self):
        pass


def make(*observers, pause_s=0.0, **changes):
    return ds_core.initialize(Net(pause_s), {**CONFIG, **changes}, observers=observers)


def step(engine):
    engine.train_batch(iter([torch.ones(4, 3)] * engine.accumulation))


def last_of(sink):
    return dict(sink.records[-1].values)


def test_time_goes_to_the_phase_that_took_it():
    sink = Kept()
    engine = make(Metrics([sink], throughput=Throughput(breakdown=True)), pause_s=0.05)
    step(engine)
    figures = last_of(sink)
    assert figures["forward_s"] >= 0.05
    assert figures["step_s"] >= figures["forward_s"]


def test_loading_between_micro_batches_is_time_for_data():
    def slow():
        while True:
            time.sleep(0.05)
            yield torch.ones(4, 3)

    sink = Kept()
    metrics = Metrics([sink], throughput=Throughput(breakdown=True))
    engine = make(metrics, gradient_accumulation_steps=2)
    engine.train_batch(slow())
    assert last_of(sink)["data_s"] >= 0.1


def test_a_checkpoint_is_no_part_of_a_step(tmp_path):
    sink = Kept()
    engine = make(Metrics([sink]))
    step(engine)
    time.sleep(0.3)
    engine.save_checkpoint(tmp_path)
    begin = time.perf_counter()
    step(engine)
    # With the checkpoint it would be longer by the pause and by the time that saving took.
    assert last_of(sink)["step_s"] < 0.3 + time.perf_counter() - begin


def test_after_loading_steps_are_counted_from_there(tmp_path):
    engine = make()
    for _ in range(5):
        step(engine)
    engine.save_checkpoint(tmp_path)
    sink = Kept()
    resumed = make(Metrics([sink], throughput=Throughput()), pause_s=0.05)
    resumed.load_checkpoint(tmp_path)
    step(resumed)
    assert sink.records[-1].step == 6
    assert last_of(sink)["step_s"] >= 0.05, "one step, not six"


def test_throughput_can_be_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    engine = make(metrics={"jsonl": str(path)}, timers={"throughput": {"enabled": False}})
    step(engine)
    line = json.loads(path.read_text().splitlines()[-1])
    assert "step_s" not in line
    assert "sent_bytes_per_step" in line


@pytest.mark.parametrize("key", ["wall_clock_breakdown", "memory_breakdown"])
def test_a_breakdown_that_nobody_shows_turns_progress_on(key, capsys):
    step(make(**{key: True}, steps_per_print=1))
    assert ("forward" in capsys.readouterr().err) is True


def test_a_breakdown_is_not_shown_if_progress_is_refused(capsys):
    step(make(wall_clock_breakdown=True, steps_per_print=1, progress=False))
    assert capsys.readouterr().err == ""


def test_memory_is_recorded_by_phase(tmp_path):
    path = tmp_path / "m.jsonl"
    engine = make(metrics={"jsonl": str(path)}, memory_breakdown=True)
    step(engine)
    line = json.loads(path.read_text().splitlines()[-1])
    for phase in ("forward", "backward", "norm", "update"):
        assert line[f"memory_{phase}_bytes"] > 2**20
    assert line["memory_peak_bytes"] > 2**20
    assert line["model_parameters_bytes"] == 16


def test_memory_of_a_process_follows_what_it_allocates():
    before = resident_bytes()
    kept = torch.ones(2**24)
    assert resident_bytes() - before >= 0.5 * kept.nbytes  # others may shrink meanwhile
    assert peak_resident_bytes() >= kept.nbytes


def test_progress_shows_memory():
    stream, memory = io.StringIO(), MemoryByPhase()
    engine = make(memory, Progress(every_steps=1, stream=stream, memory=memory))
    step(engine)
    line = stream.getvalue().splitlines()[-1]
    assert "memory after forward" in line
    assert "peak" in line


@pytest.fixture
def nvtx(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("<"))
    return calls


def test_nvtx_ranges_nest(nvtx):
    step(make(nvtx={"enabled": True}))
    text = " ".join(nvtx)
    assert text == "step 0 forward < backward < norm < update < <"


def test_nvtx_ranges_close_after_a_step_that_failed(nvtx):
    engine = make(NvtxRanges())
    engine(torch.ones(4, 3))
    with pytest.raises(RuntimeError):
        engine(torch.ones(4, 7))
    step(engine)
    engine.close()
    assert sum(call == "<" for call in nvtx) == sum(call != "<" for call in nvtx)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has NVTX")
def test_nvtx_without_cuda_is_an_error_that_says_what_else_there_is():
    with pytest.raises(DsError, match=r'nvtx.enabled: .* has no NVTX .*"trace"'):
        make(nvtx={"enabled": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_device_is_the_allocators():
    sink, memory = Kept(), MemoryByPhase()
    engine = make(memory, Metrics([sink], memory=memory))
    step(engine)
    figures = last_of(sink)
    assert figures["memory_forward_peak_bytes"] >= figures["memory_forward_bytes"] > 0
    assert figures["memory_reserved_bytes"] >= figures["memory_peak_bytes"]
    assert figures["memory_retries"] == 0
