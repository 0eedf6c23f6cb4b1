"""The ledger counts exactly what the formulas say, and what crosses the wire."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ds_core import comm
from ds_core.comm import Ledger
from ds_core.testing import run_ranks


def count_each(size):
    """Bytes that this rank counted for each collective on fp32 [N * size]."""
    mesh = comm.Mesh.world()
    group = mesh.group("dp")
    full, shard = torch.ones(size * group.size), torch.ones(size)
    comm.all_gather(full, shard, group, caller="a")
    comm.reduce_scatter(shard, full, group, caller="b")
    comm.all_reduce(full, group, caller="c")
    comm.all_to_all(torch.empty_like(full), full, group, caller="d")
    comm.broadcast(full, group, source=group.size - 1, caller="e")
    if group.rank == 0 and group.size > 1:
        comm.send(shard, group, to=1, caller="f")
    elif group.rank == 1:
        comm.recv(shard, group, source=0, caller="f")
    return {row.op: row for row in mesh.ledger.rows()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("size", [12, 30_000], ids=["small", "large"])
def test_bytes_equal_the_formulas(world_size, size):
    n, whole = world_size, 4 * size * world_size
    for rank, rows in enumerate(run_ranks(world_size, count_each, size)):
        sent = {op: row.sent_bytes for op, row in rows.items()}
        assert sent["all_gather"] == (n - 1) * whole // n
        assert sent["reduce_scatter"] == (n - 1) * whole // n
        assert sent["all_reduce"] == 2 * (n - 1) * whole // n
        assert sent["all_to_all"] == (n - 1) * whole // n
        assert sent["broadcast"] == ((n - 1) * whole if rank == n - 1 else 0)
        assert sent.get("send", 0) == (4 * size if rank == 0 else 0)
        assert sent.get("recv", 0) == 0
        assert all(row.num_calls == 1 for row in rows.values())
        assert {row.group for row in rows.values()} == {"dp"}


def test_a_world_of_one_sends_nothing():
    (rows,) = run_ranks(1, count_each, 12)
    assert sum(row.sent_bytes for row in rows.values()) == 0


def test_rows_are_sorted_and_filtered():
    ledger = Ledger()
    ledger.record("all_gather", "dp", "embed", 10)
    ledger.record("all_gather", "dp", "embed", 10)
    ledger.record("all_reduce", "dp", "head", 300)
    ledger.record("all_reduce", "tp", "head", 7)
    assert [row.sent_bytes for row in ledger.rows()] == [300, 20, 7]
    assert ledger.sent_bytes() == 327
    assert ledger.sent_bytes(op="all_reduce") == 307
    assert ledger.sent_bytes(group="dp", caller="head") == 300
    assert ledger.num_calls(caller="embed") == 2
    ledger.reset()
    assert ledger.rows() == []


def test_measure_counts_only_what_is_inside():
    ledger = Ledger()
    ledger.record("all_gather", "dp", "x", 5)
    with ledger.measure() as inside:
        ledger.record("all_gather", "dp", "x", 7)
        ledger.record("send", "dp", "y", 1)
    ledger.record("all_gather", "dp", "x", 100)
    assert inside.sent_bytes() == 8
    assert inside.num_calls() == 2
    assert ledger.sent_bytes() == 113


def test_measure_survives_an_exception_inside():
    ledger = Ledger()
    inside = Ledger()
    try:
        with ledger.measure() as inside:
            ledger.record("send", "dp", "y", 1)
            raise KeyError
    except KeyError:
        pass
    assert inside.sent_bytes() == 1


# One rank of a world of two: for each operation, the bytes counted and those of the loopback.
PROGRAM = """
import sys, torch
from datetime import timedelta
import torch.distributed as dist
from ds_core import comm

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
mesh = comm.Mesh.world()
group = mesh.group("dp")
full, part = torch.ones(1 << 22), torch.ones(1 << 21)

def on_the_wire():
    dist.barrier()
    fields = [line.split() for line in open("/proc/net/dev") if line.strip().startswith("lo:")]
    dist.barrier()  # nobody sends on before both have read
    return int(fields[0][9])

calls = {
    "all_gather": lambda: comm.all_gather(full, part, group, caller="test"),
    "reduce_scatter": lambda: comm.reduce_scatter(part, full, group, caller="test"),
    "all_reduce": lambda: comm.all_reduce(full, group, caller="test"),
    "all_to_all": lambda: comm.all_to_all(torch.empty_like(full), full, group, caller="test"),
}
for name, call in calls.items():
    call()
    seen = []
    # What TCP sends again under load comes on top, so the least of several turns is compared.
    for _ in range(5):
        before = on_the_wire()
        with mesh.ledger.measure() as sent:
            for _ in range(2):
                call()
        seen.append(on_the_wire() - before)
    if rank == 0:
        print(name, 2 * sent.sent_bytes(), min(seen))
"""


def can_isolate_network():
    probe = ["unshare", "--net", "sh", "-c", "ip link set lo up"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux network namespaces")
def test_counted_bytes_are_those_on_the_wire(tmp_path: Path):
    if not can_isolate_network():
        pytest.skip("needs the right to create a network namespace (unshare --net, ip)")
    program = tmp_path / "rank.py"
    program.write_text(PROGRAM)
    # Alone in a namespace, the loopback carries nothing but what the two ranks send.
    script = (
        f"ip link set lo up; {sys.executable} {program} 1 {tmp_path}/store & "
        f"{sys.executable} {program} 0 {tmp_path}/store; wait"
    )
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], capture_output=True, text=True, timeout=90
    )
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]
    assert len(rows) == 4, done.stderr
    for name, counted, physical in rows:
        assert int(counted) >= 2 * 2**23, name
        assert int(physical) == pytest.approx(int(counted), rel=0.01), name
