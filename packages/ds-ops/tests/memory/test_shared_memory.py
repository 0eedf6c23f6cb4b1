"""SharedMemoryAllReduce with real processes: the same bits everywhere, and no wait without end."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ds_ops
from ds_core import comm
from ds_core.errors import CommError, OpError
from ds_core.testing import Died, Raised, Returned, die, run_ranks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SIZES = (0, 1, 7, 511, 8193, 100_003)


def _numbers(size: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size + 1000 * rank)
    return torch.randn(size, generator=generator).to(dtype)


def _sum(size: int, ranks: int, dtype: torch.dtype) -> torch.Tensor:
    """In fp32, in the order of ranks, rounded once."""
    total = _numbers(size, 0, dtype).float()
    for rank in range(1, ranks):
        total += _numbers(size, rank, dtype).float()
    return total.to(dtype)


def _files() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("ds-ops-*")}


def _reduces(max_bytes: int) -> bool:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with ds_ops.SharedMemoryAllReduce(dist.group.WORLD, max_bytes=max_bytes) as reducer:
        mine = [name for name in _files() if f"-{os.getpid()}-" in name]
        for _ in range(3):
            for dtype in _DTYPES:
                for size in _SIZES:
                    x = _numbers(size, rank, dtype)
                    assert reducer.all_reduce_(x) is x
                    assert torch.equal(x, _sum(size, ranks, dtype)), (dtype, size)
    return not mine


@pytest.mark.parametrize(("ranks", "max_bytes"), [(2, 1 << 20), (2, 1024), (3, 50_000), (8, 4096)])
def test_every_rank_gets_the_sum_in_the_order_of_ranks(ranks: int, max_bytes: int) -> None:
    assert run_ranks(ranks, _reduces, max_bytes) == [True] * ranks


def _in_groups() -> None:
    rank = dist.get_rank()
    mesh_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pg = mesh_groups[rank % 2]
    group = comm.Group("evens or odds", [rank % 2, rank % 2 + 2], pg, comm.Ledger())
    first = ds_ops.SharedMemoryAllReduce(group)
    second = ds_ops.SharedMemoryAllReduce(dist.group.WORLD)
    x, y = torch.full((5,), float(rank)), torch.ones(2, 3)
    first.all_reduce_(x)
    second.all_reduce_(y)
    assert x.tolist() == [2.0 * (rank % 2) + 2.0] * 5
    assert y.tolist() == [[4.0] * 3] * 2
    first.close()
    second.close()
    first.close()


def test_groups_of_ds_core_and_several_at_once() -> None:
    run_ranks(4, _in_groups)


def test_a_group_of_one_needs_no_memory() -> None:
    reducer = ds_ops.SharedMemoryAllReduce(comm.Group("one", [0], None, comm.Ledger()))
    x = torch.ones(3)
    assert reducer.all_reduce_(x) is x
    reducer.close()
    with pytest.raises(OpError, match="closed"):
        reducer.all_reduce_(x)


def _dies(timeout_s: float) -> float:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=timeout_s)
    x = torch.ones(100_000)
    reducer.all_reduce_(x)
    if dist.get_rank() == 1:
        die()
    begin = time.monotonic()
    with pytest.raises(CommError, match="process of rank 1 has ended"):
        reducer.all_reduce_(x)
    took = time.monotonic() - begin
    with pytest.raises(CommError, match="rank 1 has ended; make a new one"):
        reducer.all_reduce_(x)
    return took


def test_a_rank_that_dies_is_an_error_at_once() -> None:
    before = _files()
    results = run_ranks(3, _dies, 50.0, deaths={1: signal.SIGKILL})
    assert isinstance(results[1], Died)
    for survivor in (results[0], results[2]):
        assert not isinstance(survivor, Raised), survivor
        assert _value(survivor) < 20.0
    assert _files() <= before


def _value(result: object) -> float:
    found = result.value if isinstance(result, Returned) else result
    assert isinstance(found, float)
    return found


def _comes_late() -> str:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=0.5)
    x = torch.ones(10)
    if dist.get_rank() == 2:
        time.sleep(2.0)
    begin = time.monotonic()
    with pytest.raises(CommError) as told:
        reducer.all_reduce_(x)
    assert time.monotonic() - begin < 20.0
    dist.barrier()
    reducer.close()
    return str(told.value)


def test_a_rank_that_does_not_come_is_named_on_every_rank() -> None:
    told = run_ranks(3, _comes_late)
    assert "on rank 0: rank 2 did not come within 0.5 s" in told[0]
    assert "on rank 1: rank 2 did not come within 0.5 s" in told[1]
    assert "on rank 2: rank 2 (this rank) did not come within 0.5 s" in told[2]


def _differs(what: str) -> str:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=30.0)
    odd = dist.get_rank() == 1
    x = torch.ones(20_000 + (what == "size") * odd)
    if what == "closed" and odd:
        reducer.close()
        return ""
    with pytest.raises(CommError) as told:
        reducer.all_reduce_(x.half() if what == "dtype" and odd else x)
    return str(told.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("size", "different tensors: rank 0 80000 bytes of torch.float32, rank 1 80004 bytes"),
        ("dtype", "rank 1 40000 bytes of torch.float16"),
        ("closed", "rank 1 has closed it"),
    ],
)
def test_ranks_that_do_not_fit_together(what: str, message: str) -> None:
    assert message in run_ranks(2, _differs, what)[0]


def _is_interrupted() -> str:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=30.0)
    if dist.get_rank() == 0:
        signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    else:
        time.sleep(1.0)
    with pytest.raises((KeyboardInterrupt, CommError)) as told:
        reducer.all_reduce_(torch.ones(4))
    return f"{told.type.__name__}: {told.value}"


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("stop")


def test_waiting_can_be_interrupted_and_the_others_are_told() -> None:
    told = run_ranks(2, _is_interrupted)
    assert told[0] == "KeyboardInterrupt: stop"
    assert "rank 0 was interrupted" in told[1]


def _bad_input() -> None:
    world = dist.group.WORLD
    reducer = ds_ops.SharedMemoryAllReduce(world)
    x = torch.ones(4, 4)
    for bad, message in (
        (x.double(), "got torch.float64"),
        (x.T[1:], "not contiguous"),
        (x.to("meta"), "on meta, expected the CPU"),
        (x.to_sparse(), "not contiguous"),
    ):
        with pytest.raises((OpError, RuntimeError), match=message):
            reducer.all_reduce_(bad)
    reducer.all_reduce_(x)  # none of them has begun a turn
    assert x.eq(2).all()
    reducer.close()
    with pytest.raises(OpError, match="it is closed"):
        reducer.all_reduce_(x)
    with pytest.raises(OpError, match="max_bytes: got 1"):
        ds_ops.SharedMemoryAllReduce(world, max_bytes=1)
    with pytest.raises(OpError, match="timeout_s: got 0"):
        ds_ops.SharedMemoryAllReduce(world, timeout_s=0)


def test_bad_input_is_refused() -> None:
    run_ranks(2, _bad_input)


def test_too_little_shared_memory_is_told_on_every_rank() -> None:
    before = _files()
    for rank, told in enumerate(run_ranks(2, _does_not_fit)):
        assert "rank 0: /dev/shm cannot hold" in told, rank
        assert "--shm-size" in told
    assert _files() <= before


def _does_not_fit() -> str:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    # Undone: the next test may run in the same process.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(OpError) as told:
            ds_ops.SharedMemoryAllReduce(dist.group.WORLD)
    return str(told.value)


def _forks() -> None:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=30.0)
    child = os.fork()
    if child == 0:
        status = 3
        try:
            reducer.all_reduce_(torch.ones(4))
        except OpError as error:
            status = 0 if "forked child" in str(error) else 4
        reducer.close()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert reducer.all_reduce_(torch.ones(4)).tolist() == [2.0] * 4
    reducer.close()


def test_a_forked_child_is_no_rank() -> None:
    run_ranks(2, _forks)


def _closes_beside() -> None:
    reducer = ds_ops.SharedMemoryAllReduce(dist.group.WORLD, timeout_s=30.0)
    x = torch.ones(4)
    if dist.get_rank() == 0:
        thread = threading.Thread(target=reducer.all_reduce_, args=(x,))
        thread.start()
        while not reducer._lock.locked():
            time.sleep(0.01)
        with pytest.raises(OpError, match="another thread is in all_reduce_"):
            reducer.close()
        dist.barrier()
        thread.join()
    else:
        dist.barrier()
        reducer.all_reduce_(x)
    assert x.tolist() == [2.0] * 4
    reducer.close()


def test_closing_while_another_thread_reduces_is_refused() -> None:
    run_ranks(2, _closes_beside)
