"""The seams' own small parts: protocols at run time, where a loss is found, and their choice."""

from __future__ import annotations

import types
from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm, plugins
from ds_core.errors import ConfigError, DsError
from ds_core.observers import JsonLines, Metrics, Progress
from ds_core.replicated import Replicated
from ds_core.seams import Dense, Event, EventKind, Observer, Runner, Sequential, Sharding, Transport
from ds_core.seams.runner import loss_of


@pytest.fixture(autouse=True)
def own_process_group():
    yield
    comm.shutdown()


def test_the_defaults_satisfy_their_protocols(tmp_path):
    assert isinstance(Sequential(), Runner)
    assert isinstance(Dense(), Transport)
    assert isinstance(Progress(), Observer)
    assert isinstance(Metrics([JsonLines(tmp_path / "m.jsonl")]), Observer)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert isinstance(Replicated(model, optimizer, mesh=comm.Mesh.world()), Sharding)
    assert not isinstance(object(), Observer)


@pytest.mark.parametrize(
    "output",
    [
        torch.tensor(2.0),
        torch.tensor([2.0]),
        (torch.tensor(2.0), torch.ones(3)),
        [torch.tensor(2.0)],
        {"loss": torch.tensor(2.0), "logits": torch.ones(3)},
        types.SimpleNamespace(loss=torch.tensor(2.0)),
    ],
    ids=["scalar", "one-element", "tuple", "list", "dict", "attribute"],
)
def test_a_loss_is_found_in_what_models_return(output):
    assert float(loss_of(output)) == 2.0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.ones(2, 2), r"got Tensor with a tensor of shape \[2, 2\]"),
        ({"logits": torch.ones(2)}, "got dict"),
        ((), "got tuple"),
        (None, "got NoneType"),
        (1.5, "got float"),
    ],
    ids=["matrix", "dict", "empty", "none", "number"],
)
def test_what_holds_no_scalar_loss_is_an_error(output, message):
    with pytest.raises(DsError, match=f"must return a scalar loss.*{message}"):
        loss_of(output)


def test_events_are_values():
    assert Event(EventKind.START, 0) == Event(EventKind.START, 0, {})
    with pytest.raises(AttributeError):
        Event(EventKind.START, 0).step = 1


# ---------------------------------------------------------------------------- entry points


class CountingRunner(Sequential):
    def __init__(self):
        self.runs = 0

    def run(self, engine, batches):
        self.runs += 1
        return super().run(engine, batches)


CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "progress": False,
}


class Net(nn.Linear):
    def forward(self, x):
        return super().forward(x).square().mean()


@pytest.fixture
def provide(monkeypatch):
    """Makes packages register `made` for a seam under names of config sections."""
    entry_points = plugins.entry_points

    def register(seam, made, names=("checkpoint",)):
        class Entry(EntryPoint):
            def load(self):
                return made

        entries = [Entry(name, f"m:{name}", f"ds_core.{seam}") for name in names]

        def patched(group):
            return entries if group == f"ds_core.{seam}" else entry_points(group=group)

        monkeypatch.setattr(plugins, "entry_points", patched)

    return register


def test_a_registered_runner_runs_the_steps(provide):
    runner = CountingRunner()
    provide("runners", lambda *, section, model, mesh: runner)
    engine = ds_core.initialize(Net(3, 1), CONFIG)
    engine.train_batch(iter([torch.ones(2, 3)]))
    assert runner.runs == 1


def test_one_that_wants_nothing_leaves_the_default(provide):
    provide("runners", lambda *, section, model, mesh: None)
    engine = ds_core.initialize(Net(3, 1), CONFIG)
    assert torch.isfinite(engine.train_batch(iter([torch.ones(2, 3)])))


def test_a_registered_transport_carries_the_gradients(provide):
    made = []

    def factory(*, section, mesh):
        made.append(Dense())
        return made[0]

    provide("transports", factory)
    engine = ds_core.initialize(Net(3, 1), CONFIG)
    engine.train_batch(iter([torch.ones(2, 3)]))
    assert len(made) == 1


def test_a_registered_observer_watches(provide):
    events = []

    class Watch:
        def on_event(self, engine, event):
            events.append(event.kind)

    provide("observers", lambda config: Watch())
    ds_core.initialize(Net(3, 1), CONFIG)
    assert events == [EventKind.START]


def test_two_sections_that_ask_for_one_seam_are_an_error(provide):
    provide("runners", lambda *, section, model, mesh: Sequential(), ("checkpoint", "metrics"))
    with pytest.raises(ConfigError, match="checkpoint and metrics: each asks for its own runners"):
        ds_core.initialize(Net(3, 1), CONFIG)
