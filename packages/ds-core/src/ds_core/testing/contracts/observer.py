"""What every `Observer` must do: take every event, and leave the training as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_core
from ds_core.errors import NonFiniteError
from ds_core.seams import Event, EventKind, Observer
from ds_core.testing.contracts.base import Contract
from ds_core.testing.contracts.model import (
    ContractModel,
    assert_same_tensors,
    batch,
    optimizer_of,
)

Factory = Callable[..., Observer]


class ObserverContract(Contract):
    """Inherit to test an observer that only watches.

    `factory(folder, rank)` returns the `Observer`; it may write into `folder`.
    """

    def test_it_has_every_member_of_the_protocol(self, tmp_path: Path) -> None:
        self.run(_is_an_observer, str(tmp_path), world_size=1)

    def test_it_takes_every_event(self, tmp_path: Path) -> None:
        self.run(_takes_every_event, str(tmp_path))

    def test_it_does_not_change_results(self, tmp_path: Path) -> None:
        self.run(_changes_nothing, str(tmp_path))

    def test_it_does_not_communicate(self, tmp_path: Path) -> None:
        self.run(_sends_nothing, str(tmp_path))

    def test_it_survives_a_step_that_fails(self, tmp_path: Path) -> None:
        self.run(_survives_failure, str(tmp_path))


class _Recorder:
    """Passes events on to an observer, and remembers their kinds."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.kinds: set[EventKind] = set()

    def on_event(self, engine: Any, event: Event) -> None:
        self.observer.on_event(engine, event)
        self.kinds.add(event.kind)


def _engine(*observers: Observer, accumulation: int = 2) -> ds_core.Engine:
    model = ContractModel()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "progress": False,
    }
    return ds_core.initialize(model, config, optimizer=optimizer_of(model), observers=observers)


def _train(engine: ds_core.Engine, steps: int = 3) -> list[float]:
    rank, losses = dist.get_rank(), []
    for step in range(steps):
        micro_batches = [batch(2 * step + part, rank) for part in range(engine.accumulation)]
        losses.append(float(engine.train_batch(iter(micro_batches))))
    return losses


def _is_an_observer(factory: Factory, folder: str) -> None:
    assert isinstance(factory(folder, 0), Observer)


def _takes_every_event(factory: Factory, folder: str) -> None:
    recorder = _Recorder(factory(folder, dist.get_rank()))
    engine = _engine(recorder)
    _train(engine)
    # A plain loop: the engine never sees its loss.
    for part in range(2):
        engine(*batch(part, dist.get_rank())).backward()
        engine.step()
    engine.log({"mine": 1.0})
    engine.save_checkpoint(f"{folder}/checkpoints")
    engine.load_checkpoint(f"{folder}/checkpoints")
    engine.close()
    assert recorder.kinds == set(EventKind)


def _changes_nothing(factory: Factory, folder: str) -> None:
    plain, watched = _engine(), _engine(factory(folder, dist.get_rank()))
    torch.manual_seed(0)
    expected, draw = _train(plain), torch.rand(())
    torch.manual_seed(0)
    assert _train(watched) == expected
    assert torch.equal(torch.rand(()), draw), "it used the random numbers of the training"
    assert_same_tensors(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


def _sends_nothing(factory: Factory, folder: str) -> None:
    plain, watched = _engine(), _engine(factory(folder, dist.get_rank()))
    for engine in (plain, watched):
        _train(engine)
    assert watched.mesh.ledger.rows() == plain.mesh.ledger.rows()


def _survives_failure(factory: Factory, folder: str) -> None:
    engine = _engine(factory(folder, dist.get_rank()), accumulation=1)
    x, y = batch(0, dist.get_rank())
    engine.backward(engine(x * float("nan"), y))
    with pytest.raises(NonFiniteError):
        engine.step()
    _train(engine)
    engine.close()
