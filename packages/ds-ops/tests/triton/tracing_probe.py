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
from ds_core.ops import adam_step, lamb_update, step_undo
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
    return ops.run(name, *tensors, layout, plan, plan, 16, False, 0.1)


def step(param, grad, mean, square, copy):
    """A step of Adam with all that it can do, taken back."""
    undo = torch.empty(param.numel() * 6, dtype=torch.uint8, device=param.device)
    flag = torch.zeros((), device=param.device)
    options = {"copy": copy, "undo": undo, "grad_scale": flag, "found_inf": flag, "seed": 7}
    adam_step.adam_step_(param, grad, mean, square, step=3, lr=0.1, **options)
    step_undo.step_undo_(param, [mean, square], undo, copy)
    return param


def lamb(param, grad, mean, square):
    update = torch.empty_like(param, dtype=torch.float32)
    squares = lamb_update.lamb_update_(param, grad, mean, square, update, step=3)
    lamb_update.lamb_apply_(param, update, 0.1, ratio=squares.sum())
    return param


def routed(x, logits, experts):
    """A layer of experts, of fp16: torch's own products are of bf16."""
    routing = ds_ops.moe_gate(logits, 2)
    rows, offsets, row_map = ds_ops.moe_permute(x.half(), routing.indices, 8)
    out = ds_ops.grouped_mm(rows, experts.half(), offsets.narrow(0, 1, 8))
    return ds_ops.moe_unpermute(out, row_map, routing.weights)


def computed_by(name):
    """Who computes an op on it; of several, each the calls that those before do not take."""
    choice = ops.choose(name, "cuda")
    return [each.name for each in (choice.implementation, *choice.rest)]


def quantized_there_and_back(x):
    q = ds_ops.quantize(x, "int4", block=32, rounding="stochastic", seed=3)
    pieces = q._replace(codes=q.codes.unsqueeze(0), scales=q.scales.unsqueeze(0))
    return ds_ops.dequantize(ds_ops.quantized_reduce(pieces, mean=True))


def main():
    targets.architecture = lambda *_: "sm_90"
    norms.processors = lambda _: 132
    triton.runtime.driver.set_active(Driver())
    backward = (torch.ops.ds_ops, "rms_norm_backward")
    ops.define(backward[1])
    found = {
        "chosen": {name: computed_by(name) for name in ops.names()},
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
        "experts": graph_of(routed, (4, 64), (4, 8), (8, 64, 32)),
        "codes": graph_of(quantized_there_and_back, (4, 64)),
        "long group": graph_of(lambda x: ds_ops.fake_quantize(x, 4), (4, 2048)),
        "long ternary group": graph_of(
            lambda x: ds_ops.fake_quantize(x, 2, scheme="ternary"), (4, 2048)
        ),
        "long chunk": graph_of(lambda x, e: ds_ops.sign_pack(x, error=e), (4, 2048), (4, 2048)),
        "in place": graph_of(
            lambda x, c: ds_ops.rope(x, c, c, in_place=True), (1, 4, 2, 32), (4, 8)
        ),
        "step": graph_of(step, *[(64,)] * 5),
        "lamb": graph_of(lamb, *[(64,)] * 4),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
