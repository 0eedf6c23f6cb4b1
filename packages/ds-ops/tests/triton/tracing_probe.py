"""Prints what torch.compile sees of some functions on a GPU that need not be there, as JSON."""

from __future__ import annotations

import json

import torch
import triton
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import ds_ops
from ds_core import ops
from ds_ops.triton_kernels import norms, targets


class Driver:
    """Of an H200."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class SeenError(Exception):
    """The graph is there, and nothing can run it."""


def graph_of(function, *shapes):
    """The operators of the graph, and the kernels in Triton, that a function becomes."""
    found = []

    def keep(graph, inputs):
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        raise SeenError

    with FakeTensorMode():
        inputs = [torch.empty(s, device="cuda", dtype=torch.bfloat16) for s in shapes]
        try:
            aot_function(function, fw_compiler=keep)(*inputs)
        except SeenError:
            return found
    raise AssertionError("no graph")


def sparse(name, *tensors):
    """An op over a layout; what is in it does not matter."""
    layout = torch.ones(1, 4, 4, dtype=torch.bool, device="cuda")
    plan = torch.zeros(99, dtype=torch.int32, device="cuda")
    return ops.run(name, *tensors, layout, plan, plan, 16, False, 0.1)[0]


def main():
    targets.architecture = lambda *_: "sm_90"
    norms.processors = lambda _: 132
    triton.runtime.driver.set_active(Driver())
    backward = (torch.ops.ds_ops, "rms_norm_backward")
    ops.define(backward[1])
    found = {
        "chosen": {name: ops.choose(name, "cuda").implementation.name for name in ops.names()},
        "block": graph_of(lambda x, w: ds_ops.swiglu(ds_ops.rms_norm(x, w), x), (4, 64), (64,)),
        "backward": graph_of(
            lambda g, x, w, s: getattr(*backward).default(g, x, w, s.float(), None)[0],
            *((4, 64), (4, 64), (64,), (4,)),
        ),
        "sparse": graph_of(lambda q: sparse("sparse_attention", q, q, q), (1, 2, 64, 32)),
        "sparse backward": graph_of(
            lambda q: sparse("sparse_attention_backward", q, q, q, q, q, q.float().sum(-1)),
            (1, 2, 64, 32),
        ),
        "in place": graph_of(
            lambda x, c: ds_ops.rope(x, c, c, in_place=True), (1, 4, 2, 32), (4, 8)
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
