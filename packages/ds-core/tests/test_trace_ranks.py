"""Traces of real ranks: what is in them, on which clock, and what recording leaves alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ds_core
from ds_core import comm, tracing
from ds_core.errors import DsError
from ds_core.testing import run_ranks
from ds_core.tracing.clock import aligned_clock

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x))).square().mean()


def train(folder, steps=5, **section):
    torch.manual_seed(0)
    trace = {"enabled": True, "output_path": folder, "start_step": 2, "num_steps": 2, **section}
    engine = ds_core.initialize(Net(), {**CONFIG, "trace": trace})
    for _ in range(steps):
        engine.train_batch(iter([torch.ones(4, 64)]))
    sent = engine.mesh.ledger.rows()
    watched = len(engine.mesh.ledger.listeners)
    engine.close()
    return [p.detach().clone() for p in engine.module.parameters()], sent, watched


@pytest.mark.parametrize("ops", [True, False])
def test_a_window_of_steps_is_recorded_on_every_rank(tmp_path, ops):
    results = run_ranks(2, record_and_train, str(tmp_path), ops)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank0.json", "rank1.json", "trace.json",
    ]  # fmt: skip
    ranks = tracing.load_folder(tmp_path)
    for rank in ranks:
        steps = sorted(rank.on("step"), key=lambda each: each.begin_us)
        assert [each.name for each in steps] == ["step 3", "step 4"]
        phases = {each.name for each in rank.on("phase")}
        assert {"forward", "backward", "norm", "update"} <= phases
        assert any(each.name.startswith("all_reduce hidden") for each in rank.on("reduce"))
        assert any(each.name == "aten::tanh" for each in rank.on("compute")) == ops
        for each in rank.on("reduce"):
            assert steps[0].begin_us <= each.begin_us <= each.end_us
    assert [watched for _, _, watched in results] == [0, 0]


def record_and_train(folder, ops):
    return train(folder, ops=ops)


def test_ranks_stand_on_one_time_line(tmp_path):
    run_ranks(2, record_and_train, str(tmp_path), False)
    first, second = tracing.load_folder(tmp_path)
    # An average ends on no rank before it began on every rank.
    for mine, theirs in ((first, second), (second, first)):
        ends = [each.end_us for each in sorted(mine.on("reduce"), key=_begin)]
        begins = [each.begin_us for each in sorted(theirs.on("reduce"), key=_begin)]
        assert len(ends) == len(begins)
        assert all(begin < end for begin, end in zip(begins, ends, strict=True))


def _begin(each):
    return each.begin_us


def test_recording_changes_no_result_and_no_account(tmp_path):
    plain = run_ranks(2, train_plainly)
    traced = run_ranks(2, record_and_train, str(tmp_path), True)
    for (weights, sent), (weights_too, sent_too, _) in zip(plain, traced, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_too, strict=True))
        assert sent == sent_too


def train_plainly():
    weights, sent, _ = train("unused", enabled=False)
    return weights, sent


def test_a_new_recording_replaces_the_old_one(tmp_path):
    run_ranks(2, record_and_train, str(tmp_path), False)
    run_ranks(1, record_and_train, str(tmp_path), False)
    (only,) = tracing.load_folder(tmp_path)
    assert only.world_size == 1


def test_a_run_that_ends_in_the_window_writes_what_there_is(tmp_path):
    run_ranks(2, train_three_steps, str(tmp_path))
    for rank in tracing.load_folder(tmp_path):
        assert [each.name for each in rank.on("step")] == ["step 3"]


def train_three_steps(folder):
    train(folder, steps=3, ops=False)


def record_a_loop(folder):
    mesh = comm.Mesh.world()
    with tracing.record(mesh, folder, ops=False) as recorder, recorder.step(7):
        with recorder.phase("forward"):
            comm.all_reduce(torch.ones(8), mesh.group("dp"), caller="mine")
        comm.broadcast(torch.ones(8), mesh.group("dp"), caller="yours")


def test_a_loop_without_an_engine_is_recorded(tmp_path):
    run_ranks(2, record_a_loop, str(tmp_path))
    for rank in tracing.load_folder(tmp_path):
        assert {each.name for each in rank.slices if each.lane != "wait"} == {
            "step 7", "forward", "all_reduce mine", "broadcast yours",
        }  # fmt: skip
        (average,) = rank.on("reduce")
        assert average.details["sent bytes"] == 32
        assert average.details["group"] == "dp (2 ranks)"


def fail_in_a_loop(folder):
    mesh = comm.Mesh.world()
    with pytest.raises(KeyError), tracing.record(mesh, folder):
        raise KeyError("mine")
    with tracing.record(mesh, folder):
        pass
    return len(mesh.ledger.listeners)


def test_an_error_ends_a_recording_and_the_next_one_works(tmp_path):
    assert run_ranks(2, fail_in_a_loop, str(tmp_path)) == [0, 0]
    assert len(tracing.load_folder(tmp_path)) == 2


def write_where_one_rank_cannot(folder, unable):
    place = Path(folder) / "file" / "below" if dist.get_rank() == unable else folder
    recorder = tracing.Recorder(comm.Mesh.world(), place, ops=False)
    recorder.start()
    try:
        recorder.stop()
    except DsError as error:
        return str(error)
    return "written"


@pytest.mark.parametrize("unable", [0, 1])
def test_a_rank_that_cannot_write_does_not_keep_the_others_waiting(unable, tmp_path):
    (tmp_path / "file").touch()
    told = run_ranks(2, write_where_one_rank_cannot, str(tmp_path), unable, timeout_s=30)
    assert "cannot" in told[unable]
    assert told[1 - unable] == "written"


def start_twice(folder):
    recorder = tracing.Recorder(comm.Mesh.world(), folder, ops=False)
    recorder.start()
    with pytest.raises(DsError, match="has begun already"):
        recorder.start()
    recorder.stop()


def test_a_recording_cannot_begin_twice(tmp_path):
    run_ranks(1, start_twice, str(tmp_path))


def clocks_apart(on_two_machines):
    rank = dist.get_rank()
    skew = rank * 5_000_000_000
    machine = f"machine {rank}" if on_two_machines else "machine"
    group = comm.Mesh.world().group("dp")
    clock = aligned_clock(
        group,
        now=lambda: time.perf_counter_ns() + (skew if on_two_machines else 0),
        machine=machine,
    )
    return clock, skew


def test_clocks_of_two_machines_are_brought_together():
    (first, _), (second, skew) = run_ranks(2, clocks_apart, True)
    assert first.offset_ns == 0
    assert first.origin_ns == second.origin_ns
    # As well as ranks leave a barrier together, which on a loaded machine is not very well.
    assert abs(second.offset_ns + skew) < 1_000_000_000


def test_processes_of_one_machine_share_its_clock():
    (first, _), (second, _) = run_ranks(2, clocks_apart, False)
    assert (first.offset_ns, second.offset_ns) == (0, 0)


def test_the_merged_file_is_valid_for_viewers(tmp_path):
    run_ranks(2, record_and_train, str(tmp_path), True)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {}
    for event in events:
        assert event["ph"] in ("M", "X")
        if event["ph"] == "X":
            span = event["ts"], event["ts"] + event["dur"]
            rows.setdefault((event["pid"], event["tid"]), []).append(span)
    for spans in rows.values():
        assert nests(sorted(spans, key=lambda span: (span[0], -span[1])))


def nests(spans):
    """Slices of one thread lie within or beside one another, up to the files' nanosecond."""
    open_ends = []
    for begin, end in spans:
        while open_ends and open_ends[-1] <= begin + 0.002:
            open_ends.pop()
        if open_ends and end > open_ends[-1] + 0.002:
            return False
        open_ends.append(end)
    return True
