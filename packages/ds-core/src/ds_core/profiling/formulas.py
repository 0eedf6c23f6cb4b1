"""How many floating-point operations an ATen operation does.

Counted are products of matrices and what is made of them: linear layers, attention, convolutions,
recurrent cells. A multiply and its add are two operations, so every count is twice the
multiply-accumulates (MACs). The formulas are torch's own (`torch.utils.flop_counter`) where it has
them and they are exact; added here are those that it lacks, and the backward of grouped
convolutions, which it overstates by the number of groups.

Attention counts every pair of query and key, masked or not; its fused backward computes the scores
again, and these operations are counted as done: 2.5 times the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import flop_counter

#: From the positional arguments and the output of a call to its operations.
Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]

aten = torch.ops.aten

#: Namespaces whose operations are known to be no matrix products unless a formula says so.
KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "c10d", "_c10d_functional", "profiler"})

#: Operations on single elements that torch does not tag as such.
_ELEMENTWISE = frozenset(
    {
        "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data",
        "native_layer_norm", "native_layer_norm_backward", "native_group_norm",
        "native_group_norm_backward", "native_batch_norm", "native_batch_norm_backward",
        "_native_batch_norm_legit", "_batch_norm_with_update", "batch_norm_backward",
        "cudnn_batch_norm", "cudnn_batch_norm_backward", "_fused_rms_norm",
        "_fused_rms_norm_backward", "nll_loss_forward", "nll_loss_backward", "mse_loss",
        "mse_loss_backward", "avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d",
    }
)  # fmt: skip
#: Tagged as elementwise, but only moves elements.
_MOVES = frozenset(
    {"clone", "copy", "fill", "fill_", "zero", "zero_", "masked_fill", "masked_fill_"}
)


def formula_of(operation: Any) -> Formula | None:
    """The formula of an operation (`torch.ops.aten.mm`, a higher-order one), or None.

    Formulas that a program registers with `torch.utils.flop_counter.register_flop_formula` count.
    """
    own = _own_formulas().get(operation)
    if own is not None:
        return own
    registered = flop_counter.flop_registry.get(operation)
    if registered is None:
        return None
    return lambda args, kwargs, output: int(registered(*args, **kwargs, out_val=output))


def elements_of(operation: Any, args: tuple[Any, ...], output: Any) -> int:
    """Elements that an elementwise operation, a normalisation or a reduction goes through."""
    name = operation._schema.name.partition("::")[2]
    tags = operation.tags
    if torch.Tag.reduction in tags or name in _ELEMENTWISE:
        return _largest(args)
    if torch.Tag.pointwise in tags and name not in _MOVES:
        return _largest((output,))
    return 0


@cache
def _own_formulas() -> Mapping[Any, Formula]:
    found: dict[str, Formula] = {
        "convolution_backward": _convolution_backward,
        "addbmm": lambda args, kwargs, output: _product(args[1], args[2]),
        "mv": lambda args, kwargs, output: 2 * args[0].numel(),
        "addmv": lambda args, kwargs, output: 2 * args[1].numel(),
        "dot": lambda args, kwargs, output: 2 * args[0].numel(),
        "vdot": lambda args, kwargs, output: 2 * args[0].numel(),
        "_int_mm": lambda args, kwargs, output: _product(args[0], args[1]),
        "_grouped_mm": _grouped_product,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
        "_native_multi_head_attention": _multi_head_attention,
        "_transformer_encoder_layer_fwd": _encoder_layer,
        "mkldnn_rnn_layer": lambda args, kwargs, output: _recurrent(args[0], args[1:3]),
        "mkldnn_rnn_layer_backward": lambda args, kwargs, output: (
            2 * _recurrent(args[0], args[1:3])
        ),
        "_cudnn_rnn": lambda args, kwargs, output: _recurrent(args[0], args[1]),
        "_cudnn_rnn_backward": lambda args, kwargs, output: 2 * _recurrent(args[0], args[1]),
    }
    return MappingProxyType(
        {getattr(aten, name): formula for name, formula in found.items() if hasattr(aten, name)}
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> int:
    """Of `[..., m, k]` times `[..., k, n]`."""
    return 2 * a.numel() * b.shape[-1]


def _grouped_product(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    a, b = args[:2]
    if a.dim() == 2 and b.dim() == 2:  # the sum is what is grouped: [m, all k] times [all k, n]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    # [rows of all groups, k] times [groups, k, n], each row with one of them; or the other way.
    return 2 * int(output.numel()) * int(a.shape[-1])


def _convolution_backward(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Each multiply of the forward has one in the input's gradient and one in the weight's."""
    grad_output, inputs, weight = args[:3]
    transposed, wants = args[7], args[10]
    points = (inputs if transposed else grad_output).shape[2:]
    forward = 2 * inputs.shape[0] * prod(points) * weight.numel()
    return int(forward * (bool(wants[0]) + bool(wants[1])))


def _attention(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    return int(flop_counter.sdpa_flop_count(*(tensor.shape for tensor in args[:3])))


def _attention_backward(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))


def _multi_head_attention(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    query, key, _, width, _, qkv_weight, _, out_weight = args[:8]
    tokens = query.numel() // query.shape[-1]
    pairs = tokens * key.shape[-2]
    return int(2 * tokens * (qkv_weight.numel() + out_weight.numel()) + 4 * pairs * width)


def _encoder_layer(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    inputs, width, weights = args[0], args[1], (args[3], args[5], args[14], args[16])
    tokens = inputs.numel() // inputs.shape[-1]
    pairs = tokens * inputs.shape[-2]
    return int(2 * tokens * sum(weight.numel() for weight in weights) + 4 * pairs * width)


def _recurrent(inputs: torch.Tensor, weights: Any) -> int:
    """Every weight matrix of the layer once per sample and time step."""
    matrices = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return 2 * prod(inputs.shape[:-1]) * matrices


def _largest(values: Any) -> int:
    sizes = [0]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            sizes.append(value.numel())
        elif isinstance(value, list | tuple):
            sizes.append(_largest(value))
    return max(sizes)
