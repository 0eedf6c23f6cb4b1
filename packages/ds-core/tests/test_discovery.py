"""Which world the environment describes: torchrun, MPI, Slurm, clouds, or none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ds_core.comm.discovery import DEFAULT_PORT, find_world, first_host
from ds_core.errors import CommError
from ds_core.testing import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "4000"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
INTEL_MPI = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "8"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
}


def test_nothing_describes_no_world():
    assert find_world({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("environment", "local_rank", "host", "source"),
    [
        ({**TORCHRUN, "LOCAL_RANK": "2"}, 2, "node0", "torchrun"),
        ({**OPEN_MPI, **TORCHRUN}, 0, "node0", "torchrun"),
        ({**OPEN_MPI, "MASTER_ADDR": "node0"}, 1, "node0", "Open MPI"),
        (OPEN_MPI, 1, None, "Open MPI"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, 1, "127.0.0.1", "Open MPI"),
        ({**OPEN_MPI, "AZ_BATCH_MASTER_NODE": "10.0.0.4:6000"}, 1, "10.0.0.4", "Open MPI"),
        ({**OPEN_MPI, "SM_HOSTS": '["algo-1", "algo-2"]'}, 1, "algo-1", "Open MPI"),
        (INTEL_MPI, 1, "127.0.0.1", "MPICH or Intel MPI"),
        (MVAPICH, 1, "node0", "MVAPICH"),
        (SLURM, 1, "gpu003", "Slurm"),
        ({**SLURM, "PMI_RANK": "0", "PMI_SIZE": "1"}, 1, "gpu003", "Slurm"),
        ({**SLURM, **INTEL_MPI}, 1, "127.0.0.1", "MPICH or Intel MPI"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_place_in_the_world(environment, local_rank, host, source):
    world = find_world(environment)
    assert (world.rank, world.size) == (3, 8)
    assert (world.local_rank, world.host, world.source) == (local_rank, host, source)


def test_the_port_is_that_of_the_job():
    port = find_world(SLURM).port
    assert 20000 <= port < 40000
    assert find_world({**SLURM, "SLURM_PROCID": "0"}).port == port
    assert find_world({**SLURM, "SLURM_JOB_ID": "78"}).port != port
    assert find_world({**SLURM, "MASTER_PORT": "1234"}).port == "1234"
    assert find_world(MVAPICH).port == DEFAULT_PORT


def test_the_port_that_is_asked_for_is_for_those_whose_starter_names_none():
    assert find_world(SLURM, port=1234).port == "1234"
    assert find_world({**SLURM, "MASTER_PORT": "5"}, port=1234).port == "5"


def meet_at_a_file(place):
    from ds_core import comm

    rank, size = int(os.environ.pop("RANK")), int(os.environ.pop("WORLD_SIZE"))
    with pytest.raises(CommError, match=r"give all three, init_method alone, or none"):
        comm.init("gloo", rank=rank)
    with pytest.raises(CommError, match=r"give rank and world_size"):
        comm.init("gloo", init_method=place)
    comm.init("gloo", init_method=place, rank=rank, world_size=size)
    return comm.all_gather_object(rank, comm.Mesh.world().group("dp"))


def test_ranks_meet_where_the_program_says(tmp_path):
    place = f"file://{tmp_path}/meet"
    assert run_ranks(2, meet_at_a_file, place, initialized=False) == [[0, 1], [0, 1]]


def test_a_batch_script_without_srun_is_a_world_of_one():
    assert find_world({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu003", "gpu003"),
        ("gpu003,gpu004", "gpu003"),
        ("gpu[003-010,12]", "gpu003"),
        ("gpu[7,9],login1", "gpu7"),
        ("rack1-gpu[02-04]-ib", "rack1-gpu02-ib"),
        ("a,b[1-2]", "a"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def without(environment, name):
    return {key: value for key, value in environment.items() if key != name}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            without(TORCHRUN, "MASTER_PORT"),
            r"part of a world: MASTER_PORT not set \(found RANK='3'",
        ),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE not set .*as Open MPI"),
        (without(INTEL_MPI, "PMI_RANK"), "PMI_RANK not set .found PMI_SIZE='8'"),
        (without(INTEL_MPI, "MPI_LOCALRANKID"), "none of MPI_LOCALRANKID, PMI_LOCAL_RANK says"),
        (without(SLURM, "SLURM_NTASKS"), "SLURM_NTASKS not set .*srun --ntasks"),
        ({**SLURM, "SLURM_PROCID": "8"}, r"SLURM_PROCID=8 is outside 0\.\."),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK='x' in the environment"),
        ({**SLURM, "SLURM_STEP_NODELIST": ","}, "names no host; set MASTER_ADDR"),
        ({**OPEN_MPI, "SM_HOSTS": "{"}, "SM_HOSTS='{' of SageMaker is not a list of hosts"),
    ],
)
def test_what_is_incomplete_or_makes_no_sense_is_explained(environment, message):
    with pytest.raises(CommError, match=message):
        find_world(environment)


def start_as_slurm_does():
    from ds_core import comm

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ[{"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS"}.get(name, name)] = (
            os.environ.pop(name, "0")
        )
    os.environ["SLURM_STEP_ID"] = "0"
    comm.init()
    group = comm.Mesh.world().group("dp")
    return comm.all_gather_object(group.rank, group)


def test_slurms_variables_start_a_world():
    assert run_ranks(2, start_as_slurm_does, initialized=False) == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DEEPSPEED_TIMEOUT": "soon"}, "DEEPSPEED_TIMEOUT='soon' in the environment: expected mi"),
        ({"DEEPSPEED_TIMEOUT": "-1"}, "expected minutes above 0"),
        (OPEN_MPI, "set MASTER_ADDR to it on all ranks"),
    ],
    ids=["words", "negative", "no host"],
)
def test_init_explains_what_it_cannot_use(variables, message):
    code = "import ds_core.comm as c\ntry: c.init()\nexcept c.environment.CommError as e: print(e)"
    environment = {**os.environ, **variables, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert message in done.stdout, done.stderr


def timeout_in_minutes():
    from ds_core import comm

    os.environ["DEEPSPEED_TIMEOUT"] = "2.5"
    comm.init()
    return comm.Mesh.world().group("dp").timeout.total_seconds()


def test_deepspeeds_timeout_is_in_minutes():
    assert run_ranks(2, timeout_in_minutes, initialized=False) == [150.0, 150.0]
