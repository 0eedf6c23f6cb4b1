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
from ds_core.ops import adam_step, attention, lamb_update, step_undo
from ds_ops.triton_kernels import (
    bias_activation,
    evoformer_attention,
    norms,
    paged_attention,
    targets,
    weight_only_linear,
)


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


def windowed(q, k, v):
    """What torch's kernels do not take there."""
    return ds_ops.attention(q, k, v, causal=True, window=3)


def windowed_gradient(grad, q, k, v):
    _, lse = attention.fake(q, k, v, None, None, 0.1, 2, 0)
    arguments = (grad, None, q, k, v, q, lse, None, None, 0.1, 2, 0)
    return ops.run("attention_backward", *arguments)[1]


def on_gpu(layer):
    """A layer whose weight is packed, with its buffers on the GPU."""

    def call(x, scales, bias):
        codes = torch.empty(layer.codes.shape, dtype=torch.int32, device=x.device)
        moved = {"codes": codes, "scales": scales, "bias": bias}
        return torch.func.functional_call(layer, moved, (x,))

    return call


def quantized_backward(grad, scales):
    codes = torch.empty((40, 2048, 16), dtype=torch.uint8, device=grad.device)
    return ops.run("weight_only_linear_backward", grad, codes, scales, None, 2048, 8)


def decode(q, k, v):
    """One token of one long sequence, as it is written, attended to and drawn."""
    shapes = ((1, 64), (1,), (2,))
    lists = (torch.zeros(shape, device="cuda", dtype=torch.int32) for shape in shapes)
    caches = (torch.zeros(64, 16, 2, 128, device="cuda").to(torch.float8_e4m3fn) for _ in "kv")
    k_cache, v_cache = caches
    tables = (torch.zeros(9, 64, device="cuda") for _ in range(2))
    place = torch.zeros(1, device="cuda", dtype=torch.int64)
    ds_ops.rope_write_kv_cache(q, k, v, *tables, place, k_cache, v_cache, place)
    out = ds_ops.paged_attention(q, k_cache, v_cache, *lists)
    return ds_ops.sample_tokens(out.flatten(1), seeds=1, positions=2, top_k=5, top_p=0.5)[0]


def main():
    targets.architecture = lambda *_: "sm_90"
    for module in (
        bias_activation,
        evoformer_attention,
        norms,
        paged_attention,
        weight_only_linear,
    ):
        module.processors = lambda _: 132
    triton.runtime.driver.set_active(Driver())
    backward = (torch.ops.ds_ops, "rms_norm_backward")
    evoformer = (torch.ops.ds_ops, "evoformer_attention_backward")
    ops.define(backward[1])
    ops.define(evoformer[1])
    residues = (1, 3, 20, 2, 8)
    layer = ds_ops.WeightOnlyLinear.from_linear(torch.nn.Linear(2048, 48), "int4", group=128)
    packed = (layer.scales.shape, layer.bias.shape)
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
        "evoformer": graph_of(
            ds_ops.evoformer_attention, *[residues] * 3, (1, 3, 1, 1, 20), (1, 1, 2, 20, 20)
        ),
        "evoformer backward": graph_of(
            lambda *t: getattr(*evoformer).default(*t[:-1], t[-1].float(), 0.5, [True, True]),
            *([residues] * 4 + [(1, 3, 1, 1, 20), (1, 1, 2, 20, 20), residues, (1, 3, 2, 20)]),
        ),
        "biases": graph_of(
            lambda x, b, n: (ds_ops.bias_activation(x, b, "relu"), ds_ops.nhwc_bias_add(n, b, n)),
            *((4, 6), (6,), (2, 6, 1, 1)),  # of one pixel: in either memory format
        ),
        "quantized": graph_of(on_gpu(layer), (5, 2048), *packed),
        "quantized, one row": graph_of(on_gpu(layer), (1, 2048), *packed),
        "quantized, backward": graph_of(quantized_backward, (130, 640), (40, 16, 16)),
        "in place": graph_of(
            lambda x, c: ds_ops.rope(x, c, c, in_place=True), (1, 4, 2, 32), (4, 8)
        ),
        "attention": graph_of(windowed, (2, 40, 4, 72), *[(2, 50, 2, 72)] * 2),
        "attention's gradient": graph_of(
            windowed_gradient, *[(2, 40, 4, 72)] * 2, *[(2, 50, 2, 72)] * 2
        ),
        "step": graph_of(step, *[(64,)] * 5),
        "lamb": graph_of(lamb, *[(64,)] * 4),
        "decode": graph_of(decode, (1, 8, 128), (1, 2, 128), (1, 2, 128)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
