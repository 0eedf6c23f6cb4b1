"""Collectives that cannot complete: every rank ends with an error that names the difference."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.errors import CommError
from ds_core.testing import RankFailure, run_ranks

#: Long enough for a loaded machine, short enough for a test.
TIMEOUT_S = 5.0


def warm_group(checked, timeout_s=TIMEOUT_S):
    mesh = comm.Mesh.world()
    group = mesh.group("dp")
    comm.barrier(group, caller="start")
    mesh.set_timeout(timeout_s)
    if checked:
        mesh.check_collectives()
    return group


def repeat(group, times):
    """A loop that the check has seen."""
    for _ in range(times):
        comm.all_reduce(torch.ones(100), group, caller="loss")
        comm.all_gather(torch.empty(10 * group.size), torch.ones(10), group, caller="layer.3")


def error_of(call):
    with pytest.raises(CommError) as caught:
        call()
    return str(caught.value)


def differ(case, checked):
    group = warm_group(checked)
    odd = group.rank == 1
    if checked:
        repeat(group, 2)
    size = 30_000 + odd
    calls = {
        "shape": lambda: comm.all_reduce(torch.ones(100 + odd), group, caller="loss"),
        "dtype": lambda: comm.all_reduce(
            torch.ones(100, dtype=torch.int32 if odd else torch.float32), group, caller="loss"
        ),
        "reduction": lambda: comm.all_reduce(
            torch.ones(100), group, op="max" if odd else "sum", caller="loss"
        ),
        "caller": lambda: comm.all_reduce(torch.ones(100), group, caller="b" if odd else "a"),
        "operation": lambda: (
            comm.barrier(group, caller="end")
            if odd
            else comm.all_reduce(torch.ones(100), group, caller="loss")
        ),
        "large shape": lambda: comm.all_gather(
            torch.empty(size * group.size), torch.ones(size), group, caller="layer.3"
        ),
        "objects": lambda: (
            comm.broadcast_object(1, group, caller="names")
            if odd
            else comm.all_gather_object(1, group, caller="names")
        ),
        "out of data": lambda: repeat(group, 2 if odd else 4) or comm.barrier(group, caller="end"),
    }
    return error_of(calls[case])


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("shape", "all_reduce of loss, [100] float32 (sum)", "[101] float32"),
        ("dtype", "all_reduce of loss, [100] float32 (sum)", "[100] int32"),
        ("reduction", "[100] float32 (sum)", "[100] float32 (max)"),
        ("caller", "all_reduce of a,", "all_reduce of b,"),
        ("operation", "all_reduce of loss, [100] float32 (sum)", "barrier of end"),
        ("large shape", "[30000] float32", "[30001] float32"),
        ("objects", "all_gather_object of names", "broadcast_object of names (source 0)"),
        ("out of data", "all_reduce of loss, [100] float32 (sum)", "barrier of end"),
    ],
)
def test_the_check_names_what_differs_before_data_moves(case, first, second):
    for rank, message in enumerate(run_ranks(2, differ, case, True, timeout_s=60)):
        assert f"in group 'dp' (ranks [0, 1]) failed on rank {rank}: the ranks differ at" in message
        assert "rank 0: " in message
        assert first in message.partition("rank 0: ")[2]
        assert second in message.partition("rank 1: ")[2]


def test_the_check_tells_equal_ranks_together():
    messages = run_ranks(3, differ, "caller", True, timeout_s=60)
    assert all("rank 0, 2: all_reduce of a" in message for message in messages)


@pytest.mark.parametrize("case", ["operation", "large shape", "out of data"])
def test_without_the_check_the_timeout_names_what_differs(case):
    for message in run_ranks(2, differ, case, False, timeout_s=60):
        assert "failed on rank" in message
        assert "the ranks differ at call" in message
        assert "rank 0: " in message.partition("differ")[2]


def differing_messages(checked):
    group = warm_group(checked)
    if group.rank == 0:
        return error_of(lambda: comm.send(torch.ones(100), group, to=1, caller="activation"))
    return error_of(lambda: comm.recv(torch.ones(90), group, source=0, caller="activation"))


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_a_message_of_another_size_is_an_error_on_both_sides(checked):
    sender, receiver = run_ranks(2, differing_messages, checked, timeout_s=60)
    assert sender.startswith("send of activation in group 'dp'")
    assert receiver.startswith("recv of activation in group 'dp'")
    assert "[100] float32" in receiver
    assert "[90] float32" in receiver


def uneven_sizes_that_differ():
    group = warm_group(True)
    wrong = [2, 1] if group.rank == 1 else [1, 1]
    out = torch.empty(sum(wrong))
    return error_of(
        lambda: comm.all_to_all_uneven(
            out, torch.ones(2), group, send_sizes=[1, 1], recv_sizes=wrong, caller="tokens"
        )
    )


def test_the_check_compares_the_sizes_of_an_uneven_all_to_all():
    _, wrong = run_ranks(2, uneven_sizes_that_differ, timeout_s=60)
    assert "all_to_all_uneven of tokens in group 'dp'" in wrong
    assert "rank 0: sends 1 rows; rank 1: expects 2 rows of rank 0" in wrong


def size_mismatch_in_the_backend():
    group = warm_group(False)
    comm.all_reduce(torch.ones(100 + group.rank), group, caller="loss")


def test_without_the_check_gloo_itself_ends_ranks_whose_collectives_differ_in_size():
    with pytest.raises(RankFailure, match="doesn't match expected size"):
        run_ranks(2, size_mismatch_in_the_backend, timeout_s=60)


def stopped(checked):
    group = warm_group(checked, timeout_s=3)
    repeat(group, 2)
    if group.rank == 1:
        # Wakes up when the others have long given up.
        subprocess.Popen(["sh", "-c", f"sleep 14; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    message = error_of(lambda: repeat(group, 3))
    return message, time.monotonic() - started


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_a_stopped_rank_is_named_within_the_timeout(checked):
    (message, waited_s), (late, _) = run_ranks(2, stopped, checked, timeout_s=90)
    assert "rank 1 stopped answering: it has ended, is stopped, or never came" in message
    assert waited_s < 14
    assert "failed on rank 1" in late


def late_to_a_new_group():
    group = warm_group(checked=False, timeout_s=3)
    if group.rank == 1:
        # Wakes up when the other has long given up.
        subprocess.Popen(["sh", "-c", f"sleep 10; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return error_of(lambda: group.lane("gradients"))


def test_a_rank_that_never_comes_to_a_new_group_is_named():
    message, _ = run_ranks(2, late_to_a_new_group, timeout_s=90)
    assert "making dp (gradients) failed on rank 0: rank 1 stopped answering" in message


def stopped_with_the_store():
    comm.init()  # by torchrun's variables: rank 0 holds the rendezvous store
    group = warm_group(True, timeout_s=3)
    repeat(group, 2)
    if group.rank == 0:
        subprocess.Popen(["sh", "-c", f"sleep 25; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        return "", 0.0
    started = time.monotonic()
    # One that memory does not foretell: the ranks have to exchange what they call.
    message = error_of(lambda: comm.all_reduce(torch.ones(7), group, caller="new"))
    return message, time.monotonic() - started


def test_a_stopped_rank_that_holds_the_store_ends_the_others_within_the_timeout():
    _, (message, waited_s) = run_ranks(2, stopped_with_the_store, initialized=False, timeout_s=90)
    assert "all_reduce of new in group 'dp'" in message
    assert "rendezvous store has not answered" in message
    assert waited_s < 25


def late_to_the_barrier():
    group = warm_group(False, timeout_s=60)
    if group.rank == 1:
        comm.recv(torch.empty(1), group, source=0, caller="go")
    else:
        message = error_of(lambda: comm.monitored_barrier(group, timeout_s=0.5, caller="start-up"))
        assert "monitored_barrier of start-up in group 'dp'" in message
        assert "rank 1 did not arrive within 0.5 s" in message
        comm.send(torch.ones(1), group, to=1, caller="go")
    if group.rank == 1:
        comm.monitored_barrier(group, timeout_s=30, caller="start-up")
    comm.monitored_barrier(group, timeout_s=30, caller="again")
    return True


def test_a_monitored_barrier_names_who_did_not_arrive_and_may_be_called_again():
    assert run_ranks(2, late_to_the_barrier, timeout_s=60) == [True, True]


def count_exchanges():
    mesh = comm.Mesh.world()
    mesh.check_collectives()
    group = mesh.group("dp")
    lane = group.lane("reduce")
    counts = []
    for step in range(6):
        repeat(group, 3)
        comm.all_reduce(torch.ones(3), lane, caller="lane")
        if step == 4:
            comm.all_reduce(torch.ones(7), group, caller="evaluation")
        counts.append(group.check.num_exchanges)
    sent = mesh.ledger.sent_bytes(caller="loss")
    return counts, lane.check.num_exchanges, sent, dist.get_world_size()


def test_the_check_asks_only_about_what_is_new_and_adds_no_counted_bytes():
    for counts, of_lane, sent, _ in run_ranks(2, count_exchanges):
        assert counts[0] == counts[1] == counts[3]
        assert counts[5] - counts[3] <= 4
        assert of_lane == 3
        assert sent == 6 * 3 * 400


def check_from_the_environment(value):
    os.environ["DS_COMM_CHECK"] = value
    if value == "yes":
        return error_of(comm.Mesh.world)
    return comm.Mesh.world().group("dp").check is not None


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", False), ("1", True), ("yes", "DS_COMM_CHECK='yes' in the environment: expected 0 or 1")],
)
def test_the_environment_switches_the_check_on(value, expected):
    assert run_ranks(2, check_from_the_environment, value) == [expected, expected]


def config_section(section):
    import ds_core

    model = torch.nn.Linear(2, 1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "comm": section,
        "progress": False,
    }
    engine = ds_core.initialize(model, config)
    engine.backward(engine(torch.ones(1, 2)).sum())
    engine.step()
    group = engine.mesh.group("dp")
    return group.check is not None, group.timeout.total_seconds()


def test_the_config_sets_timeout_and_check():
    found = run_ranks(2, config_section, {"timeout_s": 42, "check": True})
    assert found == [(True, 42.0)] * 2
