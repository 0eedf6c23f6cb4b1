"""ds-core's own defaults pass the contracts that it publishes, and broken ones do not."""

from __future__ import annotations

import pytest
import torch

import ds_core
from ds_core import ops
from ds_core.alone import Alone
from ds_core.cast_gradients import CastGradients
from ds_core.errors import DsError
from ds_core.observers import JsonLines, MemoryByPhase, Metrics, Progress, Throughput
from ds_core.ops import library, registry
from ds_core.replicated import Replicated
from ds_core.seams import Dense
from ds_core.testing import (
    ObserverContract,
    OpContract,
    RankFailure,
    RunnerContract,
    ShardingContract,
    TransportContract,
)


def replicated(model, optimizer, *, mesh, precision):
    return Replicated(model, optimizer, mesh=mesh, precision=precision)


def alone(model, optimizer, *, mesh, precision):
    return Alone(model, optimizer, mesh=mesh, precision=precision)


def in_bf16():
    return CastGradients(Dense(), torch.bfloat16)


def sequential(model, optimizer, accumulation):
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "progress": False,
    }
    return ds_core.initialize(model, config, optimizer=optimizer)


def dense():
    return Dense()


def json_lines(folder, rank):
    sinks = [JsonLines(f"{folder}/metrics.jsonl")] if rank == 0 else []
    return Metrics(sinks, throughput=Throughput(breakdown=True))


def progress(folder, rank):
    return Progress(rank=rank, every_steps=1, throughput=Throughput(breakdown=True))


def memory_by_phase(folder, rank):
    return MemoryByPhase()


class TestReplicated(ShardingContract):
    factory = staticmethod(replicated)
    world_sizes = (1, 2, 3)


class TestAlone(ShardingContract):
    factory = staticmethod(alone)
    world_sizes = (1,)


class TestSequential(RunnerContract):
    factory = staticmethod(sequential)


class TestDense(TransportContract):
    factory = staticmethod(dense)


class TestCastGradients(TransportContract):
    factory = staticmethod(in_bf16)
    error = 2**-5


class TestRmsNorm(OpContract):
    op = "rms_norm"


class TestMetrics(ObserverContract):
    factory = staticmethod(json_lines)


class TestProgress(ObserverContract):
    factory = staticmethod(progress)


class TestMemoryByPhase(ObserverContract):
    factory = staticmethod(memory_by_phase)


class UnscaledReplicated(Replicated):
    def update(self, grad_scale=1.0):
        super().update()


def forgets_to_scale(model, optimizer, *, mesh, precision):
    return UnscaledReplicated(model, optimizer, mesh=mesh, precision=precision)


def test_a_sharding_that_ignores_the_scale_is_caught():
    class Broken(ShardingContract):
        factory = staticmethod(forgets_to_scale)

    with pytest.raises(RankFailure, match="not close"):
        Broken().test_update_scales_the_gradients()


class Halving(Dense):
    def all_reduce(self, tensor, group, *, caller):
        tensor.mul_(0.5)
        return super().all_reduce(tensor, group, caller=caller)


def halving():
    return Halving()


def test_a_transport_that_errs_is_caught():
    class Broken(TransportContract):
        factory = staticmethod(halving)

    with pytest.raises(RankFailure, match="off by"):
        Broken().test_all_reduce_delivers_the_sum_alike_on_all_ranks()


class Unwritten:
    """rms_norm that leaves the last row as it was found."""

    op, name, priority, devices = "rms_norm", "unwritten", 10, ()

    def unavailable(self, device_type):
        return None

    def state(self, device_type):
        return "python"

    def partly(self):
        return None

    def traced(self):
        return None

    def bind(self, namespace, device_type):
        library.bind_python(self.op, namespace, device_type, self._kernel)

    def _kernel(self, *args):
        y, *rest = ops.get("rms_norm").reference(*args)
        out = torch.empty_like(y)
        out[:-1] = y[:-1]
        return out, *rest


def test_an_implementation_that_leaves_an_element_unwritten_is_caught(monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda: (Unwritten(),))

    class Broken(OpContract):
        op = "rms_norm"

    with pytest.raises(AssertionError, match="rms_norm by unwritten on cpu"):
        Broken().test_results_equal_the_reference()
    registry._selected.cache_clear()


def test_a_contract_without_a_factory_says_so():
    class Empty(ShardingContract):
        pass

    with pytest.raises(DsError, match="Empty: no factory"):
        Empty().test_steps_equal_plain_pytorch()
