"""Who computes attention on which GPU, and by which of torch's kernels, with none at hand."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_core import ops
from ds_core.errors import OpError
from ds_core.ops.attention import backward_fake, fake
from ds_ops.torch_kernels import attention as kernels
from ds_ops.triton_kernels import attention_calls, targets

BF16, FP32 = torch.bfloat16, torch.float32
CUDNN = "_scaled_dot_product_cudnn_attention"
FLASH = "_flash_attention_forward"
#: By name: q's shape, keys, kv heads, left, right, max_queries or None for a batch.
CALLS = {
    "causal": ((2, 64, 4, 64), 64, 2, -1, 0, None),
    "full": ((2, 64, 4, 96), 80, 4, -1, -1, None),
    "causal behind": ((2, 64, 4, 64), 80, 2, -1, 0, None),
    "window": ((2, 64, 4, 64), 64, 2, 15, 0, None),
    "wide": ((2, 64, 4, 256), 64, 2, -1, 0, None),
    "packed": ((64, 4, 64), 64, 2, -1, 0, 40),
    "packed, lengths unknown": ((64, 4, 64), 64, 2, -1, 0, -1),
    "empty": ((2, 64, 4, 64), 0, 2, -1, -1, None),
    "decode": ((2, 1, 4, 64), 80, 2, -1, -1, None),
    "some at the end of a window": ((2, 16, 4, 256), 80, 2, 20, 0, None),
    "first token": ((2, 1, 4, 64), 1, 2, -1, 0, None),
    "one key": ((2, 64, 4, 64), 1, 2, -1, -1, None),
}
#: Few queries, which are flash attention's everywhere.
FEW = dict.fromkeys(("decode", "some at the end of a window", "first token"), FLASH)
#: By architecture: what torch's kernels take, and by which.
TAKEN = {
    "sm_80": FEW
    | dict.fromkeys(
        ("causal", "full", "causal behind", "window", "wide", "packed", "one key"), FLASH
    ),
    "sm_89": {"causal": FLASH},
    "sm_90": FEW | {"causal": CUDNN, "full": CUDNN},
    "sm_100": FEW | {"causal": CUDNN, "full": CUDNN},
    "gfx942": {},
}


class Seen(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some architecture, on which tensors have no values."""

    def give(name):
        monkeypatch.setattr(targets, "architecture", lambda device_type, index=None: name)

    with FakeTensorMode():
        yield give


def call(name, dtype=BF16):
    """Arguments of a call of `attention`."""
    shape, keys, kv_heads, left, right, most = CALLS[name]
    q = torch.empty(shape, dtype=dtype, device="cuda")
    k, v = (q.new_empty(*shape[:-3], keys, kv_heads, shape[-1]) for _ in range(2))
    starts = None if most is None else q.new_empty(4, dtype=torch.int32)
    numbers = (-1, -1) if most is None else (most, most)
    return (q, k, v, starts, starts, 0.1, left, right, *numbers)


def of_backward(args, grad_lse=None):
    q, k, v, *rest = args
    out, lse = fake(*args)
    return (torch.empty_like(out), lse if grad_lse else None, q, k, v, out, lse, *rest)


def alike(got, wanted):
    return [(t.shape, t.dtype, t.stride(), t.device) for t in got] == [
        (t.shape, t.dtype, t.stride(), t.device) for t in wanted
    ]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("architecture", TAKEN)
def test_torch_takes_what_it_computes_faster(gpu, architecture, name):
    gpu(architecture)
    args = call(name)
    kernel = TAKEN[architecture].get(name)
    if architecture == "sm_89":  # as sm_80
        kernel = TAKEN["sm_80"].get(name)
    chosen = ops.choose("attention", "cuda").for_call(args).name
    assert chosen == ("torch" if kernel else "triton")
    assert ops.choose("attention_backward", "cuda").for_call(of_backward(args)).name == chosen
    if not kernel:
        assert kernels.not_taken(*args)
        return
    with Seen() as seen:
        assert alike(kernels.attention(*args), fake(*args))
    assert kernel in seen.names
    with Seen() as seen:
        found = kernels.attention_backward(*of_backward(args))
    assert alike(found, backward_fake(*of_backward(args)))
    backward = kernel.replace("_forward", "") + "_backward"
    assert backward in seen.names


@pytest.mark.parametrize(("architecture", "library"), [("sm_80", "flash"), ("sm_90", "cudnn")])
def test_a_library_that_torch_is_told_not_to_use_is_not_used(gpu, architecture, library):
    gpu(architecture)
    turn = getattr(torch.backends.cuda, f"enable_{library}_sdp")
    turn(False)
    try:
        chosen = ops.choose("attention", "cuda").for_call(call("causal")).name
    finally:
        turn(True)
    assert chosen == "triton"


@pytest.mark.parametrize(("warns", "chosen"), [(False, "triton"), (True, "torch")])
def test_gradients_that_must_be_the_same_in_every_run_are_not_cudnns(gpu, warns, chosen):
    gpu("sm_90")
    args = call("causal")
    torch.use_deterministic_algorithms(True, warn_only=warns)
    try:
        found = [
            ops.choose(name, "cuda").for_call(each).name
            for name, each in (("attention", args), ("attention_backward", of_backward(args)))
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == [chosen, chosen]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_a_gradient_of_lse_is_for_ours(gpu, architecture):
    gpu(architecture)
    args = of_backward(call("causal"), grad_lse=True)
    assert ops.choose("attention_backward", "cuda").for_call(args).name == "triton"


@pytest.mark.parametrize("architecture", TAKEN)
@pytest.mark.parametrize("name", CALLS)
def test_fp32_is_computed_by_products_of_torch_without_a_look_at_values(gpu, architecture, name):
    gpu(architecture)
    args = call(name, FP32)
    assert ops.choose("attention", "cuda").for_call(args).name == "torch"
    assert "only torch.bfloat16" in attention_calls.attention(*args)
    with pytest.raises(OpError, match=r"triton: q: torch.float32 on cuda"):
        ops.choose("attention", "cuda", "triton").for_call(args)
    assert alike(kernels.attention(*args), fake(*args))
    gradients = of_backward(args, grad_lse=True)
    assert ops.choose("attention_backward", "cuda").for_call(gradients).name == "torch"
    assert alike(kernels.attention_backward(*gradients), backward_fake(*gradients))


def test_wrong_arguments_are_no_reason_to_fail_before_they_are_refused(gpu):
    for architecture in TAKEN:
        gpu(architecture)
        q, *others = call("causal")
        for wrong in (q.select(0, 0), q.new_empty(()), q.new_empty(3, dtype=torch.int64)):
            kernels.not_taken(wrong, *others)
            attention_calls.attention(wrong, *others)


@pytest.mark.parametrize("index", range(14))
def test_the_products_compute_what_the_reference_does(index, monkeypatch):
    """Of chunks of a few queries each."""
    monkeypatch.setattr(kernels, "_SCORES", 1000)
    args = ops.get("attention").cases(torch.device("cpu"), FP32)[index]
    out, lse = ops.get("attention").reference(*args)
    found = kernels._plain(*args)
    torch.testing.assert_close(found, (out, lse), rtol=1e-5, atol=1e-6)
    gradients = ops.get("attention_backward").cases(torch.device("cpu"), FP32)[index]
    truth = ops.get("attention_backward").reference(*gradients)
    torch.testing.assert_close(kernels._plain_backward(*gradients), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "copied"),
    [
        ((6400, 32, 16, 1), False),
        ((0, 96, 32, 1), False),
        ((6400, 36, 16, 1), True),
        ((1 << 40, 1 << 23, 16, 1), False),
        ((1 << 40, 1 << 24, 16, 1), True),
    ],
)
def test_only_rows_that_kernels_would_not_reach_are_copied(strides, copied):
    triton_attention = pytest.importorskip("ds_ops.triton_kernels.attention")
    t = torch.empty_strided((1, 200, 2, 16), strides, device="meta")
    found = triton_attention._near("q", t)
    assert (found is not t) == copied
    assert found.is_contiguous() or not copied
