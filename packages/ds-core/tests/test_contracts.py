"""ds-core's own defaults pass the contracts that it publishes, and broken ones do not."""

from __future__ import annotations

import pytest
import torch

import ds_core
from ds_core.alone import Alone
from ds_core.cast_gradients import CastGradients
from ds_core.errors import DsError
from ds_core.observers import JsonLines, MemoryByPhase, Metrics, Progress, Throughput
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


class WrongNorm:
    op, name = "rms_norm", "wrong"

    def unavailable(self, device, dtype):
        return None if dtype == torch.float32 else "float32 only"

    def __call__(self, x, weight, eps=1e-6):
        out = torch.empty_like(x)  # the last row is left as it was found
        out[:-1] = ds_core.ops.run("rms_norm", x, weight, eps=eps, impl="reference")[:-1]
        return out


def test_an_implementation_that_leaves_an_element_unwritten_is_caught():
    class Broken(OpContract):
        op = "rms_norm"
        implementations = staticmethod(lambda: [WrongNorm()])

    with pytest.raises(AssertionError, match="rms_norm by wrong on cpu"):
        Broken().test_forward_equals_the_reference()


def test_a_contract_without_a_factory_says_so():
    class Empty(ShardingContract):
        pass

    with pytest.raises(DsError, match="Empty: no factory"):
        Empty().test_steps_equal_plain_pytorch()
