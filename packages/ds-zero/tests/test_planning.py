"""`ds plan` with offload: what is beside the device, what bounds it, and what is proposed."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ds_core import planning
from ds_core.cli.app import make_app
from ds_core.errors import PlanError

H100 = planning.find_device("h100")
NVME = {"device": "nvme", "nvme_path": "/local_nvme"}


def plan(size: str, section: dict, *, gpus: int = 8, device=H100, **options) -> planning.Plan:
    return planning.make_plan(
        document(section),
        planning.model_of_size(size),
        planning.Cluster(1, gpus, device),
        planning.PlanOptions(**options),
    )


def document(section: dict) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "zero_optimization": section,
    }


@pytest.mark.parametrize(
    ("section", "device", "host", "disk"),
    [
        ({"stage": 2}, 2 + 14 / 8, 0, 0),
        ({"stage": 2, "update_in_backward": True}, 2 + 12 / 8, 0, 0),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 2, 14 / 8, 0),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 2 / 8, 14 / 8, 0),
        ({"stage": 2, "offload_optimizer": NVME}, 2, 2 / 8, 12 / 8),
        (
            {"stage": 3, "offload_optimizer": NVME, "offload_param": {**NVME, "max_in_cpu": 0}},
            0,
            2 / 8,
            14 / 8,
        ),
    ],
)
def test_every_tier_holds_its_part(section: dict, device: float, host: float, disk: float):
    numel = 1_000_000_000
    found = plan("1B", section).costs
    persistent_host = found.host_bytes - found.host_buffers
    told = [found.persistent_bytes, persistent_host, found.disk_bytes]
    assert [size / numel for size in told] == pytest.approx([device, host, disk], abs=0.002)
    assert sum(found.memory.values()) - found.memory["padding"] == told[0] + told[1]


def test_beside_a_cpu_the_host_is_no_other_place():
    cpu = planning.find_device("cpu")
    section = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    found = plan("100M", section, device=cpu, gpus=2).costs
    assert (found.host_bytes, found.disk_bytes) == (0, 0)
    assert found.memory == plan("100M", {"stage": 2}, device=cpu, gpus=2).costs.memory
    on_disk = plan("100M", {"stage": 2, "offload_optimizer": NVME}, device=cpu, gpus=2)
    assert on_disk.costs.disk_bytes > 0
    assert on_disk.costs.host_bytes == 0
    assert on_disk.peak_bytes > on_disk.costs.persistent_bytes


def test_offload_takes_time():
    resident, host, disk = (
        plan("1B", {"stage": 2, **more}).time.total
        for more in (
            {},
            {"offload_optimizer": {"device": "cpu"}},
            {"offload_optimizer": NVME},
        )
    )
    assert resident < host < disk


def test_the_memory_of_a_node_is_shared_by_its_ranks():
    section = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    needed = plan("1B", section).costs.host_bytes * 8
    assert plan("1B", section, host_memory_bytes=needed).fits
    crowded = plan("1B", section, host_memory_bytes=needed - 1)
    assert crowded.crowded == ["host"]
    assert not crowded.fits
    on_disk = plan("1B", {"stage": 2, "offload_optimizer": NVME}, disk_bytes=1000)
    assert on_disk.crowded == ["disk"]


def test_what_does_not_fit_is_told_that_offload_would():
    section = {"stage": 3, "update_in_backward": True}
    small = planning.find_device("t4")
    made = plan("7B", section, gpus=1, device=small, sequence_length=128)
    told = [fix.description for fix in planning.remedies(document(section), made)]
    assert not made.fits
    assert any("offload" in each for each in told), told


def test_an_update_in_backward_is_not_proposed_to_who_clips():
    section = {"stage": 2, "update_in_backward": True}
    clipping = {**document(section), "gradient_clipping": 1.0}
    cluster = planning.Cluster(1, 8, H100)
    with pytest.raises(PlanError, match="update_in_backward: got true with gradient_clipping"):
        planning.make_plan(clipping, planning.model_of_size("1B"), cluster)


def test_the_command_shows_host_and_disk(tmp_path):
    file = tmp_path / "config.json"
    section = {"stage": 3, "offload_optimizer": NVME}
    file.write_text(json.dumps(document(section)))
    words = ["plan", str(file), "--params", "1B", "--host-memory-gib", "256", "--disk-gib", "1"]
    shown = CliRunner().invoke(make_app(), words)
    assert shown.exit_code == 1
    assert "on the host" in shown.output
    assert "of 256.00 GiB on a node" in shown.output
    assert "optimizer on nvme" in shown.output
    assert (
        "It does not fit: the disk of a node is too small for what its ranks offload."
        in shown.output
    )
    told = json.loads(CliRunner().invoke(make_app(), [*words, "--json"]).output)["memory"]
    assert told["disk"] > 1_000_000_000
    assert set(told["by_tier"]) == {"device", "host", "disk"}
    wrong = CliRunner().invoke(make_app(), [*words[:4], "--host-memory-gib", "-1"])
    assert "--host-memory-gib" in str(wrong.exception)
