"""What every `Runner` must do: one optimizer step per call, whose loss is the mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_core.engine import Engine
from ds_core.errors import DsError
from ds_core.testing.contracts.base import Contract
from ds_core.testing.contracts.model import (
    ContractModel,
    PlainTraining,
    assert_same_tensors,
    batch,
    optimizer_of,
)

Factory = Callable[..., Engine]


class RunnerContract(Contract):
    """Inherit to test a runner.

    `factory(model, optimizer, accumulation)` returns an `Engine` that uses the runner, on the
    model given (or one that computes the same) in fp32, without clipping.
    """

    @pytest.mark.parametrize("accumulation", [1, 3])
    def test_steps_equal_plain_pytorch(self, accumulation: int) -> None:
        self.run(_steps_equal_plain, accumulation)

    def test_it_takes_exactly_the_batches_of_a_step(self) -> None:
        self.run(_takes_what_it_needs)

    @pytest.mark.parametrize("num_batches", [0, 2])
    def test_data_that_ends_within_a_step_is_an_error(self, num_batches: int) -> None:
        self.run(_refuses_short_data, num_batches)


def _engine(factory: Factory, accumulation: int) -> Engine:
    model = ContractModel()
    return factory(model, optimizer_of(model), accumulation)


def _batches(start: int = 0) -> Iterator[Any]:
    step = start
    while True:
        yield batch(step, dist.get_rank())
        step += 1


def _steps_equal_plain(factory: Factory, accumulation: int) -> None:
    engine, data = _engine(factory, accumulation), _batches()
    plain = PlainTraining(dist.get_world_size())
    for step in range(3):
        micro_steps = range(step * accumulation, (step + 1) * accumulation)
        with torch.no_grad():
            mine = [plain.model(*batch(number, dist.get_rank())) for number in micro_steps]
        loss = engine.train_batch(data)
        assert not loss.requires_grad
        assert float(loss) == pytest.approx(float(torch.stack(mine).mean()), rel=1e-4)
        plain.backward(micro_steps, weight=1 / accumulation)
        plain.step()
        assert engine.global_step == step + 1
    state = engine.state_dict()
    assert_same_tensors({name: state[name] for name in plain.parameters()}, plain.parameters())


def _takes_what_it_needs(factory: Factory) -> None:
    engine, data = _engine(factory, 2), _batches()
    engine.train_batch(data)
    x, _ = next(data)
    assert torch.equal(x, batch(2, dist.get_rank())[0])


def _refuses_short_data(factory: Factory, num_batches: int) -> None:
    engine = _engine(factory, 3)
    with pytest.raises(DsError, match=f"ended after {num_batches} of 3"):
        engine.train_batch(iter([batch(step, 0) for step in range(num_batches)]))
    assert engine.global_step == 0
