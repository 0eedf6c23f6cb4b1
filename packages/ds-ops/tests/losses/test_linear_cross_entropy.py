"""linear_cross_entropy: against the reference, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ds_ops
from ds_core.errors import OpError
from ds_core.ops.loss_arguments import reduction_scale
from ds_core.testing.contracts import OpContract
from ds_ops.torch_kernels.linear_cross_entropy import linear_cross_entropy


class TestLinearCrossEntropy(OpContract):
    op = "linear_cross_entropy"
    compiled = False


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that torch makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_are_never_held(dtype: torch.dtype) -> None:
    tokens, d, classes = 600, 4, 1000
    hidden, weight = torch.randn(tokens, d).to(dtype), torch.randn(classes, d).to(dtype)
    targets = torch.randint(0, classes, (tokens,))
    numbers = (-100, 0.0, 0.0, 0.0)
    for chunk, most in ((0, 150), (64, 64), (7, 7)):
        for wanted in ([False] * 3, [True, True, False]):
            with LargestTensor() as seen:
                linear_cross_entropy(
                    hidden, weight, None, targets, torch.ones(1), *numbers, chunk, wanted
                )
            assert seen.numel == most * classes


class OfGpu(TorchDispatchMode):
    """Below it calls are made on fake tensors of a GPU; notes them and the largest tensor."""

    def __init__(self):  # type: ignore[no-untyped-def]
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        self.calls.append(str(func))
        if func in (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out):
            *summed, a, b, dtype = args
            out = kwargs["out"]
            assert a.dtype == b.dtype == torch.bfloat16
            assert dtype == out.dtype == torch.float32
            assert out.shape == (a.shape[0], b.shape[1])
            assert all(s is out for s in summed)
            return out  # torch has no fake kernel for it
        if func is torch.ops.aten.addmm.out:
            assert kwargs["out"].shape == (args[1].shape[0], args[2].shape[1])
            return kwargs["out"]  # its fake kernel asks for the device
        result = func(*args, **kwargs)
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("biased", [False, True])
def test_on_a_gpu_nothing_waits_and_a_chunk_is_the_largest_tensor(biased: bool) -> None:
    tokens, d, classes, chunk = 600, 4, 1000, 250
    with torch.inference_mode(), FakeTensorMode(), OfGpu() as seen:
        made = {"device": "cuda", "dtype": torch.bfloat16}
        hidden, weight = torch.empty(tokens, d, **made), torch.empty(classes, d, **made)
        bias = torch.empty(classes, **made) if biased else None
        targets = torch.empty(tokens, device="cuda", dtype=torch.int64)
        # As the public function does; a value that the host asked for would be an error here.
        scale = reduction_scale(targets, -100, "mean")
        seen.calls.clear()
        found = linear_cross_entropy(
            *(hidden, weight, bias, targets, scale, -100, 0.0, 0.0, 0.0, chunk),
            [True, True, biased],
        )
    assert {t.device.type for t in found} == {"cuda"}
    assert seen.largest == chunk * classes * 2
    assert sum("cross_entropy_" in call for call in seen.calls) == 3
    # The weight's gradient is added up in fp32 by the products themselves.
    assert [call for call in seen.calls if "dtype_out" in call] == [
        "aten.mm.dtype_out",
        "aten.addmm.dtype_out",
        "aten.addmm.dtype_out",
    ]
    assert not [call for call in seen.calls if "_local_scalar_dense" in call or "nonzero" in call]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_equals_torch(reduction: str) -> None:
    torch.manual_seed(0)
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        hidden = torch.randn(2, 50, 16, requires_grad=True)
        weight = torch.randn(70, 16, requires_grad=True)
        bias = torch.randn(70, requires_grad=True)
        targets = torch.randint(0, 70, (2, 50))
        targets[0, :7] = -100
        if ours:
            loss = ds_ops.linear_cross_entropy(
                hidden, weight, targets, bias, label_smoothing=0.1, reduction=reduction, chunk=16
            )
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1, reduction=reduction
            ).view(targets.shape if reduction == "none" else ())
        (loss * torch.linspace(1, 2, loss.numel()).view(loss.shape)).sum().backward()
        found.append((loss.detach(), hidden.grad, weight.grad, bias.grad))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    hidden, weight = torch.randn(9, 4), torch.randn(11, 4, requires_grad=True)
    targets = torch.arange(9)
    ds_ops.linear_cross_entropy(hidden, weight, targets).backward()
    expected = weight.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(hidden @ expected.t(), targets).backward()
    torch.testing.assert_close(weight.grad, expected.grad)
    assert hidden.grad is None
    with torch.no_grad():
        assert not ds_ops.linear_cross_entropy(hidden, weight, targets).requires_grad


def test_softcap_and_no_softcap() -> None:
    hidden, weight, targets = torch.randn(9, 4), torch.randn(11, 4), torch.arange(9)
    logits = hidden @ weight.t()
    capped = torch.nn.functional.cross_entropy(5 * torch.tanh(logits / 5), targets)
    found = ds_ops.linear_cross_entropy(hidden, weight, targets, softcap=5.0)
    torch.testing.assert_close(found, capped)
    plain = ds_ops.linear_cross_entropy(hidden, weight, targets, softcap=None)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, targets))


def test_a_second_backward_gets_the_same_gradient() -> None:
    hidden = torch.randn(9, 4, requires_grad=True)
    weight, targets = torch.randn(11, 4), torch.arange(9)
    loss = ds_ops.linear_cross_entropy(hidden, weight, targets) * 3
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, hidden)[0]
    torch.testing.assert_close(first, second)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler
def test_it_compiles_as_one_graph() -> None:
    def step(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ds_ops.linear_cross_entropy(h, w, t) * 2

    found = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(40, 8)
        weight.requires_grad_()
        loss = run(hidden, weight, torch.arange(30))
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_of_nothing_is_refused(chunk):
    x, targets = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)
    with pytest.raises(OpError, match=f"chunk: got {chunk}, expected None, or 1 or more"):
        ds_ops.linear_cross_entropy(x, x, targets, chunk=chunk)
