"""The rest of the collectives: values against plain arithmetic, bytes against the formulas."""

from __future__ import annotations

import pytest
import torch

from ds_core import comm
from ds_core.errors import CommError
from ds_core.testing import fake_world, run_ranks

WORLDS = [1, 2, 3, 4]
OPS = {
    "sum": lambda full: full.sum(0),
    "max": lambda full: full.amax(0),
    "min": lambda full: full.amin(0),
    "product": lambda full: full.prod(0),
    "mean": lambda full: full.mean(0),
}


def world_group(check=False):
    mesh = comm.Mesh.world()
    if check:
        mesh.check_collectives()
    return mesh.group("dp")


def values(rank, numel, dtype=torch.float32):
    """Small integers, whose sums every dtype here holds exactly."""
    return ((torch.arange(numel) * (rank + 3)) % 7 - 3).to(dtype)


def stacked(group, numel, dtype=torch.float64):
    return torch.stack([values(rank, numel, dtype) for rank in range(group.size)])


def check_reductions(group):
    for op, expected in OPS.items():
        for dtype in (torch.float32, torch.bfloat16):
            full = stacked(group, 5 * group.size)
            mine = values(group.rank, 5 * group.size, dtype)
            tensor = mine.clone()
            comm.all_reduce(tensor, group, op=op, caller="t")
            assert torch.equal(tensor, expected(full).to(dtype)), (op, dtype)
            out = torch.empty(5, dtype=dtype)
            comm.reduce_scatter(out, mine, group, op=op, caller="t")
            own = slice(5 * group.rank, 5 * group.rank + 5)
            assert torch.equal(out, expected(full)[own].to(dtype)), (op, dtype)


def check_bitwise(group):
    bits = torch.tensor([0b1010 >> group.rank, 1 << group.rank])
    full = torch.stack([torch.tensor([0b1010 >> r, 1 << r]) for r in range(group.size)])
    for op, combine in [
        ("bitwise_and", torch.bitwise_and),
        ("bitwise_or", torch.bitwise_or),
        ("bitwise_xor", torch.bitwise_xor),
    ]:
        expected = full[0]
        for row in full[1:]:
            expected = combine(expected, row)
        tensor = bits.clone()
        comm.all_reduce(tensor, group, op=op, caller="t")
        assert torch.equal(tensor, expected), op


def check_reduce(group):
    for to in range(group.size):
        for op in ("sum", "max", "mean"):
            tensor = values(group.rank, 7)
            comm.reduce(tensor, group, to=to, op=op, caller="t", async_op=True).wait()
            expected = OPS[op](stacked(group, 7)).float()
            unchanged = values(group.rank, 7)
            assert torch.equal(tensor, expected if group.rank == to else unchanged), (to, op)


def check_gather_and_scatter(group):
    for root in range(group.size):
        is_root = group.rank == root
        out = torch.empty(group.size * 6) if is_root else None
        comm.gather(out, values(group.rank, 6).view(2, 3), group, to=root, caller="t")
        if is_root:
            assert torch.equal(out, stacked(group, 6).float().view(-1))
        full = values(root, 6 * group.size) if is_root else None
        part = torch.empty(6)
        comm.scatter(part, full, group, source=root, caller="t", async_op=True).wait()
        assert torch.equal(part, values(root, 6 * group.size).view(group.size, 6)[group.rank])


def check_uneven(group):
    for base in (0, 5, 20_000):
        sizes = [base + 3 * rank for rank in range(group.size)]
        outs = [torch.full((size,), 9.0) for size in sizes]
        comm.all_gather_uneven(outs, values(group.rank, sizes[group.rank]), group, caller="t")
        for rank, out in enumerate(outs):
            assert torch.equal(out, values(rank, sizes[rank])), (base, rank)
        parts = [values(group.rank + r, size) for r, size in enumerate(sizes)]
        out = torch.empty(sizes[group.rank])
        comm.reduce_scatter_uneven(out, parts, group, caller="t", async_op=True).wait()
        expected = sum(values(r + group.rank, sizes[group.rank]) for r in range(group.size))
        assert torch.equal(out, expected + torch.zeros_like(out))


def check_all_to_all_uneven(group):
    """Rank r sends (r + p) % 3 rows of [2] to rank p: some send nothing."""
    rank, n = group.rank, group.size
    send = [(rank + peer) % 3 for peer in range(n)]
    recv = [(peer + rank) % 3 for peer in range(n)]
    rows = [torch.full((count, 2), 10.0 * rank + p) for p, count in enumerate(send)]
    out = torch.empty(sum(recv), 2)
    comm.all_to_all_uneven(
        out, torch.cat(rows), group, send_sizes=send, recv_sizes=recv, caller="t"
    )
    wanted = [torch.full((count, 2), 10.0 * p + rank) for p, count in enumerate(recv)]
    assert torch.equal(out, torch.cat(wanted))


def check_coalesced(group):
    shapes = [(3,), (2, 4), (1,)]
    dtypes = [torch.float32, torch.float64, torch.float32]
    tensors = [
        values(group.rank + i, torch.Size(shape).numel(), dtype).view(shape)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    sums = [
        sum(values(r + i, t.numel(), t.dtype).view(t.shape) for r in range(group.size))
        for i, t in enumerate(tensors)
    ]
    reduced = [tensor.clone() for tensor in tensors]
    comm.all_reduce_coalesced(reduced, group, caller="t", async_op=True).wait()
    assert all(map(torch.equal, reduced, sums))
    outs = [tensor.new_empty(group.size * tensor.numel()) for tensor in tensors]
    comm.all_gather_coalesced(outs, tensors, group, caller="t")
    for i, (out, tensor) in enumerate(zip(outs, tensors, strict=True)):
        rows = [values(r + i, tensor.numel(), tensor.dtype) for r in range(group.size)]
        assert torch.equal(out, torch.cat(rows))
    shards = [torch.empty_like(tensor) for tensor in tensors]
    fulls = [tensor.reshape(-1).repeat(group.size) for tensor in tensors]
    comm.reduce_scatter_coalesced(shards, fulls, group, caller="t")
    assert all(map(torch.equal, shards, sums))


def check_exchange(group):
    if group.size == 1:
        return
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    first, second = torch.empty(3), torch.empty(4)
    comm.exchange(
        [(values(group.rank, 3), after), (values(group.rank, 4), after)],
        [(first, before), (second, before)],
        group,
        caller="t",
        async_op=True,
    ).wait()
    assert torch.equal(first, values(before, 3))
    assert torch.equal(second, values(before, 4))


def check_objects(group):
    everybody = comm.gather_object({"rank": group.rank, "x": "y" * group.rank}, group, to=0)
    expected = [{"rank": rank, "x": "y" * rank} for rank in range(group.size)]
    assert everybody == (expected if group.rank == 0 else None)
    last = group.size - 1
    handed_out = [f"to {rank}" * rank for rank in range(group.size)]
    mine = comm.scatter_object(handed_out if group.rank == last else None, group, source=last)
    assert mine == handed_out[group.rank]


def check_monitored_barrier(group):
    for _ in range(3):
        comm.monitored_barrier(group, timeout_s=60, caller="t")


CHECKS = [
    check_reductions,
    check_bitwise,
    check_reduce,
    check_gather_and_scatter,
    check_uneven,
    check_all_to_all_uneven,
    check_coalesced,
    check_exchange,
    check_objects,
    check_monitored_barrier,
]


def all_checks(checked):
    group = world_group(checked)
    for check in CHECKS:
        check(group)
        check(group)  # with the check on, the second time goes by memory


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_values(world_size, checked):
    run_ranks(world_size, all_checks, checked)


def count_rooted_and_uneven():
    group = world_group()
    n, rank = group.size, group.rank
    sizes = [4 * (r + 1) for r in range(n)]
    comm.reduce(torch.ones(10), group, to=1, caller="t")
    comm.gather(torch.empty(3 * n), torch.ones(3), group, to=rank * 0, caller="t")
    comm.scatter(torch.empty(5), torch.ones(5 * n), group, source=n - 1, caller="t")
    comm.all_gather_uneven(
        [torch.empty(s) for s in sizes], torch.ones(sizes[rank]), group, caller="t"
    )
    parts = [torch.ones(s) for s in sizes]
    comm.reduce_scatter_uneven(torch.empty(sizes[rank]), parts, group, caller="t")
    comm.all_to_all_uneven(
        torch.empty(n, 2), torch.ones(n, 2), group, send_sizes=[1] * n, recv_sizes=[1] * n
    )
    comm.all_reduce_coalesced([torch.ones(n), torch.ones(n)], group, caller="t")
    return {row.op: row.sent_bytes for row in group.ledger.rows()}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_equal_the_formulas(world_size):
    n = world_size
    for rank, sent in enumerate(run_ranks(n, count_rooted_and_uneven)):
        whole = sum(4 * 4 * (r + 1) for r in range(n))
        own = 4 * 4 * (rank + 1)
        assert sent["reduce"] == (0 if rank == 1 else 40)
        assert sent["gather"] == (0 if rank == 0 else 12)
        assert sent["scatter"] == (20 * (n - 1) if rank == n - 1 else 0)
        assert sent["all_gather_uneven"] == (n - 1) * own
        assert sent["reduce_scatter_uneven"] == whole - own
        assert sent["all_to_all_uneven"] == 8 * (n - 1)
        assert sent["all_reduce"] == 2 * (n - 1) * 8 * n // n


def refusals():
    group = world_group()
    one = torch.ones(4)
    cases = [
        (lambda: comm.reduce(one, group, to=2, caller="w"), "reduce of w: to: got 2, expected a"),
        (lambda: comm.gather(None, one, group, to=group.rank), "gather of the caller: out: got No"),
        (lambda: comm.scatter(one, None, group, source=group.rank), "full: got None on rank"),
        (lambda: comm.all_gather_uneven([one], one, group), "got 1 tensors, expected one for each"),
        (
            lambda: comm.all_to_all_uneven(one, one, group, send_sizes=[1, 2], recv_sizes=[2, 2]),
            r"send_sizes: got \[1, 2\], expected 2 sizes that add up to 4",
        ),
        (lambda: comm.send(one, group, to=group.rank), "expected another rank of the group"),
        (lambda: comm.send(one, group, to=1 - group.rank, tag=1 << 15), "tag: got 32768, expected"),
        (lambda: comm.scatter_object([1], group, source=group.rank), "got 1 values on rank"),
        (lambda: comm.all_gather_coalesced([one], [], group), "got 1 whole tensors and 0 shards"),
        (lambda: comm.all_reduce(one, group, op="bitwise_or"), "bitwise operations need integers"),
        (lambda: comm.all_reduce(one.int(), group, op="mean"), "is not an integer"),
    ]
    for call, message in cases:
        with pytest.raises(CommError, match=message):
            call()


def test_arguments_that_make_no_sense_are_refused_before_anything_is_sent():
    run_ranks(2, refusals)


def sum_in_subgroups():
    mesh = comm.Mesh.world()
    rank = mesh.group("dp").rank
    group = mesh.subgroup([2, 0] if rank in (0, 2) else [1, 3])
    out = torch.empty(2)
    comm.all_gather(out, torch.tensor([float(rank)]), group, caller="t")
    assert mesh.subgroup(group.ranks) is group
    return group.ranks, group.rank, out.tolist(), mesh.ledger.sent_bytes(group=group.name)


def test_a_subgroup_has_the_order_of_its_ranks():
    results = run_ranks(4, sum_in_subgroups)
    assert results[0] == ((2, 0), 1, [2.0, 0.0], 4)
    assert results[2] == ((2, 0), 0, [2.0, 0.0], 4)
    assert results[1] == ((1, 3), 0, [1.0, 3.0], 4)


@pytest.mark.parametrize("ranks", [[1, 2], [0, 0], [0, 9]], ids=["without me", "twice", "outside"])
def test_impossible_subgroups_are_refused(ranks):
    with fake_world(4), pytest.raises(CommError, match="expected distinct ranks of 0 to 3, this"):
        comm.Mesh.world().subgroup(ranks)
