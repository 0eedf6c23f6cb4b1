"""Who computes an MoE layer on GPUs that need not be there, with tensors that have no data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ds_ops
from ds_core import ops
from ds_core.testing.contracts import OpContract
from ds_ops.torch_kernels import grouped_mm as torchs
from ds_ops.triton_kernels import targets

pytest.importorskip("triton", reason="triton is not installed")

from ds_ops.triton_kernels import fp8

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


class Seen(TorchDispatchMode):
    """Notes the ops of ours that are called."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ds_ops":
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["sm_80", "sm_90", "sm_100", "gfx942"])
def gpu(request, monkeypatch):
    """A GPU of some architecture, whose tensors have no data."""
    monkeypatch.setattr(targets, "architecture", lambda device_type, index=None: request.param)
    with FakeTensorMode():
        yield request.param


def empty(*shape, dtype=BF16, **options):
    return torch.empty(shape, device="cuda", dtype=dtype, **options)


def chosen(op, *args):
    return ops.choose(op, "cuda").for_call(args).name


class Context:
    """What an op keeps for its gradient. Torch's own engine needs a GPU for tensors of one."""

    saved_tensors: tuple[torch.Tensor | None, ...] = ()
    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    def set_materialize_grads(self, value):
        pass


def gradient(op, args, output, *grads):
    """The gradients of an op's arguments, by the ops that it says."""
    ctx, autograd = Context(), ops.get(op).autograd
    autograd.setup(ctx, args, output)
    return autograd.backward(ops.run, ctx, *grads)


def test_a_layer_is_made_of_our_ops(gpu):
    x, logits, experts = empty(64, 128), empty(64, 8), empty(8, 128, 256)
    with Seen() as seen:
        routing = ds_ops.moe_gate(logits, 2)
        permuted = ds_ops.moe_permute(x, routing.indices, 8)
        ends = permuted.offsets.narrow(0, 1, 8)
        out = ds_ops.grouped_mm(permuted.rows, experts, ends)
        y = ds_ops.moe_unpermute(out, permuted.row_map, routing.weights)
    assert seen.found == ["moe_gate", "moe_permute", "grouped_mm", "moe_unpermute"]
    with Seen() as seen:
        args = (out, permuted.row_map, routing.weights)
        dout, _, dweights = gradient("moe_unpermute", args, y, torch.empty_like(y))
        args = (permuted.rows, experts, ends)
        drows, dexperts, _ = gradient("grouped_mm", args, out, dout)
        dx, *_ = gradient("moe_permute", (x, routing.indices, 8, None), permuted, drows, None, None)
        args = (logits, 2, True, "softmax", None, 1, 1, 1.0)
        dlogits, *_ = gradient("moe_gate", args, routing, dweights, None, None, None)
    assert seen.found == [
        *("moe_unpermute_backward", "grouped_mm", "grouped_mm_backward"),
        *("moe_unpermute", "moe_gate_backward"),
    ]
    for found, like in ((dx, x), (dlogits, logits), (dexperts, experts)):
        assert (found.shape, found.dtype, found.device) == (like.shape, like.dtype, like.device)


def test_routing_is_ours_everywhere(gpu):
    for op in ("moe_gate", "moe_permute", "moe_unpermute"):
        for name in (op, f"{op}_backward"):
            if name in ops.names():
                assert chosen(name) == "triton"


def test_torch_computes_products_per_expert_where_it_has_a_kernel(gpu):
    a, grad, offsets = empty(64, 128), empty(64, 256), empty(8, dtype=torch.int32)
    has = "torch" if gpu in ("sm_90", "sm_100") else "triton"
    b = empty(8, 128, 256)
    assert chosen("grouped_mm", a, b, offsets) == has
    assert chosen("grouped_mm", grad, b.transpose(1, 2), offsets) == has
    assert chosen("grouped_mm_backward", a, grad, offsets) == has
    for wrong in (
        (a.half(), b.half()),
        (a.float(), b.float()),
        (empty(64, 100), empty(8, 100, 256)),
        (a, empty(8, 128, 252)),
        (a, torch.empty_strided((8, 128, 256), (65536, 512, 2), device="cuda", dtype=BF16)),
        (empty(0, 128), b),
        (empty(64 * 128 + 1).narrow(0, 1, 64 * 128).view(64, 128), b),
    ):
        assert chosen("grouped_mm", *wrong, offsets) == "triton"


def test_torch_computes_products_of_fp8_where_it_has_a_kernel(gpu):
    a, b = empty(64, 128, dtype=FP8), empty(8, 256, 128, dtype=FP8).transpose(1, 2)
    scales, offsets = (empty(64).float(), empty(8, 256).float()), empty(8, dtype=torch.int32)
    args = (a, b, *scales, offsets)
    assert chosen("grouped_mm_fp8", *args, BF16) == ("torch" if gpu == "sm_90" else "triton")
    assert chosen("grouped_mm_fp8", *args, torch.float16) == "triton"
    assert chosen("grouped_mm_fp8", a, empty(8, 128, 256, dtype=FP8), *args[2:], BF16) == "triton"
    has = "torch" if gpu in ("sm_90", "sm_100") else "triton"
    by_row, one = (scales[0], scales[1].select(0, 0)), empty(1).float()
    assert chosen("scaled_mm", a, b.select(0, 0), *by_row, None, BF16) == has
    assert chosen("scaled_mm", a, b.select(0, 0), *by_row, None, torch.float32) == "triton"
    assert chosen("scaled_mm", a, b.select(0, 0), one, one, None, torch.float32) == has
    assert chosen("scaled_mm", a, empty(128, 256, dtype=FP8), one, one, None, BF16) == "triton"


def test_without_triton_torch_does_not_compute_them(monkeypatch, gpu):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    told = torchs.partly(empty(64, 128), empty(8, 128, 256), empty(8, dtype=torch.int32))
    assert ("triton is not installed" in told) == (gpu in ("sm_90", "sm_100"))


def test_values_that_no_case_has():
    probe = str(Path(__file__).with_name("moe_probe.py"))
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", probe]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "without_order": True,
        "other_fp8": True,
        "out_of_range": True,
        "cleared": [[18, 19, 20], [False, True, False, True]],
        "unsafe_offsets": [[16, 8], [4, 8, 8]],
    }


def test_gpus_that_run_configs_of_another_widen_fp8(monkeypatch):
    device, sizes = torch.device("cuda", 0), {"rows": 500}
    for name, numbers in (("gfx942", 2), ("gfx90a", 0), ("gfx950", 0), ("sm_89", 0), ("sm_90", 1)):
        monkeypatch.setattr(targets, "architecture", lambda *_, name=name: name)
        kin = fp8.is_kin(device)
        assert (
            fp8.PRODUCT.config("scaled_mm", device, **sizes, kin=kin).constants["NUMBERS"]
            == numbers
        )


class ByTorch(OpContract):
    """An op by torch's own kernel, on a GPU."""

    devices = ("cuda",)
    implementations = ("torch",)

    def __init__(self, op):
        self.op = op


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@pytest.mark.parametrize("op", ["grouped_mm", "grouped_mm_backward", "grouped_mm_fp8", "scaled_mm"])
def test_torchs_kernels_compute_what_the_reference_does(op):
    contract = ByTorch(op)
    if not list(contract._cells()):
        pytest.skip("torch has no kernel of its own for this GPU")
    contract.test_results_equal_the_reference()
