"""When a backward begins and ends, and which outputs it may start from."""

from __future__ import annotations

import collections
import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ds_core.backward import BackwardWatch, differentiable_tensors, map_differentiable

Pair = collections.namedtuple("Pair", "one two")


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: object
    count: int = 3


def grad(value=1.0):
    return torch.tensor(value, requires_grad=True) * 1


class Log:
    def __init__(self, model):
        self.events = []
        self.watch = BackwardWatch(model, self.begin, self.end)

    def begin(self):
        self.events.append("begin")

    def end(self):
        self.events.append("end")


# ---------------------------------------------------------------------------- trees


def test_differentiable_tensors_are_found_in_any_nest():
    one, two, three = grad(1.0), grad(2.0), grad(3.0)
    tree = {"a": [one, torch.ones(1)], "b": (Frozen({"c": two}), "text", None), "d": Pair(three, 4)}
    assert [t.item() for t in differentiable_tensors(tree)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: [t, 1],
        lambda t: (t, 1),
        lambda t: Pair(t, 1),
        lambda t: {"loss": t},
        lambda t: collections.OrderedDict(loss=t),
        lambda t: Frozen(t),
        lambda t: Frozen([{"x": Pair(t, None)}]),
    ],
    ids=["tensor", "list", "tuple", "namedtuple", "dict", "ordered", "dataclass", "nest"],
)
def test_mapping_keeps_the_structure_and_leaves_the_original(make):
    tensor = grad(2.0)
    tree = make(tensor)
    mapped = map_differentiable(tree, lambda t: t * 10)
    assert type(mapped) is type(tree)
    assert [t.item() for t in differentiable_tensors(mapped)] == [20.0]
    assert differentiable_tensors(tree)[0] is tensor


def test_mapping_returns_what_holds_nothing_differentiable_itself():
    tree = {"a": [torch.ones(1)], "b": Frozen(None)}
    assert map_differentiable(tree, lambda t: t * 10) is tree


def test_one_tensor_in_two_places_is_mapped_once():
    tensor, calls = grad(), []
    mapped = map_differentiable([tensor, {"again": tensor}], lambda t: calls.append(t) or t * 2)
    assert len(calls) == 1
    assert mapped[0] is mapped[1]["again"]


# ---------------------------------------------------------------------------- the watch


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))


def test_each_backward_begins_and_ends_once():
    net = model()
    log = Log(net)
    for _ in range(2):
        net(torch.ones(1, 2)).sum().backward()
    assert log.events == ["begin", "end"] * 2
    assert not log.watch.running


def test_two_forwards_and_one_backward_are_one():
    net = model()
    log = Log(net)
    (net(torch.ones(1, 2)).sum() + net(torch.zeros(1, 2)).sum()).backward()
    assert log.events == ["begin", "end"]


def test_forward_without_gradients_begins_nothing():
    net = model()
    log = Log(net)
    with torch.no_grad():
        net(torch.ones(1, 2))
    assert log.events == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_belongs_to_the_backward_it_is_in(reentrant):
    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=reentrant)

    net = Recomputed()
    log = Log(net)
    net(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert log.events == ["begin", "end"]


def test_a_backward_that_failed_is_forgotten():
    net = model()
    log = Log(net)

    def fail(gradient):
        raise ValueError("from a hook")

    handle = net[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="from a hook"):
        net(torch.ones(1, 2)).sum().backward()
    handle.remove()
    assert not log.watch.running
    net(torch.ones(1, 2)).sum().backward()
    assert log.events[-2:] == ["begin", "end"]
    assert log.events.count("end") == 1


def test_close_removes_the_hooks():
    net = model()
    log = Log(net)
    log.watch.close()
    net(torch.ones(1, 2)).sum().backward()
    assert log.events == []
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_the_watch_keeps_nobody_alive():
    net = model()
    log = Log(net)
    watched = [weakref.ref(log), weakref.ref(log.watch)]
    del log
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    net(torch.ones(1, 2)).sum().backward()
