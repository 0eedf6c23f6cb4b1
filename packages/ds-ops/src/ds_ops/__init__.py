"""Fast implementations of ds-core's ops, optimizers and asynchronous file I/O.

    import ds_ops

    optimizer = ds_ops.FusedAdam(model.parameters(), lr=1e-3)
    y = ds_ops.rms_norm(x, weight)

Nothing is built or imported until it is used; `ds ops report` shows what would compute each op.
"""

from __future__ import annotations

import importlib
from typing import Any

from ds_ops._version import __version__

#: Where each public name comes from. Ops are declared in ds-core, and computed here.
_HOMES = {
    # optimizers
    "Adam8bit": "ds_ops.optim",
    "CPUAdagrad": "ds_ops.optim",
    "CPUAdam": "ds_ops.optim",
    "CPULion": "ds_ops.optim",
    "FusedAdagrad": "ds_ops.optim",
    "FusedAdam": "ds_ops.optim",
    "FusedLamb": "ds_ops.optim",
    "FusedLion": "ds_ops.optim",
    "FusedSGD": "ds_ops.optim",
    "Muon": "ds_ops.optim",
    # files
    "AsyncFile": "ds_ops.aio",
    "FastFileWriter": "ds_ops.aio",
    # memory
    "SharedMemoryAllReduce": "ds_ops.shared_memory",
    "pinned_empty": "ds_ops.pinned_memory",
    # layers
    "bias_activation": "ds_core.ops.bias_activation",
    "cross_entropy": "ds_core.ops.cross_entropy",
    "geglu": "ds_core.ops.gated_activation",
    "layer_norm": "ds_core.ops.layer_norm",
    "linear_cross_entropy": "ds_core.ops.linear_cross_entropy",
    "nhwc_bias_add": "ds_core.ops.nhwc_bias_add",
    "rms_norm": "ds_core.ops.rms_norm",
    "rope": "ds_core.ops.rope",
    "rope_tables": "ds_core.ops.rope",
    "swiglu": "ds_core.ops.gated_activation",
    "TransformerLayer": "ds_ops.transformer_layer",
    "TransformerLayerConfig": "ds_ops.transformer_layer",
    # quantization
    "dequantize": "ds_core.ops.quantize",
    "fake_quantize": "ds_core.ops.fake_quantize",
    "quantize": "ds_core.ops.quantize",
    "quantized_reduce": "ds_core.ops.quantized_reduce",
    "sign_pack": "ds_core.ops.sign_pack",
    "sign_unpack": "ds_core.ops.sign_pack",
    "quantize_weight": "ds_core.ops.quantized_weight",
    "QuantizedWeight": "ds_core.ops.quantized_weight",
    "scaled_mm": "ds_core.ops.scaled_mm",
    "weight_only_linear": "ds_core.ops.weight_only_linear",
    "WeightOnlyLinear": "ds_ops.weight_only",
    # attention and experts
    "BertSparseSelfAttention": "ds_ops.sparse_attention",
    "BigBirdSparsityConfig": "ds_ops.sparse_attention",
    "BlockLayout": "ds_core.ops.block_layout",
    "BSLongformerSparsityConfig": "ds_ops.sparse_attention",
    "DenseSparsityConfig": "ds_ops.sparse_attention",
    "FixedSparsityConfig": "ds_ops.sparse_attention",
    "LocalSlidingWindowSparsityConfig": "ds_ops.sparse_attention",
    "SparseAttentionUtils": "ds_ops.sparse_attention",
    "SparseSelfAttention": "ds_ops.sparse_attention",
    "SparsityConfig": "ds_ops.sparse_attention",
    "VariableSparsityConfig": "ds_ops.sparse_attention",
    "block_sparse_attention": "ds_core.ops.sparse_attention",
    "attention": "ds_core.ops.attention",
    "evoformer_attention": "ds_core.ops.evoformer_attention",
    "grouped_mm": "ds_core.ops.grouped_mm",
    "grouped_mm_fp8": "ds_core.ops.grouped_mm_fp8",
    "moe_gate": "ds_core.ops.moe_gate",
    "moe_permute": "ds_core.ops.moe_permute",
    "moe_unpermute": "ds_core.ops.moe_permute",
    "paged_attention": "ds_core.ops.paged_attention",
    "rope_write_kv_cache": "ds_core.ops.rope_write_kv_cache",
    "sample_tokens": "ds_core.ops.sample_tokens",
    "write_kv_cache": "ds_core.ops.kv_cache",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
