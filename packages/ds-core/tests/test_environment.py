"""Starting the process group: from torchrun's variables, or alone without any."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from ds_core import comm
from ds_core.errors import CommError
from ds_core.testing import fake_world, free_port, run_ranks

WHOLE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.fixture(autouse=True)
def no_world(monkeypatch):
    for name in (*WHOLE, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    comm.shutdown()


def test_without_variables_there_is_a_world_of_one():
    assert not comm.is_initialized()
    comm.init()
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    tensor = torch.ones(3)
    comm.all_reduce(tensor, comm.Mesh.world().group("dp"), caller="test")
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_init_leaves_a_running_group_alone():
    with fake_world(8):
        comm.init()
        assert dist.get_world_size() == 8


def test_shutdown_may_be_called_twice_and_init_again():
    comm.init()
    comm.shutdown()
    comm.shutdown()
    assert not comm.is_initialized()
    comm.init()
    assert comm.is_initialized()


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_a_missing_variable_is_named(monkeypatch, missing):
    for name, value in WHOLE.items():
        if name != missing:
            monkeypatch.setenv(name, value)
    with pytest.raises(CommError, match=rf"only part of a world: {missing} not set.*torchrun"):
        comm.init()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one"}, "RANK='one' in the environment is not an integer"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not an integer"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' in the environment is not an integer"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 is outside 0\.\.WORLD_SIZE-1 with WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK=-1 is outside"),
        ({"MASTER_PORT": "http"}, "could not start on rank 0"),
    ],
    ids=["rank", "empty", "local-rank", "too-large", "negative", "port"],
)
def test_values_that_make_no_sense_are_refused(monkeypatch, variables, message):
    for name, value in {**WHOLE, **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommError, match=message):
        comm.init()


def init_from_variables():
    comm.init()
    tensor = torch.tensor([float(dist.get_rank() + 1)])
    comm.all_reduce(tensor, comm.Mesh.world().group("dp"), caller="test")
    return tensor.item(), dist.get_backend()


def test_torchruns_variables_start_a_world():
    assert run_ranks(2, init_from_variables, initialized=False) == [(3.0, "gloo")] * 2


def nobody_else_comes():
    import os

    if os.environ["RANK"] == "1":
        os.environ["WORLD_SIZE"], os.environ["RANK"] = "2", "5"
        with pytest.raises(CommError, match="RANK=5"):
            comm.init()
        return
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(CommError, match=r"process group of 2 ranks at .* not start on rank 0"):
        comm.init(timeout_s=2)


def test_a_rank_that_never_comes_ends_in_an_error():
    run_ranks(2, nobody_else_comes, initialized=False)


THREADS = """
import atexit, os
from ds_core import comm

def tell():
    names = {open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")}
    print([name.strip() for name in names if "gloo" in name])

atexit.register(tell)  # the first to be registered is the last to be called
comm.init("gloo")
comm.broadcast_object("x", comm.Mesh.world().group("dp"))
import torch.distributed.checkpoint  # as every save does, after the group was made
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("last", ["comm.shutdown()", ""])
def test_no_thread_of_the_backend_outlives_shutdown_or_the_program(last):
    # One that does may end the process by SIGABRT while Python finalizes.
    done = subprocess.run([sys.executable, "-c", THREADS + last], capture_output=True, text=True)

    assert done.stdout.strip() == "[]", done.stderr


#: A sharding that is alive as a global name, in a cycle, as engines are.
HELD = """
import torch
from ds_core.replicated import Replicated
from ds_core.precision import Precision
from ds_core.seams import Dense
model = torch.nn.Linear(2, 2)
held = Replicated(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    mesh=comm.Mesh.world(),
    precision=Precision(),
    transport=Dense(),
)
held.itself = held
model(torch.ones(1, 2)).sum().backward()
held.update()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_thread_outlives_a_program_that_holds_groups_to_its_end():
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", THREADS + HELD],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for told, errors in [rank.communicate(timeout=120) for rank in ranks]:
        assert told.strip() == "[]", errors
