"""Which ops have a kernel in Triton, and what each is made from; imports none of them."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

#: By op: the file of this folder and the function in it, "module:function", that computes it.
OPS: Mapping[str, str] = MappingProxyType(
    {
        # layers
        "rms_norm": "norms:rms_norm",
        "rms_norm_backward": "norms:rms_norm_backward",
        "layer_norm": "norms:layer_norm",
        "layer_norm_backward": "norms:layer_norm_backward",
        "rope": "rope:rope",
        "rope_": "rope:rope_",
        "gated_activation": "gated_activation:gated_activation",
        "gated_activation_backward": "gated_activation:gated_activation_backward",
        "gated_activation_packed": "gated_activation:gated_activation_packed",
        "gated_activation_packed_backward": "gated_activation:gated_activation_packed_backward",
        "bias_activation": "bias_activation:bias_activation",
        "bias_activation_backward": "bias_activation:bias_activation_backward",
        "nhwc_bias_add": "nhwc_bias_add:nhwc_bias_add",
        # losses
        "cross_entropy": "cross_entropy:cross_entropy",
        "cross_entropy_": "cross_entropy:cross_entropy_",
        # attention
        "attention": "attention:attention",
        "attention_backward": "attention:attention_backward",
        "sparse_attention": "sparse_attention:sparse_attention",
        "sparse_attention_backward": "sparse_attention:sparse_attention_backward",
        "evoformer_attention": "evoformer_attention:evoformer_attention",
        "evoformer_attention_backward": "evoformer_attention:evoformer_attention_backward",
        # serving
        "paged_attention": "paged_attention:paged_attention",
        "write_kv_cache_": "kv_cache:write_kv_cache_",
        "rope_write_kv_cache_": "kv_cache:rope_write_kv_cache_",
        "sample_tokens": "sample_tokens:sample_tokens",
        # products of matrices
        "grouped_mm": "grouped_mm:grouped_mm",
        "grouped_mm_backward": "grouped_mm:grouped_mm_backward",
        "grouped_mm_fp8": "fp8:grouped_mm_fp8",
        "scaled_mm": "fp8:scaled_mm",
        "weight_only_linear": "weight_only_linear:weight_only_linear",
        "weight_only_linear_backward": "weight_only_linear:weight_only_linear_backward",
        # experts
        "moe_gate": "moe_gate:moe_gate",
        "moe_gate_backward": "moe_gate:moe_gate_backward",
        "moe_permute": "moe_permute:moe_permute",
        "moe_unpermute": "moe_permute:moe_unpermute",
        "moe_unpermute_backward": "moe_permute:moe_unpermute_backward",
        # optimizers
        "adam_step_": "optimizer_steps:adam_step_",
        "lion_step_": "optimizer_steps:lion_step_",
        "adagrad_step_": "optimizer_steps:adagrad_step_",
        "sgd_step_": "optimizer_steps:sgd_step_",
        "lamb_update_": "lamb:lamb_update_",
        "lamb_apply_": "lamb:lamb_apply_",
        "adam8bit_step_": "adam8bit:adam8bit_step_",
        "step_undo_": "optimizer_steps:step_undo_",
        # quantization
        "quantize_blocks": "quantize:quantize_blocks",
        "quantize_feedback_": "quantize:quantize_feedback_",
        "dequantize_blocks": "quantize:dequantize_blocks",
        "quantized_reduce": "quantize:quantized_reduce",
        "quantized_reduce_feedback_": "quantize:quantized_reduce_feedback_",
        "fake_quantize": "fake_quantize:fake_quantize",
        "fake_quantize_signs": "fake_quantize:fake_quantize_signs",
        "sign_pack": "sign_pack:sign_pack",
        "sign_pack_feedback_": "sign_pack:sign_pack_feedback_",
        "sign_unpack": "sign_pack:sign_unpack",
    }
)

#: Of ops whose kernel takes only some calls: what says why not, in a file without kernels.
PARTLY: Mapping[str, str] = MappingProxyType(
    {
        "attention": "attention_calls:attention",
        "attention_backward": "attention_calls:attention_backward",
    }
)

FOLDER = Path(__file__).resolve().parent
_PACKAGE = "ds_ops.triton_kernels"


def module(op: str) -> str:
    """The file that computes an op, without ending."""
    return OPS[op].partition(":")[0]


def modules() -> tuple[str, ...]:
    """The files that hold kernels."""
    return tuple(sorted({module(op) for op in OPS}))


@cache
def digest(name: str) -> str:
    """Changes with a file of kernels and with those beside it that it imports, at any distance."""
    found = hashlib.sha256()
    for each in sorted(_closure(name)):
        found.update(each.encode() + b"\0" + _file(each).read_bytes())
    return found.hexdigest()[:12]


def _closure(name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in seen:
            seen.add(each)
            waiting += _imported(each)
    return seen


def _imported(name: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(_file(name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == _PACKAGE:
                found += [each.name for each in node.names]
            elif node.module.startswith(f"{_PACKAGE}."):
                found.append(node.module.removeprefix(f"{_PACKAGE}."))
    return [each for each in found if _file(each).is_file()]


def _file(name: str) -> Path:
    return FOLDER / f"{name}.py"
