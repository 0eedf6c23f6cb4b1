"""Who else computes an op on a GPU: torch's own kernels, torch.compile, Liger if it is installed.

By op: a function of the op's arguments that gives calls by name; arguments that a call changes are
its own copies.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from ds_core.ops.activation import activate
from ds_core.ops.block_format import FORMATS
from ds_core.ops.quantized_weight import unpack
from ds_ops.bench.gpu import attention

Calls = dict[str, Callable[[], object]]


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _liger(module: str, name: str) -> Callable[..., Any] | None:
    """A function of Liger's, if it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    found: Callable[..., Any] = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    return found


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: Any) -> Calls:
    if residual is not None:
        return {"torch.compile": lambda: _compiled(_added_rms)(x, residual, weight, eps)}
    found: Calls = {
        "torch": lambda: _rms(x, weight, eps),
        "torch.compile": lambda: _compiled(_rms)(x, weight, eps),
    }
    liger = _liger("rms_norm", "rms_norm_forward")
    if liger is not None:
        found["liger"] = lambda: liger(x, weight, eps, 0.0, "llama", None)
    return found


def _added_rms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _rms(total, weight, eps), total


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, residual: Any
) -> Calls:
    shape = (x.shape[-1],)
    return {"torch": lambda: F.layer_norm(x, shape, weight, bias, eps)}


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> Calls:
    found: Calls = {"torch.compile": lambda: _compiled(_gate)(gate, up)}
    liger = _liger("swiglu", "swiglu_forward")
    if liger is not None:
        found["liger"] = lambda: liger(gate, up)
    return found


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any) -> Calls:
    return {"torch.compile": lambda: _compiled(_rotated)(x, cos, sin)}


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets)


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    loss = _compiled(_loss)(leaf, targets)
    return torch.autograd.grad(loss, leaf)[0]


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> Calls:
    found: Calls = {"torch.compile": lambda: _loss_and_gradient(logits, targets)}
    liger = _liger("cross_entropy", "cross_entropy_forward")
    if liger is not None:
        own = logits.clone()
        found["liger"] = lambda: liger(own, targets, None, -100, 0.0, 0.0, "mean", None, False)
    return found


def _to_bytes(x: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.view(-1, block).float()
    scale = rows.abs().amax(1, keepdim=True) * (1 / 127)
    return (rows * (1 / scale)).round().to(torch.int8).view(torch.uint8).view(x.shape), scale


def _quantize_blocks(x: torch.Tensor, number: int, block: int, *rest: Any) -> Calls:
    if number != FORMATS["int8"].number:
        return {}
    return {"torch.compile": lambda: _compiled(_to_bytes)(x, block)}


def _there_and_back(x: torch.Tensor, bits: int, groups: int) -> torch.Tensor:
    rows = x.view(groups, -1).float()
    scale = rows.abs().amax(1, keepdim=True) / ((1 << (bits - 1)) - 1)
    return ((rows / scale).round() * scale).to(x.dtype).view(x.shape)


def _fake_quantize(x: torch.Tensor, limits: Any, bits: int, groups: int, *rest: Any) -> Calls:
    return {"torch.compile": lambda: _compiled(_there_and_back)(x, bits, groups)}


def _biased(x: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    return activate(x + bias, activation)


def _bias_activation(x: torch.Tensor, bias: torch.Tensor, activation: str) -> Calls:
    return {"torch.compile": lambda: _compiled(_biased)(x, bias, activation)}


def _evoformer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias1: torch.Tensor,
    bias2: torch.Tensor,
    scale: float,
) -> Calls:
    """With the sum of the biases in memory, which is as large as the scores."""
    queries, keys, values = (t.transpose(2, 3).flatten(0, 1) for t in (q, k, v))
    both = (bias1 + bias2).flatten(0, 1)

    def torchs() -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=both, scale=scale)
        return mixed.unflatten(0, q.shape[:2]).transpose(2, 3)

    return {"torch": torchs}


def _weight_only_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int,
) -> Calls:
    """The same weight, not packed."""
    dense = unpack(codes, scales, zeros, outputs, bits).to(x.dtype)
    return {"F.linear": lambda: F.linear(x, dense, bias)}


PEERS: Mapping[str, Callable[..., Calls]] = MappingProxyType(
    {
        **attention.PEERS,
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "bias_activation": _bias_activation,
        "evoformer_attention": _evoformer,
        "gated_activation": _gated_activation,
        "rope": _rope,
        "cross_entropy": _cross_entropy,
        "quantize_blocks": _quantize_blocks,
        "fake_quantize": _fake_quantize,
        "weight_only_linear": _weight_only_linear,
    }
)
