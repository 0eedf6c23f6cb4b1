"""The benchmark of kernels for GPUs, as far as it can be tried without one."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend

from ds_core import ops
from ds_ops import gpu_runs
from ds_ops.bench import timing
from ds_ops.bench.gpu import attention
from ds_ops.bench.gpu import measuring as gpu
from ds_ops.bench.gpu.peers import PEERS
from ds_ops.bench.gpu.sizes import SIZES
from ds_ops.bench.gpu.timing import Ceilings

BEST = Ceilings("NVIDIA H200", 4e12, {torch.float32: 5e13, torch.bfloat16: 8e14})


def test_a_floor_is_what_takes_longer():
    assert BEST.floor_ms(4 * 10**9, 0, torch.bfloat16) == pytest.approx(1.0)
    assert BEST.floor_ms(4, 8 * 10**11, torch.bfloat16) == pytest.approx(1.0)
    assert BEST.floor_ms(4, 5 * 10**10, torch.uint8) == pytest.approx(1.0)


#: Their bytes and operations are counted from values.
COUNTED = set(attention.SIZES)


@pytest.mark.parametrize("op", sorted(SIZES.keys() - COUNTED))
def test_sizes_are_arguments_that_the_op_takes(op):
    """On the meta device, where they take no memory."""
    with torch.device("meta"):
        for label, args in SIZES[op](torch.device("meta")):
            assert label
            ops.get(op).fake(*args)
            assert ops.get(op).floor(*args).bytes > 64 << 20


@pytest.mark.parametrize(
    ("op", "size"),
    [
        ("attention", 64),
        ("attention_backward", 64),
        ("paged_attention", 256),
        ("sparse_attention", 1024),
    ],
)
def test_attention_at_smaller_sizes_is_what_the_op_takes(op, size, monkeypatch):
    cases = attention.SIZES[op](torch.device("cpu"), size)
    assert len({label for label, _ in cases}) == len(cases)
    for _, args in cases:
        assert ops.get(op).floor(*args).flops > 0
        ops.get(op).reference(*args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", sorted(PEERS.keys() - {"sample_tokens", "sparse_attention"}))
def test_peers_compute_the_same(op, monkeypatch):
    from ds_ops.bench.gpu import peers

    monkeypatch.setattr(peers, "_compiled", lambda function: function)
    monkeypatch.setattr(attention, "_BACKENDS", {"math": SDPBackend.MATH})
    for args in ops.get(op).cases(torch.device("cpu"), torch.float32)[:1]:
        truth = ops.get(op).reference(*args)
        first = truth[0] if isinstance(truth, tuple) else truth
        calls = PEERS[op](*args)
        assert calls
        for call in calls.values():
            result = call()
            found = result[0] if isinstance(result, tuple) else result
            if found.shape == first.shape and op != "cross_entropy":
                torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-5)


def test_sparse_attention_may_take_the_share_of_its_layout():
    (_, args), *_ = attention.SIZES["sparse_attention"](torch.device("cpu"), 1024)
    share = float(args[3].float().mean())
    assert 0 < share < 1
    assert attention.TARGETS["sparse_attention"](*args) == pytest.approx(1 / (share + 0.05))


def test_rows_go_into_the_file_of_the_device(tmp_path):
    row = timing.Row("rms_norm:triton", "16384x8192", "bf16", 0.2, floor_ms=0.19)
    path = gpu.record([row], BEST, tmp_path)
    found = json.loads(path.read_text())
    assert found["device"] == "NVIDIA H200"
    assert found["measured"]["rows"][0]["x_floor"] == pytest.approx(0.2 / 0.19)
    assert gpu_runs.runs(tmp_path)[0].device == "NVIDIA H200"
