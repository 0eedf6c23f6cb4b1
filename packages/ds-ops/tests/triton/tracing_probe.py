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
from ds_ops.triton_kernels import norms, targets, weight_only_linear


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


def main():
    targets.architecture = lambda *_: "sm_90"
    norms.processors = weight_only_linear.processors = lambda _: 132
    triton.runtime.driver.set_active(Driver())
    backward = (torch.ops.ds_ops, "rms_norm_backward")
    ops.define(backward[1])
    layer = ds_ops.WeightOnlyLinear.from_linear(torch.nn.Linear(2048, 48), "int4", group=128)

    def on_gpu(x, scales, bias):
        codes = torch.empty(layer.codes.shape, dtype=torch.int32, device=x.device)
        moved = {"codes": codes, "scales": scales, "bias": bias}
        return torch.func.functional_call(layer, moved, (x,))

    def quantized_backward(grad, scales):
        codes = torch.empty((40, 2048, 16), dtype=torch.uint8, device=grad.device)
        name = "weight_only_linear_backward"
        return ops.run(name, grad, codes, scales, None, 2048, 8)

    rest = (layer.scales.shape, layer.bias.shape)
    found = {
        "quantized": graph_of(on_gpu, (5, 128 * 16), *rest),
        "quantized, one row": graph_of(on_gpu, (1, 128 * 16), *rest),
        "quantized, backward": graph_of(quantized_backward, (130, 640), (40, 16, 16)),
        "chosen": {name: ops.choose(name, "cuda").implementation.name for name in ops.names()},
        "block": graph_of(lambda x, w: ds_ops.swiglu(ds_ops.rms_norm(x, w), x), (4, 64), (64,)),
        "backward": graph_of(
            lambda g, x, w, s: getattr(*backward).default(g, x, w, s.float(), None)[0],
            *((4, 64), (4, 64), (64,), (4,)),
        ),
        "in place": graph_of(
            lambda x, c: ds_ops.rope(x, c, c, in_place=True), (1, 4, 2, 32), (4, 8)
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
