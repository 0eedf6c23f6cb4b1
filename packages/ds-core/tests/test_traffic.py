"""Spans, bandwidths, the table of collectives, and the comms_logger section."""

from __future__ import annotations

import logging
import time

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.comm import Ledger, Span, Traffic, TrafficRow, all_rows
from ds_core.comm.traffic import bus_factor
from ds_core.errors import ConfigError
from ds_core.testing import run_ranks

MS = 1_000_000


def span(op="all_reduce", message=1000, begin=0, waited=2, done=10, caller="w"):
    return Span(op, "dp", caller, 4, 5, begin * MS, waited * MS, done * MS, message)


def traffic_of(*spans, **options):
    ledger = Ledger()
    traffic = Traffic(ledger, **options)
    for each in spans:
        for listener in ledger.listeners:
            listener(each)
    return traffic


def test_rows_add_up_by_operation_and_size():
    traffic = traffic_of(span(), span(done=20), span(message=7), span(op="broadcast"))
    first = traffic.rows()[0]
    assert (first.op, first.message_bytes, first.num_calls, first.sent_bytes) == (
        *("all_reduce", 1000, 2, 10),
    )
    assert first.latency_s == pytest.approx(0.030)
    assert first.waited_s == pytest.approx(0.026)
    assert len(traffic.rows()) == 3
    traffic.reset()
    assert traffic.rows() == []


@pytest.mark.parametrize(
    ("op", "factor"),
    [
        ("all_reduce", 1.5),
        ("all_gather", 0.75),
        ("reduce_scatter", 0.75),
        ("all_to_all_uneven", 0.75),
        ("gather", 0.75),
        ("broadcast", 1.0),
        ("send", 1.0),
    ],
)
def test_bus_bandwidth_is_that_of_nccl_tests(op, factor):
    assert bus_factor(op, 4) == factor
    row = TrafficRow(op, "dp", 4, 10**6, num_calls=2, latency_s=1.0)
    assert row.algorithm_bandwidth == 2e6
    assert row.bus_bandwidth == 2e6 * factor


def test_only_some_operations_and_callers_apart():
    traffic = traffic_of(
        span(), span(op="send"), span(caller="v"), ops={"all_reduce"}, by_caller=True
    )
    assert sorted(row.caller for row in traffic.rows()) == ["v", "w"]


def test_verbose_logs_each(caplog):
    caplog.set_level(logging.INFO, logger="ds_core")
    traffic_of(span(message=1536), verbose=True)
    assert "all_reduce of w in dp: 1.5 KiB in 10.000 ms" in caplog.text


def watched():
    mesh = comm.Mesh.world()
    group = mesh.group("dp")
    spans = []
    stop = mesh.ledger.watch(spans.append)
    pending = comm.all_reduce(torch.ones(100), group, caller="a", async_op=True)
    time.sleep(0.3)
    pending.wait()
    pending.wait()
    full = torch.ones(40_000 * group.size)
    comm.all_gather(full, torch.ones(40_000), group, caller="b")
    comm.broadcast(torch.ones(10), group, caller="c")
    stop()
    comm.barrier(group)
    return spans, mesh.ledger.rows()


def test_a_watched_ledger_tells_each_collective_once():
    for spans, rows in run_ranks(2, watched):
        assert [(s.op, s.caller, s.message_bytes) for s in spans] == [
            ("all_reduce", "a", 400),
            ("all_gather", "b", 320_000),
            ("broadcast", "c", 40),
        ]
        sent = {row.op: row.sent_bytes for row in rows}
        assert all(s.sent_bytes == sent[s.op] and s.group_size == 2 for s in spans)
        reduce = spans[0]
        assert reduce.waited_ns - reduce.issued_ns >= 0.3e9
        assert reduce.issued_ns < reduce.done_ns


def late_rank():
    mesh = comm.Mesh.world()
    group = mesh.group("dp")
    comm.barrier(group)
    traffic = Traffic(mesh.ledger)
    for _ in range(3):
        if group.rank == 1:
            time.sleep(0.2)
        comm.all_reduce(torch.ones(1000), group, caller="loss")
    summary = traffic.summary(group)
    traffic.stop()
    return summary.rows()[0], summary.table()


def test_the_summary_names_the_rank_that_arrives_last():
    for (row, late), table in run_ranks(2, late_rank):
        assert (row.op, row.num_calls) == ("all_reduce", 3)
        assert late.last_rank == 1
        assert late.lost_s > 0.3
        head, line = table.splitlines()
        assert head.split()[:3] == ["operation", "group", "message"]
        assert line.startswith("all_reduce  dp x2  3.9 KiB")


def config(**section):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "comms_logger": section,
        "progress": False,
    }


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


def logged_by_an_engine(section):
    heard = Heard()
    logger = logging.getLogger("ds_core")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    engine = ds_core.initialize(torch.nn.Linear(2, 1), config(**section))
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 2)).sum())
        engine.step()
    engine.close()
    return heard.text, engine.mesh.ledger.listeners


def test_comms_logger_logs_one_table_on_rank_0():
    (first, left), (second, _) = run_ranks(2, logged_by_an_engine, {"enabled": True})
    assert "collectives of rank 0:" in first
    assert "all_reduce" in first.partition("lost ms")[2]
    assert "collectives" not in second
    assert left == ()


def test_comms_logger_keeps_to_the_operations_asked_for():
    section = {"enabled": True, "prof_all": False, "prof_ops": ["all_gather_into_tensor"]}
    (first, _), _ = run_ranks(2, logged_by_an_engine, section)
    assert "all_reduce" not in first


def test_comms_logger_off_watches_nothing():
    (text, listeners), _ = run_ranks(2, logged_by_an_engine, {"enabled": False, "verbose": True})
    assert (text.count("collectives of"), listeners) == (0, ())


def test_unknown_operations_are_refused():
    with pytest.raises(ConfigError, match=r"comms_logger.prof_ops: got 'allreduce', expected some"):
        ds_core.config.load(config(prof_ops=["allreduce"]), world_size=1)


def test_all_ledgers_are_watched_those_made_later_too():
    before = ledger_with_a_listener()
    traffic = Traffic(None)
    after = ledger_with_a_listener()
    for ledger in (before, after):
        for listener in ledger.listeners:
            listener(span())
    assert [row.num_calls for row in traffic.rows()] == [2]
    traffic.stop()
    assert not before.listeners
    assert not after.listeners
    assert not Ledger().listeners


def ledger_with_a_listener():
    ledger = Ledger()
    ledger.record("all_reduce", "dp", "all ledgers", 10)
    return ledger


def test_the_totals_of_all_ledgers_add_up():
    ledgers = [ledger_with_a_listener() for _ in range(2)]
    with ledgers[0].measure():
        ledgers[0].record("all_reduce", "dp", "all ledgers", 5)
    found = [row for row in all_rows() if row.caller == "all ledgers"]
    assert [(row.num_calls, row.sent_bytes) for row in found] == [(3, 25)]
