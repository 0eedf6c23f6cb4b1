"""Top-level keys of DeepSpeed that ds-core 0.1 does not honour, and what to use instead of each.

Data only. A key is refused with its reason unless it switches the feature off anyway: then
leaving it out and honouring it are the same, and the file loads as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Unsupported:
    """Why a key is refused.

    Attributes:
        reason: what is missing and what to do instead.
        off: values that ask for nothing, and so are accepted.
    """

    reason: str
    off: tuple[Any, ...] = ()

    def is_off(self, value: Any) -> bool:
        """Whether `value` asks for nothing: an `off` value, or a section with `enabled` false."""
        if isinstance(value, dict):
            return value.get("enabled") is False
        return any(value is off or (value == off and type(value) is type(off)) for off in self.off)


_LATER = "not in ds-core 0.1"

UNSUPPORTED: Mapping[str, Unsupported] = MappingProxyType(
    {
        # Precision
        "amp": Unsupported('apex is not supported; use "torch_autocast", "bf16" or "fp16"'),
        "ddp_bf16": Unsupported('not supported; use "bf16"'),
        "quantize_training": Unsupported("not supported: ds-compress will bring its successor"),
        "weight_quantization": Unsupported(
            "belongs to inference, not to training; remove it from this file"
        ),
        # Gradients and batches
        "disable_allgather": Unsupported("removed; it had no use", off=(False,)),
        "allgather_size": Unsupported("renamed; use zero_optimization.allgather_bucket_size"),
        "fp32_allreduce": Unsupported('removed; use "communication_data_type": "fp32"'),
        "max_grad_norm": Unsupported("renamed; use gradient_clipping"),
        "vocabulary_size": Unsupported("removed; it only printed a hint on alignment"),
        "cpu_offload": Unsupported(
            "use zero_optimization.offload_optimizer of ds-zero",
            off=(False,),
        ),
        # Parallelism
        "sequence_parallel_size": Unsupported(
            f"{_LATER}: ds-pipe will bring sequence parallelism", off=(1,)
        ),
        "seq_parallel_communication_data_type": Unsupported(
            f"{_LATER}: ds-pipe will bring sequence parallelism", off=("fp32", None)
        ),
        "autotp_size": Unsupported(f"{_LATER}: ds-pipe will bring tensor parallelism", off=(1,)),
        "use_data_before_expert_parallelism": Unsupported(
            f"{_LATER}: ds-moe will bring expert parallelism", off=(False,)
        ),
        "sparse_attention": Unsupported(
            "the engine does not change models: give the section to "
            "ds_ops.sparse_attention.sparsity_config, and what it returns to "
            "ds_ops.SparseSelfAttention in the model"
        ),
        # Memory and compilation
        "graph_harvesting": Unsupported(f"{_LATER}; use torch.compile", off=(False,)),
        "disable_python_gc": Unsupported("not supported; call gc.disable() yourself", off=(False,)),
        # Checkpoints
        "nebula": Unsupported('an Azure-only service, not supported; use "checkpoint"'),
        "datastates_ckpt": Unsupported(f'{_LATER}; use "checkpoint"'),
        # Observers
        "dump_state": Unsupported(
            "removed; `ds config check FILE` prints every effective value", off=(False,)
        ),
        # Forms of the whole file
        "hjson": Unsupported("not supported; write plain JSON"),
        "base64": Unsupported("not supported; pass a mapping or the path of a JSON file"),
    }
)
