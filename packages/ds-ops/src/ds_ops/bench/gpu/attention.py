"""Sizes and peers of attention, dense, packed and over a paged cache, and of sampling, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ds_core.ops import attention as dense
from ds_core.ops import paged_attention as paged
from ds_core.ops import sparse_attention as sparse
from ds_core.ops.arguments import randn
from ds_core.ops.block_layout import BlockLayout
from ds_ops.sparse_attention import BigBirdSparsityConfig, FixedSparsityConfig

Cases = list[tuple[str, tuple[Any, ...]]]
Calls = dict[str, Callable[[], object]]

_LOW = torch.bfloat16
_BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}


def _attention(device: torch.device, tokens: int = 8192) -> Cases:
    causal = (dense.UNBOUNDED, 0)
    found: Cases = []
    for label, heads, d, window in (
        ("causal", (32, 8), 128, causal),
        ("full", (16, 16), 64, (dense.UNBOUNDED, dense.UNBOUNDED)),
        ("window 1024", (32, 8), 128, (1023, 0)),
    ):
        args = dense.example(device, _LOW, (2, tokens, tokens), heads, d, window)
        found.append((f"{label} 2x{tokens}, heads {heads[0]}/{heads[1]} of {d} bf16", args))
    return found


def _attention_backward(device: torch.device, tokens: int = 8192) -> Cases:
    """What values `out` and `lse` have makes no difference to the time."""
    found: Cases = []
    for label, (q, *rest) in _attention(device, tokens):
        lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=device)
        found.append((label, (q.flip(0), None, q, *rest[:2], q.clone(), lse, *rest[2:])))
    return found


def _is_causal(q: torch.Tensor, left: int, right: int) -> bool | None:
    """What SDPA calls it; None for a window, which it does not have."""
    if left != dense.UNBOUNDED:
        return None
    return right == 0


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _attention_peers(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _starts: Any, _key_starts: Any,
    _scale: float, left: int, right: int, *_longest: int,
) -> Calls:  # fmt: skip
    causal = _is_causal(q, left, right)
    if causal is None:
        return {}

    def by(backend: SDPBackend) -> Callable[[], object]:
        def call() -> object:
            with sdpa_kernel(backend):
                return _sdpa(q, k, v, causal)

        return call

    return {name: by(backend) for name, backend in _BACKENDS.items()}


def _attention_backward_peers(grad: torch.Tensor, _lse: Any, *args: Any) -> Calls:
    q, k, v, _out, _out_lse, _starts, _key_starts, _scale, left, right, *_ = args
    causal = _is_causal(q, left, right)
    if causal is None:
        return {}
    q, k, v = leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]

    def by(backend: SDPBackend) -> Callable[[], object]:
        with sdpa_kernel(backend):
            out = _sdpa(q, k, v, causal)
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    return {name: by(backend) for name, backend in _BACKENDS.items()}


def _paged(device: torch.device, divided: int = 1) -> Cases:
    """A decode step of many and of one, and a prefill, of a model with 8 key-value heads."""
    found: Cases = []
    for label, sequences, queries, keys in (
        ("decode 64x8192", 64, 1, 8192),
        ("decode 1x131072", 1, 1, 131072),
        ("prefill 4x4096", 4, 4096, 4096),
    ):
        queries, keys = max(queries // divided, 1), keys // divided
        pages = keys // 16
        table = torch.arange(sequences * pages, device=device, dtype=torch.int32)
        caches = (randn(device, _LOW, sequences * pages, 16, 8, 128, seed=seed) for seed in (1, 2))
        lengths = torch.full((sequences,), keys, device=device, dtype=torch.int32)
        starts = torch.arange(sequences + 1, device=device, dtype=torch.int32) * queries
        q = randn(device, _LOW, sequences * queries, 32, 128)
        args = (q, *caches, table.view(sequences, pages), lengths, starts, 128**-0.5)
        found.append((f"{label}, heads 32/8 bf16", args))
    return found


def _sparse(device: torch.device, tokens: int = 8192) -> Cases:
    found: Cases = []
    for config in (FixedSparsityConfig(16, block=64), BigBirdSparsityConfig(16, block=64)):
        layout = BlockLayout(config.make_layout(tokens), 64)
        args = sparse.example(device, _LOW, (2, 16, tokens, 64), layout)
        name = type(config).__name__.removesuffix("SparsityConfig")
        found.append((f"{name} 2x{tokens}, density {layout.density:.2f} bf16", args))
    return found


def _sparse_peers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_rest: Any) -> Calls:
    """The same without a layout."""

    def call() -> object:
        with sdpa_kernel(list(_BACKENDS.values())):
            return F.scaled_dot_product_attention(q, k, v)

    return {"dense SDPA": call}


def _sparse_target(_q: Any, _k: Any, _v: Any, blocks: torch.Tensor, *_rest: Any) -> float:
    """It may take the layout's share of the dense time, and 0.05 of that more."""
    return 1 / (float(blocks.float().mean()) + 0.05)


def _drawn_by_sorting(logits: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    ordered, order = logits.float().softmax(-1).sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p[:, None]
    return order.gather(1, torch.multinomial(ordered * kept, 1))


def _sample_peers(
    logits: torch.Tensor, _seeds: Any, _positions: Any, _heat: Any, _k: Any, top_p: Any, *_: Any
) -> Calls:
    return {"sort, multinomial": lambda: _drawn_by_sorting(logits, top_p)}


SIZES: Mapping[str, Callable[[torch.device], Cases]] = MappingProxyType(
    {
        dense.NAME: _attention,
        "attention_backward": _attention_backward,
        paged.NAME: _paged,
        sparse.NAME: _sparse,
    }
)
PEERS: Mapping[str, Callable[..., Calls]] = MappingProxyType(
    {
        dense.NAME: _attention_peers,
        "attention_backward": _attention_backward_peers,
        "sample_tokens": _sample_peers,
        sparse.NAME: _sparse_peers,
    }
)
#: How many times as fast as its peer an op must be, by its arguments; what is not here: as fast.
TARGETS: Mapping[str, Callable[..., float]] = MappingProxyType({sparse.NAME: _sparse_target})
