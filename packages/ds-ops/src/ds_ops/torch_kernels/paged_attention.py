"""paged_attention by FlashAttention 3, where the program has told torch to use it.

FlashAttention 2, which torch comes with, reads no pages. The longest sequence must be said on the
host; only a bound is known there without waiting, with which a decode would be cut as if it were a
prefill: those stay with our kernel.
"""

from __future__ import annotations

import importlib

import torch

from ds_core.ops import paged_attention as op
from ds_ops.triton_kernels import targets

#: Queries of a sequence, on average, from which on a call counts as a prefill.
_PREFILL = 16


def partly(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> str | None:
    """Why FlashAttention 3 does not take a call, or None."""
    if targets.architecture("cuda", q.device.index) != "sm_90":
        return "for sm_90"
    if softcap is not None:
        return "without softcap"
    if q.dtype not in (torch.bfloat16, torch.float16) or k_cache.dtype != q.dtype:
        return "for bf16 and fp16 caches of q's dtype"
    shapes = q.dim() == 3 and k_cache.dim() == 4 and block_table.dim() == 2
    if not shapes or q.shape[2] > 256 or q.shape[2] % 8:
        return "for head sizes of multiples of 8 up to 256"
    if k_cache.shape[1] % 16 or k_cache.stride(3) != 1:
        return "for pages of multiples of 16"
    if q.shape[0] < _PREFILL * block_table.shape[0] or q.shape[0] == 0:
        return f"for {_PREFILL} queries a sequence or more"
    if _flash_attention() != "FA3":
        return "after torch.nn.attention.activate_flash_attention_impl('FA3') only"
    return None


def _flash_attention() -> str | None:
    """Which FlashAttention torch was told to use; None: its own, or torch is older than 2.13."""
    if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        return None
    found: str | None = importlib.import_module("torch.nn.attention").current_flash_attention_impl()
    return found


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    sequence_lengths: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ds_core.ops.paged_attention.reference`, of calls that `partly` does not refuse."""
    lists = (block_table, sequence_lengths, query_starts)
    op.fake(q, k_cache, v_cache, *lists, scale, window, softcap, k_scale, v_scale)
    varlen = importlib.import_module("torch.nn.attention.varlen")
    found: torch.Tensor = varlen.varlen_attn(
        *(q, k_cache, v_cache, query_starts, None),
        *(q.shape[0], block_table.shape[1] * k_cache.shape[1]),
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        enable_gqa=q.shape[1] != k_cache.shape[2],
        seqused_k=sequence_lengths,
        block_table=block_table,
        num_splits=1,
    )
    return found
