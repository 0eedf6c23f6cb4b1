"""Messages, groups, timers and small helpers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import deepspeed
from deepspeed import utils
from deepspeed._errors import NotProvidedError
from deepspeed.utils import groups
from deepspeed.utils.logging import LogLevelError, get_dist_msg, should_log_le, warning_once
from deepspeed.utils.timer import SynchronizedWallClockTimer
from ds_core.errors import DsError, LaunchError
from ds_core.testing import run_ranks


@pytest.fixture
def level():
    before = deepspeed.logger.level
    yield
    utils.set_log_level_from_string(logging.getLevelName(before).lower(), deepspeed.logger)
    for name in ("ds_core", "ds_ops", "ds_zero"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_the_logger_is_one_and_quiet_by_default(capsys, level):
    assert utils.logger is deepspeed.logger is logging.getLogger("DeepSpeed")
    assert deepspeed.logger.level == logging.WARNING
    utils.log_dist("hidden", ranks=[0])
    utils.set_log_level_from_string("info")
    assert should_log_le("info")
    utils.log_dist("shown", ranks=[0])
    utils.log_dist_once("told once", ranks=[-1])
    utils.log_dist_once("told once", ranks=[-1])
    warning_once("warned %s", "once")
    deepspeed.logger.warning_once("warned %s", "once")
    out = capsys.readouterr().out
    assert "[Rank -1] shown" in out
    assert "hidden" not in out
    assert out.count("told once") == out.count("warned once") == 1
    assert logging.getLogger("ds_core").level == logging.INFO


def test_a_level_that_does_not_exist():
    with pytest.raises(LogLevelError, match="got 'loud', expected one of debug, info"):
        utils.set_log_level_from_string("loud")


def told():
    rank = deepspeed.comm.get_rank()
    return [get_dist_msg("x", ranks) for ranks in ([0], [-1], None, [rank])]


def test_ranks_speak_when_they_are_named():
    first, second = run_ranks(2, told)
    assert first == ["[Rank 0] x", "[Rank 0] x", None, "[Rank 0] x"]
    assert second == [None, "[Rank 1] x", None, "[Rank 1] x"]


class Mpu:
    """Two model-parallel ranks out of four; sequences shared by the same two."""

    def __init__(self):
        rank = deepspeed.comm.get_rank()
        comm = deepspeed.comm
        model = [comm.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        data = [comm.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        self.model, self.data = model[rank // 2], data[rank % 2]

    def get_model_parallel_group(self):
        return self.model

    def get_model_parallel_world_size(self):
        return 2

    def get_model_parallel_rank(self):
        return deepspeed.comm.get_rank(self.model)

    def get_data_parallel_group(self):
        return self.data

    def get_sequence_parallel_group(self):
        return self.model

    def get_sequence_parallel_world_size(self):
        return 2

    def get_sequence_parallel_rank(self):
        return deepspeed.comm.get_rank(self.model)


def grouped():
    rank = deepspeed.comm.get_rank()
    plain = (
        groups._get_data_parallel_world_size(),
        groups._get_data_parallel_rank(),
        groups._get_model_parallel_world_size(),
        groups._get_sequence_parallel_world_size(),
        groups._get_sequence_parallel_rank(),
        groups._get_sequence_data_parallel_world_size(),
    )
    assert plain == (4, rank, 1, 1, 0, 4)
    assert groups._get_data_parallel_group_ranks() == [0, 1, 2, 3]
    with pytest.raises(NotProvidedError, match="no sequence-parallel group"):
        groups._get_sequence_parallel_group()
    with pytest.raises(NotProvidedError, match="no model-parallel group"):
        groups.get_model_parallel_group()
    with pytest.raises(NotProvidedError, match="ds-moe"):
        groups._get_expert_parallel_group("ep_size_2")
    groups.mpu = Mpu()
    assert groups._get_data_parallel_group_ranks() == ([0, 2] if rank % 2 == 0 else [1, 3])
    assert groups._get_model_parallel_world_size() == groups.get_model_parallel_world_size() == 2
    assert groups.get_model_parallel_rank() == groups._get_sequence_parallel_rank() == rank % 2
    assert groups._get_sequence_parallel_group() is groups.mpu.model
    assert groups._get_broadcast_src_rank() == rank % 2
    groups.mpu = None
    names = ("data_parallel", "sequence_parallel")
    groups.mesh_device = deepspeed.comm.initialize_mesh_device((2, 2), names)
    assert groups._get_sequence_parallel_world_size() == groups._get_data_parallel_world_size() == 2
    assert groups._get_data_parallel_rank() == rank // 2
    groups.mesh_device = None


def test_groups_are_those_of_the_mpu_or_the_mesh_or_all():
    run_ranks(4, grouped)


def test_on_device_sets_dtype_and_device_inside_its_block():
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = nn.Linear(2, 3)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.bfloat16, "meta")
    with deepspeed.OnDevice(dtype=torch.float64, enabled=False):
        assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"


def test_nvtx_ranges_leave_a_function_as_it_is():
    @utils.instrument_w_nvtx
    def add(a, b):
        """Adds."""
        return a + b

    assert add(1, b=2) == 3
    assert (add.__name__, add.__doc__) == ("add", "Adds.")


def test_attributes_by_dotted_names():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    assert utils.recursive_getattr(model, "0.0") is model[0][0]
    utils.recursive_setattr(model, "0.0", nn.ReLU())
    assert isinstance(model[0][0], nn.ReLU)
    utils.recursive_setattr(model, "name", "m")
    assert model.name == "m"


def test_numactl_words_are_those_of_the_share():
    cores, command = utils.get_numactl_cmd(None, 1, 0)
    assert cores >= 1
    assert command[0] == "numactl"
    assert "-C" in command
    with pytest.raises(LaunchError, match="need at least as many cores"):
        utils.get_numactl_cmd(None, 10_000, 0)


def test_timers_add_up():
    timers = SynchronizedWallClockTimer()
    for _ in range(2):
        timers("step").start()
        timers("step").stop()
    with pytest.raises(DsError, match="does not run"):
        timers("step").stop()
    timers("step").start()
    with pytest.raises(DsError, match="runs already"):
        timers("step").start()
    assert timers("step").elapsed(reset=False) > 0
    assert timers.get_mean(["step", "none"])["step"] > 0
    assert timers("step").elapsed() == 0


def test_timers_are_written_on_rank_0(capsys):
    timers = SynchronizedWallClockTimer()
    timers("a").start()
    timers("a").stop()
    timers.log(["a"])
    assert "time (ms) | a: " in capsys.readouterr().out
