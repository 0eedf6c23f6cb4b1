"""Named axes: sizes, sub-groups, groups over several axes, and a DeviceMesh handed in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ds_core import comm
from ds_core.errors import CommError
from ds_core.testing import fake_world, run_ranks


def test_axes_that_are_left_out_have_size_1():
    with fake_world(8):
        mesh = comm.Mesh(dp=4, tp=2)
        assert mesh.axes == {"pp": 1, "dp": 4, "sp": 1, "tp": 2}
        assert [mesh.size(axis) for axis in ("pp", "dp", "tp", "ep")] == [1, 4, 2, 1]


def test_the_innermost_axis_holds_neighbouring_ranks():
    with fake_world(8, rank=5):
        mesh = comm.Mesh(pp=2, dp=2, tp=2)
        assert mesh.group("tp").ranks == (4, 5)
        assert mesh.group("dp").ranks == (5, 7)
        assert mesh.group("pp").ranks == (1, 5)
        assert (mesh.group("tp").rank, mesh.group("dp").rank, mesh.group("pp").rank) == (1, 0, 1)


def test_a_group_is_made_once():
    with fake_world(4):
        mesh = comm.Mesh(dp=2, tp=2)
        assert mesh.group("dp") is mesh.group("dp")
        assert mesh.group("sp").size == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"dp": 3}, r"pp=1 x dp=3 x sp=1 x tp=1 is not the world size, 4"),
        ({"dp": 2, "data": 2}, r"unknown axis 'data'; the axes are pp, dp, sp, tp"),
        ({"dp": 0}, r"is not the world size, 4"),
    ],
    ids=["product", "name", "zero"],
)
def test_impossible_axes_are_refused(axes, message):
    with fake_world(4), pytest.raises(CommError, match=message):
        comm.Mesh(**axes)


def test_a_group_of_an_unknown_axis_is_refused():
    with fake_world(4):
        mesh = comm.Mesh.world()
        with pytest.raises(CommError, match="got axis 'data'; this mesh has pp, dp, sp, tp"):
            mesh.group("data")
        with pytest.raises(CommError, match="got axis none"):
            mesh.group()


def test_a_device_mesh_brings_its_own_axes():
    with fake_world(4, rank=3):
        mesh = comm.Mesh(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "dp")))
        assert mesh.axes == {"replica": 2, "dp": 2}
        assert mesh.group("dp").ranks == (2, 3)
        assert mesh.group("replica").ranks == (1, 3)
        assert mesh.group("tp").size == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [(None, "no dimension names"), (("batch", "model"), "dimensions batch, model; name the one")],
    ids=["unnamed", "without dp"],
)
def test_a_device_mesh_must_name_dp(names, message):
    with fake_world(4):
        device_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        with pytest.raises(CommError, match=message):
            comm.Mesh(device_mesh)


def sums_by_axis():
    mesh = comm.Mesh(dp=2, tp=2)
    found = {}
    for axes in [("dp",), ("tp",), ("dp", "tp"), ("tp", "dp"), ("pp",), ("dp", "sp")]:
        tensor = torch.tensor([float(10 ** dist.get_rank())])
        comm.all_reduce(tensor, mesh.group(*axes), caller="test")
        found["x".join(axes)] = int(tensor)
    full = torch.zeros(2)
    comm.all_gather(full, torch.tensor([float(dist.get_rank())]), mesh.group("dp"), caller="test")
    return found, full.tolist(), mesh.ledger.sent_bytes(group="dp", op="all_gather")


def test_groups_of_2_by_2_ranks():
    results = run_ranks(4, sums_by_axis)
    assert [found["dp"] for found, _, _ in results] == [101, 1010, 101, 1010]
    assert [found["tp"] for found, _, _ in results] == [11, 11, 1100, 1100]
    assert {found["dpxtp"] for found, _, _ in results} == {1111}
    assert {found["tpxdp"] for found, _, _ in results} == {1111}
    assert [found["pp"] for found, _, _ in results] == [1, 10, 100, 1000]
    assert [found["dpxsp"] for found, _, _ in results] == [101, 1010, 101, 1010]
    assert [full for _, full, _ in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert {sent for _, _, sent in results} == {4}


def train_on_mesh():
    import ds_core

    mesh = comm.Mesh(dp=2, tp=2)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "gradient_clipping": 0,
        "progress": False,
    }
    engine = ds_core.initialize(model, config, mesh=mesh)
    # Ranks of one tp group see the same data; those of one dp group different data.
    engine.backward(engine(torch.full((1, 2), float(mesh.group("dp").rank))).sum())
    engine.step()
    return engine.state_dict()["weight"].tolist()


def test_the_engine_averages_over_dp_alone():
    assert run_ranks(4, train_on_mesh) == [[[0.5, 0.5]]] * 4
