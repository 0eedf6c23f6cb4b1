"""Which calls of paged_attention torch's FlashAttention 3 takes, and how it is called."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import varlen

from ds_core import ops
from ds_core.ops.paged_attention import example, fp8_example
from ds_ops.torch_kernels import paged_attention as flash

CPU = torch.device("cpu")


@pytest.fixture
def there(monkeypatch):
    """A machine on which it runs."""
    monkeypatch.setattr(flash.targets, "architecture", lambda *_: "sm_90")
    monkeypatch.setattr(flash, "_flash_attention", lambda: "FA3")
    return monkeypatch


def prefill(dtype=torch.bfloat16, head_size=64, block_size=16):
    return (*example(CPU, dtype, [(40, 60), (20, 20)], (4, 2), head_size, block_size), 0.1)


def test_it_takes_prefills_of_16_bit_floats(there):
    assert flash.partly(*prefill()) is None
    assert flash.partly(*prefill(torch.float16, 256, 48), 10) is None


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ((*prefill(), None, 5.0), "softcap"),
        (prefill(torch.float32), "bf16 and fp16"),
        ((*fp8_example(CPU, torch.bfloat16, torch.float8_e5m2, [(40, 60)])[:6], 0.1), "q's dtype"),
        (prefill(head_size=20), "head sizes"),
        (prefill(head_size=264), "head sizes"),
        (prefill(block_size=8), "pages"),
        ((*example(CPU, torch.bfloat16, [(1, 60)] * 20), 0.1), "16 queries"),
        ((*example(CPU, torch.bfloat16, []), 0.1), "16 queries"),
    ],
)
def test_it_leaves_what_it_does_not_compute_to_our_kernel(there, args, reason):
    assert reason in flash.partly(*args)


def test_it_is_for_hopper_with_flash_attention_3(there):
    there.setattr(flash, "_flash_attention", lambda: None)
    assert "activate_flash_attention_impl('FA3')" in flash.partly(*prefill())
    there.setattr(flash.targets, "architecture", lambda *_: "sm_100")
    assert flash.partly(*prefill()) == "for sm_90"


def test_torch_is_not_told_so_by_itself():
    assert flash._flash_attention() != "FA3"


@pytest.mark.parametrize(("window", "sides"), [(None, (-1, 0)), (7, (6, 0))])
def test_it_is_called_with_bounds_that_the_host_knows(monkeypatch, window, sides):
    seen = {}

    def fake(q, k, v, starts, key_starts, most_queries, most_keys, **named):
        seen.update(named, most=(most_queries, most_keys), key_starts=key_starts)
        return q.clone()

    monkeypatch.setattr(varlen, "varlen_attn", fake)
    args = prefill()
    flash.paged_attention(*args, window)
    assert seen["most"] == (60, args[3].shape[1] * 16)
    assert seen["window_size"] == sides
    assert seen["block_table"] is args[3]
    assert seen["seqused_k"] is args[4]
    assert seen["enable_gqa"]
    assert seen["num_splits"] == 1
    assert seen["key_starts"] is None


def test_on_a_gpu_it_comes_before_our_kernel():
    offered = [impl.name for impl in ops.implementations("paged_attention")]
    assert offered.index("torch") < offered.index("triton")
