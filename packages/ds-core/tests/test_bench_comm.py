"""`ds bench comm`: sizes, operations, and a table or JSON from the ranks that it starts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ds_core import comm
from ds_core.comm.measuring import OPERATIONS, measure, sizes_up_to
from ds_core.errors import CommError
from ds_core.testing import run_ranks


def test_sizes_end_at_the_largest():
    assert sizes_up_to(100, 4) == [4, 16, 64, 100]
    assert sizes_up_to(1) == [1]


def measured():
    group = comm.Mesh.world().group("dp")
    with pytest.raises(CommError, match="op: got 'sum', expected some of all_reduce"):
        list(measure(group, ["sum"], [1]))
    rows = list(measure(group, OPERATIONS, [7], trials=2, warm_ups=1))
    again = list(measure(group, ["all_reduce"], [8], trials=2, is_async=True))
    return [(row.op, row.message_bytes, row.median_s, row.bus_bandwidth) for row in rows + again]


def test_every_operation_is_measured_and_all_ranks_agree():
    first, second = run_ranks(2, measured)
    assert first == second
    assert [row[:2] for row in first] == [*((op, 32) for op in OPERATIONS), ("all_reduce", 32)]
    assert all(row[2] > 0 and row[3] > 0 for row in first)


def alone():
    group = comm.Mesh.world().group("dp")
    with pytest.raises(CommError, match="exchange needs at least two ranks"):
        list(measure(group, ["exchange"], [1]))
    return [row.bus_bandwidth for row in measure(group, ["all_gather"], [4], trials=1)]


def test_a_single_rank_has_no_link():
    assert run_ranks(1, alone) == [[0.0]]


def ds(*words):
    command = [sys.executable, "-m", "ds_core.cli", "bench", "comm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_starts_its_ranks_and_the_first_prints():
    flags = ("--nproc", "2", "--max-elements", "1024", "--only-largest", "--trials", "1")
    done = ds(*flags, "--op", "all_reduce", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["ranks"], found["backend"]) == (2, "gloo")
    assert [(row["op"], row["message_bytes"]) for row in found["rows"]] == [("all_reduce", 4096)]


def test_a_dtype_that_does_not_exist():
    done = ds("--nproc", "1", "--dtype", "int33", "--op", "all_reduce")
    assert done.returncode != 0
    assert "got 'int33'" in done.stderr
