"""The memory plan is what a run holds, on every tier; and what does not fit is refused with it."""

from __future__ import annotations

import logging
import resource

import pytest
import torch
import torch.distributed as dist
from test_memory import live_bytes
from torch import nn
from zero_loops import adamw, sharded, sharded_steps
from zero_models import CASES, Stack

import ds_zero
from ds_core import comm
from ds_core.precision import Precision
from ds_core.testing import run_ranks
from ds_zero import ZenFlow
from ds_zero import room as rooms
from ds_zero.holdings import KINDS
from ds_zero.memory_plan import complaints
from ds_zero.offload import Offload, homes
from ds_zero.room import Room

BF16 = Precision(compute=torch.bfloat16, master=torch.float32)
PLENTY = Room(device=1 << 40, host=1 << 40)


def momentum(params):
    return torch.optim.SGD(params, lr=1e-2, momentum=0.9)


def adagrad(params):
    return torch.optim.Adagrad(params, lr=1e-2)


def held(places) -> dict:
    """What outlives a step, without buffers, of which a plan knows the most only."""
    return {
        place: {kind: kinds[kind] for kind in (*KINDS, "padding")}
        for place, kinds in places.items()
        if any(kinds[kind] for kind in KINDS)
    }


# name: case, optimizer, precision, offload without its folder, further options
RUNS = {
    "plain": ("untied", adamw, None, {}, {}),
    "bf16": ("untied", adamw, BF16, {}, {}),
    "groups": ("groups", adamw, None, {}, {}),
    "frozen": ("frozen", momentum, None, {}, {}),
    "adagrad": ("stack", adagrad, None, {}, {}),
    "early": ("untied", adamw, BF16, {}, {"update_in_backward": True}),
    "early-fp32": ("tied", adamw, None, {}, {"update_in_backward": True}),
    "states-on-disk": ("untied", adamw, BF16, {"optimizer": "nvme", "piece_numel": 300}, {}),
    "moments-on-disk": ("groups", adamw, None, {"optimizer": "nvme"}, {}),
    "half-on-disk": ("untied", adamw, BF16, {"optimizer": "nvme", "ratio": 0.5}, {}),
    "speculative": ("untied", adamw, BF16, {"optimizer": "cpu", "speculative": True}, {}),
    "speculative-fp32": ("groups", momentum, None, {"optimizer": "cpu", "speculative": True}, {}),
    "half-speculative": (
        "untied",
        adamw,
        None,
        {"optimizer": "cpu", "speculative": True, "ratio": 0.5},
        {},
    ),
    "twin-flow": ("untied", adamw, BF16, {"optimizer": "cpu", "ratio": 0.5}, {}),
    "twin-flow-auto": ("untied", adamw, BF16, {"optimizer": "cpu", "ratio": "auto"}, {}),
    "zenflow": ("untied", adamw, BF16, {"optimizer": "cpu"}, {"zenflow": ZenFlow(0.3, 2, 4)}),
    "zenflow-fp32": (
        "untied",
        momentum,
        None,
        {"optimizer": "cpu"},
        {"zenflow": ZenFlow(1.0, 2, 4, overlap_step=True)},
    ),
    "early-on-host": ("untied", adamw, BF16, {"optimizer": "cpu"}, {"update_in_backward": True}),
    "early-on-disk": (
        "untied",
        adamw,
        BF16,
        {"optimizer": "nvme", "piece_numel": 300},
        {"update_in_backward": True},
    ),
}
AT_STAGE_3 = {
    "shards-on-disk": ("untied", adamw, BF16, {"parameters": "nvme"}, {}),
    "some-shards-on-disk": (
        "frozen",
        adamw,
        None,
        {"parameters": "nvme", "max_numel_in_cpu": 700},
        {},
    ),
    "all-on-disk": ("untied", adamw, BF16, {"parameters": "nvme", "optimizer": "nvme"}, {}),
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_holds_what_was_planned(tmp_path, world_size: int, stage: int):
    runs = {**RUNS, **(AT_STAGE_3 if stage == 3 else {})}
    for wrong in run_ranks(world_size, compare_runs, stage, runs, str(tmp_path)):
        assert wrong == []


def compare_runs(stage: int, runs: dict, folder: str) -> list:
    wrong = []
    for name, (case_name, make, precision, offload, options) in runs.items():
        case, where = CASES[case_name], Offload(**offload, folder=folder)
        kwargs = {"precision": precision, "offload": where, **options}
        torch.manual_seed(0)
        with torch.device("meta"):
            described = case.build()
        plan = ds_zero.memory_plan(
            described,
            stage,
            optimizer=make(case.params(described)),
            world_size=dist.get_world_size(),
            rank=dist.get_rank(),
            min_unit_numel=0,
            room=PLENTY,
            **kwargs,
        )
        before = live_bytes()
        model, optimizer = sharded(case, stage, make, **kwargs)
        sharded_steps(model, optimizer, case, 2)
        found = optimizer.memory_by_tier()
        buffers = found.get("host", {}).get("buffers", 0)
        in_memory = optimizer.memory()
        if in_memory.pop("undo", 0) != plan.undo["host"]:
            wrong.append((name, "undo", optimizer.memory(), plan.undo))
        in_memory = sum(size for kind, size in in_memory.items() if kind != "padding")
        if held(found) != held(plan.held) or held(found) != held(optimizer.memory_plan.held):
            wrong.append((name, held(found), held(plan.held)))
        if buffers > plan.buffers["host"]:
            wrong.append((name, "buffers", buffers, plan.buffers))
        if live_bytes() - before != in_memory:
            wrong.append((name, "lives", live_bytes() - before, in_memory))
        optimizer.close()
        del model, optimizer
    return wrong


STEPS_ON_HOST = {
    "plain": ({}, {}),
    "speculative": ({"speculative": True}, {}),
    "half": ({"ratio": 0.5}, {}),
    "half-speculative": ({"ratio": 0.5, "speculative": True}, {}),
    "auto": ({"ratio": "auto"}, {}),
    "zenflow": ({}, {"zenflow": ZenFlow(0.3, 2, 4)}),
    "zenflow-all": ({}, {"zenflow": ZenFlow(1.0, 2, 4)}),
    "early": ({}, {"update_in_backward": True}),
}


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_way_to_step_on_the_host_holds_what_was_planned(world_size: int, stage: int):
    for wrong in run_ranks(world_size, compare_steps_on_host, stage):
        assert wrong == []


def compare_steps_on_host(stage: int) -> list:
    """Count as beside an accelerator, with and without accumulation."""
    wrong, case = [], CASES["untied"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homes, "is_host", lambda device: False)
        for name, (offload, options) in STEPS_ON_HOST.items():
            for precision in (None, BF16):
                for micros in (1, 2) if name in ("plain", "half-speculative", "early") else (1,):
                    kwargs = {"precision": precision, "accumulation": micros, **options}
                    kwargs["offload"] = Offload(optimizer="cpu", **offload)
                    plan = ds_zero.memory_plan(
                        case.build(),
                        stage,
                        world_size=dist.get_world_size(),
                        rank=dist.get_rank(),
                        min_unit_numel=0,
                        device="cuda",
                        room=PLENTY,
                        **kwargs,
                    )
                    model, optimizer = sharded(case, stage, **kwargs)
                    quiet = "update_in_backward" in options
                    sharded_steps(model, optimizer, case, 3, accumulate=micros, no_sync=quiet)
                    found = optimizer.memory_by_tier()
                    own = found["host"].get("buffers", 0)
                    undo = optimizer.memory().get("undo", 0)
                    checks = {
                        "held": (held(found), held(plan.held)),
                        "undo": (undo, plan.undo["host"]),
                    }
                    if name != "zenflow":  # which elements are chosen is found in training
                        checks["buffers"] = (own, plan.buffers["host"])
                    elif own > plan.buffers["host"]:
                        wrong.append((name, "buffers", own, plan.buffers))
                    told = (name, precision is None, micros)
                    wrong += [
                        (told, key, *pair)
                        for key, pair in checks.items()
                        if len({*map(str, pair)}) > 1
                    ]
                    optimizer.close()
    return wrong


@pytest.mark.parametrize("world_size", [1, 2])
def test_beside_a_device_states_are_planned_on_the_host(tmp_path, world_size: int, stage: int):
    offloads = [{"optimizer": "cpu"}, {"optimizer": "nvme", "piece_numel": 300}]
    if stage == 3:
        offloads += [{"optimizer": "cpu", "parameters": "cpu"}, {"parameters": "cpu"}]
        offloads += [{"parameters": "nvme", "max_numel_in_cpu": 700, "optimizer": "nvme"}]
    for wrong in run_ranks(world_size, as_if_on_a_device, stage, offloads, str(tmp_path)):
        assert wrong == []


def as_if_on_a_device(stage: int, offloads: list[dict], folder: str) -> list:
    """Count as beside an accelerator: the CPU's memory plays both parts."""
    wrong = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(homes, "is_host", lambda device: False)
        for offload in offloads:
            for precision in (None, BF16):
                case = CASES["untied"]
                where = Offload(**offload, folder=folder)
                kwargs = {"precision": precision, "offload": where}
                plan = ds_zero.memory_plan(
                    case.build(),
                    stage,
                    world_size=dist.get_world_size(),
                    rank=dist.get_rank(),
                    min_unit_numel=0,
                    device="cuda",
                    room=PLENTY,
                    accumulation=2,
                    **kwargs,
                )
                model, optimizer = sharded(case, stage, **kwargs)
                sharded_steps(model, optimizer, case, 2, accumulate=2)
                found = optimizer.memory_by_tier()
                if held(found) != held(plan.held):
                    wrong.append((offload, precision, held(found), held(plan.held)))
                pools, buffers = optimizer._homes.buffer_bytes, found["host"].get("buffers", 0)
                if not buffers <= plan.buffers["host"] or (
                    pools == 0 and buffers != plan.buffers["host"]
                ):
                    wrong.append((offload, precision, "buffers", buffers, pools, plan.buffers))
                optimizer.close()
    return wrong


# ---------------------------------------------------------------------- what does not fit


def test_every_rank_is_refused_with_the_plan_if_one_does_not_fit():
    for text in run_ranks(2, refused_by_the_room, 1):
        assert "memory: a rank cannot hold its part of the model" in text
        assert "needed are" in text
        assert "ulimit -d" in text
        assert "= between steps" in text
        assert "optimizer" in text
        assert "It would fit with" in text or "It does not fit" in text


def refused_by_the_room(poor_rank: int) -> str:
    def measured(device, folders):
        poor = dist.get_rank() == poor_rank
        return Room(host=1 << 40, process=5000 if poor else 1 << 40, host_name="here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ds_zero.preflight, "measure", measured)
        model = Stack()
        before = live_bytes()
        with pytest.raises(ds_zero.ShardError) as caught:
            ds_zero.shard(model, adamw(model.parameters()), 2)
        assert live_bytes() == before, "nothing was allocated"
        # Who knows better may try.
        ds_zero.shard(model, adamw(model.parameters()), 2, check_memory=False).close()
    return str(caught.value)


def test_a_limit_on_data_too_small_for_one_unit_is_refused_before_it_is_met():
    (text,) = run_ranks(1, under_a_limit)
    assert "ulimit -d" in text
    assert "while units are made" in text


def under_a_limit() -> str:
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 2000))
    status = rooms._text(rooms._PROC / "self/status")
    used = rooms._kilobytes(status, "VmData")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + (8 << 20), before[1]))
    try:
        with pytest.raises(ds_zero.ShardError) as caught:
            ds_zero.shard(model, adamw(model.parameters()), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return str(caught.value)


def test_ranks_of_one_host_share_its_memory_and_its_disk():
    model = Stack()
    mib = 1 << 20
    for room, word in (
        (Room(host=mib // 16, host_name="a"), "2 ranks need"),
        (Room(disks=(("/d", mib // 16),), disk_ids=(("/d", "1"),), host_name="a"), "disk of '/d'"),
    ):
        states = Offload(optimizer="nvme", folder="/d")
        alone = ds_zero.memory_plan(model, 1, world_size=1, room=room, offload=states)
        pair = ds_zero.memory_plan(model, 1, world_size=2, local_ranks=2, room=room, offload=states)
        elsewhere = ds_zero.memory_plan(model, 1, world_size=2, room=room, offload=states)
        apart = ds_zero.memory_plan(
            model, 1, world_size=2, room=Room(host=room.host, host_name="b"), offload=states
        )
        assert alone.fits
        assert elsewhere.fits
        assert complaints([elsewhere, apart]) == []
        if not pair.fits:
            assert word in pair.table()
    # Twice the same needs do not go into room for one and a half.
    need = ds_zero.memory_plan(model, 1, world_size=2, room=PLENTY).to_come("host")
    tight = Room(host=need * 3 // 2, host_name="a")
    plan = ds_zero.memory_plan(model, 1, world_size=2, local_ranks=2, room=tight)
    assert "2 ranks need" in plan.table()
    assert ds_zero.memory_plan(model, 1, world_size=2, room=tight).fits


@pytest.mark.parametrize(
    ("options", "room", "advice"),
    [
        ({"stage": 1}, {"host": 12}, "It would fit with update_in_backward."),
        ({"stage": 1, "max_grad_norm": 1.0}, {"host": 12}, "It would fit with stage 2."),
        ({"stage": 2, "max_grad_norm": 1.0}, {"host": 9}, "It would fit with stage 3."),
        ({"stage": 3, "max_grad_norm": 1.0}, {"host": 5.5}, 'the optimizer on "nvme"'),
        ({"stage": 3, "update_in_backward": True}, {"host": 2.5}, 'parameters on "nvme"'),
        ({"stage": 3, "device": "cuda", "max_grad_norm": 1.0}, {"device": 3}, 'optimizer on "cpu"'),
        ({"stage": 3}, {"host": 0.0001}, "No change known here makes it fit"),
    ],
)
def test_the_least_change_that_fits_is_named(options: dict, room: dict, advice: str):
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList([nn.Linear(600, 600)]) for _ in range(20))
    psi = sum(p.numel() for p in model.parameters())
    free = Room(**{place: int(factor * psi) for place, factor in room.items()})
    told = ds_zero.memory_plan(model, world_size=2, room=free, **options).table()
    assert advice in told


@pytest.mark.parametrize(
    "options",
    [
        {"offload": Offload(optimizer="cpu", speculative=True)},
        {"offload": Offload(optimizer="cpu", ratio="auto")},
        {"offload": Offload(optimizer="cpu"), "zenflow": ZenFlow()},
    ],
    ids=["speculative", "auto", "zenflow"],
)
@pytest.mark.parametrize("place", ["device", "host"])
def test_advice_is_what_shard_takes(options: dict, place: str):
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList([nn.Linear(600, 600)]) for _ in range(20))
    needs = ds_zero.memory_plan(model, 2, world_size=4, device="cuda", room=PLENTY, **options)
    told = []
    for share in (0.9, 0.5, 0.2, 0.05):
        free = Room(**{place: int(needs.needed(place) * share)})
        plan = ds_zero.memory_plan(model, 2, world_size=4, device="cuda", room=free, **options)
        told.append(plan.advice)
    assert all(told), "what does not fit has advice"
    text = " ".join(told)
    assert "It would fit with" in text
    assert "update_in_backward" not in text or 'the optimizer on "nvme"' in text
    assert '"nvme"' not in text or options["offload"].ratio == "auto"


def test_twin_flow_that_measures_needs_room_for_either_end():
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList([nn.Linear(600, 600)]) for _ in range(20))
    plans = {
        ratio: ds_zero.memory_plan(
            model, 2, device="cuda", room=PLENTY, offload=Offload(optimizer="cpu", ratio=ratio)
        )
        for ratio in ("auto", 0.0, 1.0)
    }
    moving = plans["auto"].moving
    for place, ratio in (("device", 0.0), ("host", 1.0)):
        most = plans[ratio].persistent(place) + plans[ratio].buffers["host"] * (place == "host")
        now = plans["auto"].persistent(place) + plans["auto"].buffers["host"] * (place == "host")
        assert now + moving[place] == most
    assert "if states move" in plans["auto"].table()


def test_local_accumulation_keeps_the_gradients_of_all_units():
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList([nn.Linear(600, 600)]) for _ in range(20))
    options = {"world_size": 2, "device": "cuda", "room": PLENTY, "update_in_backward": True}
    one = ds_zero.memory_plan(model, 2, **options).transient["device"]
    two = ds_zero.memory_plan(model, 2, accumulation=2, **options).transient["device"]
    assert two > 10 * one


def test_who_scales_gradients_is_not_told_to_update_in_backward():
    assert "with update_in_backward." in run_ranks(1, refused_with_clipping, False)[0]
    assert "update_in_backward" not in run_ranks(1, refused_with_clipping, True)[0]


def refused_with_clipping(scales: bool) -> str:
    model = nn.ModuleList(nn.ModuleList([nn.Linear(300, 300)]) for _ in range(20))
    psi = sum(p.numel() for p in model.parameters())
    with pytest.MonkeyPatch.context() as patch:
        room = Room(host=10 * psi, host_name="here")
        patch.setattr(ds_zero.preflight, "measure", lambda device, folders: room)
        with pytest.raises(ds_zero.ShardError) as caught:
            ds_zero.shard(model, adamw(model.parameters()), 1, scales_gradients=scales)
    return str(caught.value).rpartition("It would fit")[2]


def test_a_plan_of_choices_that_exclude_each_other_is_refused():
    with pytest.raises(ds_zero.ShardError, match="zenflow: it divides a step that the host takes"):
        ds_zero.memory_plan(Stack(), 2, zenflow=ZenFlow(), room=PLENTY)
    with pytest.raises(ds_zero.ShardError, match="accumulation: got 0, expected at least 1"):
        ds_zero.memory_plan(Stack(), 2, accumulation=0, room=PLENTY)


def test_the_plan_is_logged(caplog):
    (text,) = run_ranks(1, logged)
    assert "Memory of one rank: ZeRO stage 2, " in text
    assert "It fits." in text


def logged() -> str:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("ds_zero.preflight")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        sharded(CASES["stack"], 2)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return "\n".join(records)


class Strange(torch.optim.Optimizer):
    """Steps only on matrices."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure=None):
        raise RuntimeError("no matrix")


def test_an_optimizer_that_cannot_be_tried_counts_as_nothing_and_says_so(caplog):
    model = Stack()
    optimizer = Strange(model.parameters())
    plan = ds_zero.memory_plan(model, 1, optimizer=optimizer, room=PLENTY)
    assert plan.held["host"]["optimizer"] == 0
    assert "what Strange keeps per parameter is not known" in caplog.text
    assert not optimizer.state


def test_finding_out_what_an_optimizer_keeps_leaves_no_trace():
    model, seen = Stack(), []
    optimizer = adamw(model.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    ds_zero.memory_plan(model, 1, optimizer=optimizer, room=PLENTY)
    assert not optimizer.state
    assert seen == []
    assert schedule.last_epoch == 0
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": 0}, "stage: got 0, expected 1, 2 or 3"),
        ({"stage": 1, "world_size": 2, "rank": 2}, "rank: got 2 of world_size 2"),
        ({"stage": 1, "offload": Offload(parameters="cpu")}, "use stage 3"),
    ],
)
def test_a_plan_of_nonsense_is_refused(wrong: dict, message: str):
    with pytest.raises(ds_zero.ShardError, match=message):
        ds_zero.memory_plan(Stack(), **wrong)


# ---------------------------------------------------------------------- what is free


def test_cgroups_of_both_versions_bound_the_room(monkeypatch, tmp_path):
    proc, tree = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self/status").write_text("VmSize: 100 kB\nVmData: 50 kB\n")
    monkeypatch.setattr(rooms, "_PROC", proc)
    monkeypatch.setattr(rooms, "_CGROUPS", tree)

    def free() -> int | None:
        return rooms.measure(torch.device("cpu")).host

    (proc / "self/cgroup").write_text("")
    assert free() == 8000 * 1024
    inner = tree / "job/step"
    inner.mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/job/step\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("1000\n")
    assert free() == 8000 * 1024
    (tree / "job/memory.max").write_text("500000\n")
    (tree / "job/memory.current").write_text("300000\n")
    (tree / "job/memory.stat").write_text("anon 5\ninactive_file 40000\nactive_file 2000\n")
    assert free() == 242000
    old = tree / "memory/old"
    old.mkdir(parents=True)
    (proc / "self/cgroup").write_text("4:memory:/old\n")
    (old / "memory.limit_in_bytes").write_text("100000\n")
    (old / "memory.usage_in_bytes").write_text("99000\n")
    (old / "memory.stat").write_text("total_inactive_file 500\ntotal_active_file 7\n")
    assert free() == 1507
    # As inside a container: the path is not of this tree.
    (proc / "self/cgroup").write_text("4:memory:/elsewhere/entirely\n")
    (tree / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tree / "memory/memory.usage_in_bytes").write_text("5\n")
    assert free() == 8000 * 1024


def test_the_nearest_folder_that_exists_tells_how_full_a_disk_is(tmp_path):
    found = rooms.measure(torch.device("cpu"), [str(tmp_path / "a/b"), str(tmp_path)])
    assert [size > 0 for _, size in found.disks] == [True, True]
    assert len({name for _, name in found.disk_ids}) == 1


def test_a_file_larger_than_the_limit_is_refused(tmp_path):
    offload = Offload(optimizer="nvme", folder=str(tmp_path))
    plan = ds_zero.memory_plan(Stack(), 1, offload=offload, room=Room(file=900))
    assert "this process may write files of 900 B (ulimit -f)" in plan.table()
    assert not plan.fits


def test_the_mesh_of_the_world_is_asked_once(monkeypatch):
    (calls,) = run_ranks(1, count_exchanges)
    assert calls == 1


def count_exchanges() -> int:
    seen: list[str] = []
    gather = comm.all_gather_object

    def counted(value, group, caller=""):
        seen.append(caller)
        return gather(value, group, caller=caller)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "all_gather_object", counted)
        sharded(CASES["stack"], 1)
    return seen.count("memory plan")
