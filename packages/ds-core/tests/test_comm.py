"""Collectives: values, bytes, order, and in place, against what plain arithmetic gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.testing import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
WORLDS = [1, 2, 3, 4]
#: Small messages and large ones may travel differently; a prime one divides by nothing.
SIZES = [1, 7, 40_009]


def world_group():
    return comm.Mesh.world().group("dp")


def values(rank, numel, dtype):
    """Small integers, whose sums every dtype here holds exactly."""
    return ((torch.arange(numel) * (rank + 3)) % 11 - 5).to(dtype)


def everybody(numel, dtype):
    return [values(rank, numel, dtype) for rank in range(dist.get_world_size())]


def check_all_gather():
    group = world_group()
    for dtype in DTYPES:
        for size in SIZES:
            expected = torch.cat(everybody(size, dtype))
            mine = values(group.rank, size, dtype)
            out = torch.full((size * group.size,), 9, dtype=dtype)
            comm.all_gather(out, mine, group, caller="test")
            assert torch.equal(out, expected), (dtype, size)
            in_place = torch.full_like(out, 9)
            own = in_place[group.rank * size : (group.rank + 1) * size]
            own.copy_(mine)
            comm.all_gather(in_place, own, group, caller="test", async_op=True).wait()
            assert torch.equal(in_place, expected), (dtype, size, "in place")


def check_reduce_scatter():
    group = world_group()
    for dtype in DTYPES:
        for size in SIZES:
            full = everybody(size * group.size, dtype)
            part = slice(group.rank * size, (group.rank + 1) * size)
            expected = torch.stack(full).double().sum(0)[part].to(dtype)
            mine = full[group.rank].clone()
            out = torch.full((size,), 5, dtype=dtype)
            comm.reduce_scatter(out, mine, group, caller="test")
            assert torch.equal(out, expected), (dtype, size)
            assert torch.equal(mine, full[group.rank]), "the input is unchanged"
            comm.reduce_scatter(out, mine, group, accumulate=True, caller="test")
            assert torch.equal(out, expected * 2), (dtype, size, "accumulate")
            comm.reduce_scatter(mine[part], mine, group, caller="test", async_op=True).wait()
            assert torch.equal(mine[part], expected), (dtype, size, "in place")


def check_reduce_scatter_into_fp32():
    group = world_group()
    full = [torch.full((4 * group.size,), 1 + 2**-7 * rank) for rank in range(group.size)]
    expected = torch.stack(full).sum(0)[:4]
    out = torch.empty(4)
    comm.reduce_scatter(out, full[group.rank].bfloat16(), group, caller="test")
    assert torch.equal(out, expected), "added in fp32, not in bf16"


def check_all_reduce():
    group = world_group()
    for dtype in DTYPES:
        for op, combine in [("sum", torch.sum), ("max", torch.amax), ("min", torch.amin)]:
            full = torch.stack(everybody(7, dtype))
            tensor = full[group.rank].clone()
            comm.all_reduce(tensor, group, op=op, caller="test")
            assert torch.equal(tensor, combine(full.double(), 0).to(dtype)), (dtype, op)


def check_all_to_all():
    group = world_group()
    for dtype in DTYPES:
        for size in SIZES:
            full = everybody(size * group.size, dtype)
            part = slice(group.rank * size, (group.rank + 1) * size)
            out = torch.full((size * group.size,), 9, dtype=dtype)
            comm.all_to_all(out, full[group.rank], group, caller="test")
            assert torch.equal(out, torch.cat([tensor[part] for tensor in full])), (dtype, size)


def check_broadcast():
    group = world_group()
    for dtype in DTYPES:
        for source in range(group.size):
            tensor = values(group.rank, 7, dtype)
            comm.broadcast(tensor, group, source=source, caller="test")
            assert torch.equal(tensor, values(source, 7, dtype)), (dtype, source)


def check_ring_of_messages():
    group = world_group()
    if group.size == 1:
        return
    arriving = torch.zeros(5)
    following, preceding = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    waiting = comm.recv(arriving, group, source=preceding, tag=3, caller="test", async_op=True)
    comm.send(values(group.rank, 5, torch.float32), group, to=following, tag=3, caller="test")
    waiting.wait()
    assert torch.equal(arriving, values(preceding, 5, torch.float32))


def check_objects():
    group = world_group()
    assert comm.all_gather_object({"rank": group.rank}, group) == [
        {"rank": rank} for rank in range(group.size)
    ]
    last = group.size - 1
    assert comm.broadcast_object(f"from {group.rank}", group, source=last) == f"from {last}"
    comm.barrier(group, caller="test")


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(
    "check",
    [
        check_all_gather,
        check_reduce_scatter,
        check_reduce_scatter_into_fp32,
        check_all_reduce,
        check_all_to_all,
        check_broadcast,
        check_ring_of_messages,
        check_objects,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_values(check, world_size):
    run_ranks(world_size, check)


def reduce_scatter_of_floats():
    group = world_group()
    torch.manual_seed(group.rank)
    out = torch.empty(1000)
    comm.reduce_scatter(out, torch.randn(1000 * group.size), group, caller="test")
    full = torch.empty(1000 * group.size)
    comm.all_gather(full, out, group, caller="test")
    return full


def sum_by_rank(world_size):
    parts = []
    for rank in range(world_size):
        torch.manual_seed(rank)
        parts.append(torch.randn(1000 * world_size))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_reduce_scatter_adds_in_the_order_of_ranks(world_size):
    for full in run_ranks(world_size, reduce_scatter_of_floats):
        assert torch.equal(full, sum_by_rank(world_size))


def several_in_flight(size):
    group = world_group()
    flights = []
    for number in range(6):
        full = values(group.rank + number, size * group.size, torch.float32)
        out = torch.empty(size * group.size)
        part = torch.empty(size)
        gather = comm.all_gather(out, full[:size], group, caller="g", async_op=True)
        reduce = comm.reduce_scatter(part, full, group, caller="r", async_op=True)
        flights.append((number, full, out, part, gather, reduce))
    own = slice(group.rank * size, (group.rank + 1) * size)
    for number, _, out, part, gather, reduce in reversed(flights):
        reduce.wait()
        gather.wait()
        gather.wait()  # waiting twice is harmless
        theirs = [values(r + number, size * group.size, torch.float32) for r in range(group.size)]
        assert torch.equal(out, torch.cat([full[:size] for full in theirs]))
        assert torch.equal(part, torch.stack(theirs).sum(0)[own])


@pytest.mark.parametrize("size", [3, 40_009], ids=["small", "large"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_several_in_flight_may_be_waited_for_in_any_order(world_size, size):
    run_ranks(world_size, several_in_flight, size)


def lanes_in_different_order(size):
    group = world_group()
    lanes = [group.lane("gather"), group.lane("reduce")]
    outs = [torch.zeros(size * group.size) for _ in lanes]
    shards = [torch.full((size,), float(10 * number + group.rank)) for number in range(2)]
    order = (0, 1) if group.rank == 0 else (1, 0)
    pending = [
        comm.all_gather(outs[i], shards[i], lanes[i], caller="lanes", async_op=True) for i in order
    ]
    for handle in pending:
        handle.wait()
    for number, out in enumerate(outs):
        expected = [10.0 * number + rank for rank in range(group.size) for _ in range(size)]
        assert out.tolist() == expected


@pytest.mark.parametrize("size", [3, 40_009], ids=["small", "large"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_lanes_need_no_common_order(world_size, size):
    run_ranks(world_size, lanes_in_different_order, size, timeout_s=20)


def lanes_of_two_meshes():
    """As two sharded models in one process have: each its own mesh, and lanes of that."""
    lanes = [comm.Mesh.world().group("dp").lane("gather") for _ in range(2)]
    size, rank = 40_000, lanes[0].rank
    outs = [torch.zeros(size * lanes[0].size) for _ in lanes]
    order = (0, 1) if rank == 0 else (1, 0)
    pending = [
        comm.all_gather(
            outs[i], torch.full((size,), float(i)), lanes[i], caller="two meshes", async_op=True
        )
        for i in order
    ]
    for handle in pending:
        handle.wait()
    assert [set(out.tolist()) for out in outs] == [{0.0}, {1.0}]


def test_lanes_of_two_meshes_do_not_mix():
    run_ranks(2, lanes_of_two_meshes, timeout_s=20)


def message_beside_exchange():
    """A caller's own tags are none of those that a collective in flight uses."""
    group = world_group()
    size = 40_000
    out, shard = torch.zeros(size * group.size), torch.full((size,), 1.0)
    peer = 1 - group.rank
    gather = None
    if group.rank == 0:
        gather = comm.all_gather(out, shard, group, caller="test", async_op=True)
    mine, theirs = torch.full((size,), 5.0), torch.zeros(size)
    arriving = comm.recv(theirs, group, source=peer, tag=1, caller="test", async_op=True)
    comm.send(mine, group, to=peer, tag=1, caller="test", async_op=True).wait()
    if group.rank == 1:
        gather = comm.all_gather(out, shard, group, caller="test", async_op=True)
    arriving.wait()
    gather.wait()
    assert set(theirs.tolist()) == {5.0}
    assert set(out.tolist()) == {1.0}


def test_own_messages_do_not_mix_with_collectives():
    run_ranks(2, message_beside_exchange, timeout_s=20)


def empty_tensors():
    group = world_group()
    nothing = torch.empty(0)
    comm.all_gather(torch.empty(0), nothing, group, caller="test")
    comm.reduce_scatter(torch.empty(0), nothing, group, caller="test")
    comm.all_reduce(nothing, group, caller="test")
    comm.all_to_all(torch.empty(0), nothing, group, caller="test")
    comm.broadcast(nothing, group, caller="test")
    assert group.ledger.sent_bytes() == 0


def test_empty_tensors_are_legal():
    run_ranks(2, empty_tensors)


def uneven_arguments():
    group = world_group()
    with pytest.raises(comm_error(), match=r"all_gather of w: \[5\] and \[3\] do not fit"):
        comm.all_gather(torch.empty(5), torch.empty(3), group, caller="w")
    with pytest.raises(comm_error(), match=r"reduce_scatter of w: \[2\] and \[5\] do not fit"):
        comm.reduce_scatter(torch.empty(2), torch.empty(5), group, caller="w")
    with pytest.raises(comm_error(), match=r"all_to_all of w: \[4\] and \[6\] do not fit"):
        comm.all_to_all(torch.empty(4), torch.empty(6), group, caller="w")
    with pytest.raises(comm_error(), match=r"all_to_all of w: .* do not fit a group of 2"):
        comm.all_to_all(torch.empty(5), torch.empty(5), group, caller="w")
    with pytest.raises(comm_error(), match="op: got 'avg', expected one of sum, mean, max"):
        comm.all_reduce(torch.empty(4), group, op="avg", caller="w")


def comm_error():
    from ds_core.errors import CommError

    return CommError


def test_sizes_that_do_not_fit_are_refused_before_anything_is_sent():
    run_ranks(2, uneven_arguments)
