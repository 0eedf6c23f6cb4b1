"""Collectives by torch.distributed's signatures: values, in-place, async_op, groups, the log."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as torch_dist

import deepspeed
from deepspeed import comm as dist
from ds_core.comm import all_rows
from ds_core.errors import CommError
from ds_core.testing import run_ranks


def mine(rank, size=6):
    return torch.arange(size, dtype=torch.float32) + 10 * rank


def reductions():
    rank, size = dist.get_rank(), dist.get_world_size()
    everybody = [mine(r) for r in range(size)]
    for op, expected in (
        (dist.ReduceOp.SUM, sum(everybody)),
        (dist.ReduceOp.AVG, sum(everybody) / size),
        (dist.ReduceOp.MAX, everybody[-1]),
        (dist.ReduceOp.MIN, everybody[0]),
    ):
        tensor = mine(rank)
        assert dist.all_reduce(tensor, op=op) is None
        assert torch.equal(tensor, expected), op
    tensor = mine(rank)
    handle = dist.all_reduce(tensor, async_op=True)
    assert handle.wait()
    assert handle.is_completed()
    assert handle.wait()
    assert torch.equal(tensor, sum(everybody))
    tensors = [mine(rank), mine(rank, 3).double()]
    dist.all_reduce_coalesced(tensors)
    assert torch.equal(tensors[0], sum(everybody))
    assert tensors[1].dtype == torch.float64
    tensor = mine(rank)
    dist.reduce(tensor, dst=1)
    assert torch.equal(tensor, sum(everybody) if rank == 1 else mine(rank))
    out = torch.empty(6 // size)
    dist.reduce_scatter_tensor(out, mine(rank))
    assert torch.equal(out, sum(everybody).chunk(size)[rank])
    dist.reduce_scatter(out, list(mine(rank).chunk(size)), op=dist.ReduceOp.SUM)
    assert torch.equal(out, sum(everybody).chunk(size)[rank])


def gathers():
    rank, size = dist.get_rank(), dist.get_world_size()
    everybody = [mine(r) for r in range(size)]
    parts = [torch.empty(6) for _ in range(size)]
    dist.all_gather(parts, mine(rank))
    assert all(map(torch.equal, parts, everybody))
    # Two dimensions, and a parameter that asks for gradients.
    own = torch.nn.Parameter(mine(rank).view(2, 3))
    out = torch.empty(2 * size, 3)
    handle = dist.all_gather_into_tensor(out, own, async_op=True)
    handle.wait()
    assert torch.equal(out.flatten(), torch.cat(everybody))
    assert not out.requires_grad
    parts = [torch.empty(6) for _ in range(size)] if rank == 1 else None
    dist.gather(mine(rank), parts, dst=1)
    assert parts is None or all(map(torch.equal, parts, everybody))
    target = torch.empty(6)
    dist.scatter(target, everybody if rank == 0 else None, src=0)
    assert torch.equal(target, mine(rank))
    tensor = mine(rank)
    dist.broadcast(tensor, 1)
    assert torch.equal(tensor, mine(1))
    values = [{"rank": rank}, rank]
    dist.broadcast_object_list(values, src=1)
    assert values == [{"rank": 1}, 1]
    found = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": r} for r in range(size)]


def exchanges():
    rank, size = dist.get_rank(), dist.get_world_size()
    out = torch.empty(6)
    dist.all_to_all_single(out, mine(rank))
    share = 6 // size
    expected = [mine(r)[rank * share : (rank + 1) * share] for r in range(size)]
    assert torch.equal(out, torch.cat(expected))
    # Rank r sends r + 1 rows to each.
    rows = torch.full(((rank + 1) * size, 2), float(rank))
    out = torch.empty(sum(r + 1 for r in range(size)), 2)
    sizes = [r + 1 for r in range(size)]
    dist.all_to_all_single(out, rows, sizes, [rank + 1] * size)
    assert [int(x) for x in out[:, 0]] == [r for r in range(size) for _ in range(r + 1)]
    outs = [torch.empty(r + 1, 2) for r in range(size)]
    dist.all_to_all(outs, list(rows.split([rank + 1] * size)), async_op=True).wait()
    assert all(bool((part == r).all()) for r, part in enumerate(outs))
    if rank == 0:
        dist.send(mine(0), dst=1, tag=3)
    elif rank == 1:
        got = torch.empty(6)
        assert dist.recv(got, src=0, tag=3) == 0
        assert torch.equal(got, mine(0))
    after, before = (rank + 1) % size, (rank - 1) % size
    got = torch.empty(6)
    ops = [dist.P2POp(dist.isend, mine(rank), after), dist.P2POp(dist.irecv, got, before)]
    for handle in dist.batch_isend_irecv(ops):
        handle.wait()
    assert torch.equal(got, mine(before))
    dist.barrier()
    dist.barrier(async_op=True).wait()
    dist.monitored_barrier(timeout=timedelta(seconds=60))


def groups():
    rank = dist.get_rank()
    pair = dist.new_group([2, 1])
    assert dist.get_world_size(pair) == (2 if rank else -1)
    assert dist.get_rank(pair) == (-1 if rank == 0 else rank - 1)
    tensor = mine(rank)
    dist.all_reduce(tensor, group=pair)
    assert torch.equal(tensor, mine(1) + mine(2) if rank else mine(0))
    if rank:
        tensor = mine(rank)
        dist.broadcast(tensor, src=2, group=pair)
        assert torch.equal(tensor, mine(2))
        assert dist.get_all_ranks_from_group(pair) == [1, 2]
        assert dist.get_global_rank(pair, 1) == 2
        with pytest.raises(CommError, match=r"rank 0 is not in the group of ranks \[1, 2\]"):
            dist.broadcast(tensor, src=0, group=pair)
        # The same group serves torch.distributed.
        torch_dist.all_reduce(tensor, group=pair)
    assert dist.get_world_group() is torch_dist.group.WORLD
    mesh = dist.initialize_mesh_device((3, 1), ("data_parallel", "sequence_parallel"))
    assert mesh.shape == (3, 1)


def told_mistakes():
    tensor = torch.ones(4)
    with pytest.raises(CommError, match="src: got None"):
        dist.recv(tensor)
    with pytest.raises(CommError, match="gather_list: got None on rank"):
        dist.gather(tensor, dst=dist.get_rank())
    with pytest.raises(CommError, match="P2POp: op"):
        dist.P2POp(print, tensor, 0)
    with pytest.raises(CommError, match=r"expected one of ReduceOp\.SUM"):
        dist.all_reduce(tensor, op="sum of all")
    with pytest.raises(CommError, match="do not fit a group"):
        dist.all_gather_into_tensor(torch.empty(5), tensor)


def summed_up():
    dist.configure(enabled=True)
    assert not dist.has_comm_data()
    for _ in range(3):
        dist.all_reduce(torch.ones(1000), log_name="mine")
    found = dist.log_summary(show_straggler=True, return_dict=True)
    assert found["summary"]["all_reduce"][4000]["count"] == 3
    assert found["metadata"] == {"world_size": 2, "rank": dist.get_rank()}
    assert found["straggler_analysis"]["all_reduce"][4000]["last_rank"] in (0, 1)
    assert dist.get_comm_operation_count() == 3
    assert dist.get_logged_comm_ops() == ["all_reduce"]
    dist.reset_log()
    assert not dist.has_comm_data()
    dist.configure(deepspeed_config={"comms_logger": {"enabled": False}})
    dist.all_reduce(torch.ones(10))
    assert dist.log_summary(return_dict=True)["summary"] == {}
    return [row.sent_bytes for row in all_rows() if row.caller == "mine"]


@pytest.mark.parametrize("check", [reductions, gathers, exchanges, told_mistakes])
@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_mean_what_torchs_do(check, world_size):
    run_ranks(world_size, check)


def test_groups_are_torchs_own():
    run_ranks(3, groups)


def test_log_summary_tells_what_was_sent():
    assert run_ranks(2, summed_up) == [[12_000], [12_000]]


def alone():
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    with pytest.raises(CommError, match=r"call deepspeed\.init_distributed"):
        dist.all_reduce(torch.ones(3))
    with pytest.raises(CommError, match="dist_init_required: got False"):
        deepspeed.init_distributed(dist_init_required=False)
    deepspeed.init_distributed("gloo", distributed_port=29501, timeout=None)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    dist.all_gather_into_tensor(torch.empty(3), tensor)
    assert dist.is_initialized()
    assert dist.is_available()
    return dist.get_rank(), dist.get_world_size(), dist.get_local_rank(), tensor.sum().item()


def test_a_world_of_one_needs_no_environment():
    assert run_ranks(1, alone, initialized=False) == [(0, 1, 0, 3.0)]


def started_by_slurm():
    rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    local = os.environ.pop("LOCAL_RANK")
    os.environ |= {"SLURM_PROCID": rank, "SLURM_NTASKS": size, "SLURM_LOCALID": local}
    os.environ["SLURM_STEP_ID"] = "0"
    dist.init_distributed(dist_backend="gloo", auto_mpi_discovery=True)
    return [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]


def test_programs_find_torchruns_variables_whoever_started_them():
    assert run_ranks(2, started_by_slurm, initialized=False) == [["0", "2", "0"], ["1", "2", "1"]]


def destroyed(folder):
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"file://{folder}/meet"
    seconds = timedelta(seconds=77)
    deepspeed.init_distributed(
        "gloo", timeout=seconds, init_method=place, rank=rank, world_size=size
    )
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    pair = dist.new_group([0, 1])
    dist.destroy_process_group(pair)
    dist.destroy_process_group()
    assert not dist.is_initialized()
    deepspeed.init_distributed("gloo", init_method=f"{place}2", rank=rank, world_size=size)
    dist.all_reduce(tensor)
    return tensor.tolist()


def test_ranks_meet_where_init_method_says_and_again_after_the_end(tmp_path):
    found = run_ranks(2, destroyed, str(tmp_path), initialized=False)
    assert found == [[4.0, 4.0], [4.0, 4.0]]
