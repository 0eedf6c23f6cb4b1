"""Times are taken side by side, and a table says what was reached."""

from __future__ import annotations

import itertools
import json
import time

import pytest
import torch

from ds_ops.bench import timing
from ds_ops.bench.timing import Row, Table, Timing, interleave


def test_candidates_take_turns_in_an_order_that_rotates():
    called = []
    interleave({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, seconds=0.0)
    turns = [name for name, _ in itertools.groupby(called)]
    assert {"a", "b"} == set(turns)
    # After warming up, each turn of one is followed by the other's: a b, then b a, ...
    assert called.count("a") > 5
    assert called.count("b") > 5


def test_rounds_go_on_until_the_time_is_up():
    found = interleave({"sleep": lambda: time.sleep(0.01)}, seconds=0.2, min_rounds=1)["sleep"]
    assert 5 <= found.rounds <= 20
    assert found.min_s <= found.p10_s <= found.median_s <= found.p90_s
    assert 0.009 < found.min_s < 0.1


def test_short_calls_are_repeated_within_a_round():
    calls = itertools.count()
    found = interleave({"short": lambda: next(calls)}, seconds=0.0, min_rounds=3)["short"]
    assert found.rounds == 3
    assert next(calls) > 100
    assert found.min_s < 1e-5


def test_nothing_to_measure_is_no_endless_loop():
    assert interleave({}, seconds=10.0) == {}


def row(**changes):
    return Row(**{"op": "op", "shape": "4", "dtype": "fp32", "ms": 2.0, "threads": 1} | changes)


def test_ratios_and_targets():
    found = row(floor_ms=1.0, peer="torch", peer_ms=3.0, max_x_floor=1.5, min_x_peer=1.5)
    assert (found.x_floor, found.x_peer) == (2.0, 1.5)
    assert found.missed == ["x floor <= 1.5"]
    assert row().missed == []
    assert row().x_floor is None
    assert row(min_x_peer=1.0).missed == ["x peer >= 1"]  # no peer was measured


def test_a_row_is_made_of_timings_by_name():
    timings = {name: Timing(s, s, s, s, 9) for name, s in (("ours", 1e-3), ("floor", 5e-4))}
    made = timing.row("op", "4", torch.bfloat16, timings, peer="absent", error=1e-3)
    assert (made.dtype, made.ms, made.floor_ms, made.peer_ms) == ("bf16", 1.0, 0.5, None)


def test_a_table_has_a_line_per_row():
    lines = []
    table = Table(lines.append)
    table.add(row(floor_ms=1.0, peer="torch", peer_ms=4.0, error=1e-7, max_x_floor=1.0, note="hot"))
    (line,) = lines
    words = line.split()
    assert words[:6] == ["op", "4", "fp32", "1", "2.00", "1.00"]
    assert words[6:11] == ["2.00", "torch", "4.00", "2.00", "1.0e-07"]
    assert line.endswith("MISSED x floor <= 1; hot\n")


@pytest.fixture
def no_library(monkeypatch):
    """A header that builds nothing."""
    head = timing.Header("0", "2", "cpu", "avx2", "abc", 0.5)
    monkeypatch.setattr(timing, "header", lambda: head)


def test_json_holds_all_that_the_table_does(no_library, capsys):
    def rows(seconds):
        yield row(note=f"{seconds:g} s")
        yield row(op="other")

    timing.main(rows, ["--json", "--seconds", "0.5", "--only", "op"])
    found = json.loads(capsys.readouterr().out)
    assert found["header"]["sources"] == "abc"
    (only,) = found["families"][""]
    assert (only["op"], only["note"], only["missed"]) == ("op", "0.5 s", [])


def test_a_missed_target_fails_only_a_check(no_library, capsys):
    def rows(seconds):
        yield row(floor_ms=1.0, max_x_floor=1.0)

    timing.main(rows, [])
    assert "MISSED x floor <= 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        timing.main(rows, ["--check"])
    assert ended.value.code == 1
