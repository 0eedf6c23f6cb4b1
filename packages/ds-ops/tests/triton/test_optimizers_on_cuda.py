"""Steps of the optimizers on a GPU that is not there: which operator is called, on what."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ds_ops
from ds_core import fused, ops
from ds_ops.triton_kernels import catalog, targets

pytest.importorskip("triton", reason="triton is not installed")

BF16, FP32 = torch.bfloat16, torch.float32
OPTIMIZERS = {
    "adam": (lambda p: ds_ops.FusedAdam(p, stochastic_rounding=True), ["adam_step_"]),
    "lion": (lambda p: ds_ops.FusedLion(p, stochastic_rounding=True), ["lion_step_"]),
    "sgd": (lambda p: ds_ops.FusedSGD(p, momentum=0.9), ["sgd_step_"]),
    "sgd-plain": (ds_ops.FusedSGD, ["sgd_step_"]),
    "adagrad": (ds_ops.FusedAdagrad, ["adagrad_step_"]),
    "lamb": (ds_ops.FusedLamb, ["lamb_update_", "lamb_apply_"]),
    "adam8bit": (ds_ops.Adam8bit, ["adam8bit_step_"]),
}


class Seen(TorchDispatchMode):
    """Operators, each with the devices of its tensors; none that makes the host wait."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        devices = {t.device.type for t in flat if torch.is_tensor(t)}
        name = func.name().partition(".")[0]
        waits = name in ("aten::_local_scalar_dense", "aten::item") and "cuda" in devices
        assert not waits, "the host waits for the device"
        self.calls.append((name, devices))
        return func(*args, **(kwargs or {}))

    def ours(self):
        """Our operators, and torch's fused ones."""
        return [
            (name.partition("::")[2], devices)
            for name, devices in self.calls
            if name.startswith(("ds_ops::", "aten::_fused"))
        ]


@pytest.fixture
def fake(monkeypatch):
    """Makes tensors on a GPU, without memory."""
    monkeypatch.setattr(targets, "architecture", lambda *_: "sm_90")
    mode = FakeTensorMode()

    def make(*shape, dtype=FP32):
        with mode:
            return torch.empty(*shape, dtype=dtype, device="cuda")

    return make


def params(fake, dtype):
    return [nn.Parameter(fake(*shape, dtype=dtype)) for shape in ((33, 7), (5,))]


def test_every_step_has_a_kernel_in_triton(fake):
    for _, names in OPTIMIZERS.values():
        for name in names:
            assert ops.choose(name, "cuda").implementation.name == "triton"
    assert ops.choose("step_undo_", "cuda").implementation.name == "triton"
    steps = [name for name in ops.names() if name.endswith("step_") or name.startswith("lamb")]
    assert set(steps) <= set(catalog.OPS)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_one_pass_is_one_operator_on_the_gpu(name, dtype, fake):
    make, names = OPTIMIZERS[name]
    own = params(fake, dtype)
    optimizer = make(own)
    gradients = {p: fake(*p.shape, dtype=BF16) for p in own}
    copies = {p: fake(*p.shape, dtype=BF16) for p in own}
    undo = fused.can_undo(optimizer)
    with Seen() as seen:
        scale, unless = fake(()), fake((), dtype=torch.bool)
        for _ in range(2):
            fused.step_in_one_pass(optimizer, gradients, copies, scale, undo=undo, unless=unless)
    assert seen.ours() == [(each, {"cuda"}) for each in names] * 4
    if undo:
        with Seen() as seen:
            optimizer.rollback()
        assert seen.ours() == [("step_undo_", {"cuda"})] * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_step_in_bf16_is_one_operator_on_the_gpu(name, fake):
    make, names = OPTIMIZERS[name]
    own = params(fake, BF16)
    for param in own:
        param.grad = fake(*param.shape, dtype=BF16)
    optimizer = make(own)
    with Seen() as seen:
        optimizer.step()
    assert seen.ours() == [(each, {"cuda"}) for each in names] * 2


def test_plain_fp32_parameters_of_adam_are_one_call_of_torchs_kernel(fake):
    own = params(fake, FP32)
    for param in own:
        param.grad = fake(*param.shape)
    optimizer = ds_ops.FusedAdam(own)
    with Seen() as seen:
        optimizer.step()
    assert seen.ours() == [("_fused_adamw_", {"cuda"})]
    # All parameters share the count of steps: it is written to the device once.
    assert sum(name == "aten::new_full" for name, _ in seen.calls) == 1


def test_a_gradient_scaler_makes_no_host_wait_for_lion(fake):
    own = params(fake, FP32)
    for param in own:
        param.grad = fake(*param.shape)
    optimizer = ds_ops.FusedLion(own)
    optimizer.grad_scale, optimizer.found_inf = fake(()), fake(())
    with Seen() as seen:
        optimizer.step()
    assert seen.ours() == [("lion_step_", {"cuda"})] * 2
