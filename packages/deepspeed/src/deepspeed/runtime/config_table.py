"""How keys that DeepSpeed accepts and ds-core or ds-zero would refuse are accepted here. Data only.

A key is left out, with a warning that gives the reason, only where leaving it out cannot change the
results of a run. Whatever is not in these tables reaches ds_core.config, which says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class LeftOut(NamedTuple):
    """A key that is accepted and has no effect.

    Attributes:
        reason: why that cannot change the results.
        if_value: the values for which it holds; others are refused by ds_core.config.
    """

    reason: str
    if_value: Callable[[Any], bool] = lambda value: True


def _is_off(value: Any) -> bool:
    """A section that is not enabled; Hugging Face's files leave "auto" there."""
    return not isinstance(value, Mapping) or value.get("enabled", False) in (False, None, "auto")


def _has_one_rank(value: Any) -> bool:
    sizes = ("autotp_size", "tp_size")
    found = [value.get(key) for key in sizes] if isinstance(value, Mapping) else []
    return all(size in (None, 0, 1, "auto") for size in found)


def _keeps_ranks_alike(value: Any) -> bool:
    """DeepCompile's passes that change who computes what are no matter of speed alone."""
    return not {"autosp", "autotp"} & set(value or ())


_SPEED = "it is about speed and memory alone"
_NO_EFFECT = "it has no effect on training"
_SEQUENCE = "it concerns sequence parallelism, which is off"

#: By path of the key. What the original does not know at the top level it ignores, so those keys
#: need no entry: they are left out with a warning that names the nearest key there is.
LEFT_OUT: Mapping[str, LeftOut] = MappingProxyType(
    {
        # The whole file
        "amp": LeftOut("it is not enabled", _is_off),
        "allgather_size": LeftOut(_SPEED),
        "autotp_size": LeftOut("the original reads tensor_parallel.autotp_size"),
        "cpu_offload": LeftOut("the original reads it in zero_optimization only"),
        "data_parallel_size": LeftOut("it is the number of ranks"),
        "datastates_ckpt": LeftOut("checkpoints are written by ds-core"),
        "disable_allgather": LeftOut(_SPEED),
        "disable_python_gc": LeftOut(_SPEED),
        "dump_state": LeftOut("`ds config check FILE` prints every effective value"),
        "expert_parallel": LeftOut("it is not enabled", _is_off),
        "fp32_allreduce": LeftOut("the original ignores it; use communication_data_type"),
        "gradient_predivide_factor": LeftOut(
            "gradients are divided by all the ranks before they are summed, so no sum overflows"
        ),
        "hybrid_engine": LeftOut("it is not enabled", _is_off),
        "inference": LeftOut("it belongs to inference"),
        "max_grad_norm": LeftOut("the original ignores it; use gradient_clipping"),
        "pipeline": LeftOut("it belongs to pipelines, and this model is none"),
        "seq_parallel_communication_data_type": LeftOut(_SEQUENCE),
        "tensor_parallel": LeftOut("it asks for one rank", _has_one_rank),
        "use_data_before_expert_parallelism": LeftOut("there are no experts on ranks of their own"),
        "vocabulary_size": LeftOut(_NO_EFFECT),
        # Sections of ds-core
        "autotuning.arg_mappings": LeftOut(
            "`ds tune` hands over a trial's configuration as a whole"
        ),
        "bf16.check_grad_overflow": LeftOut(
            "gradients that are not finite are an error then, rather than written into the weights"
        ),
        "checkpoint.checkpoint_serialization": LeftOut("a checkpoint is always a set of files"),
        "checkpoint.use_node_local_storage": LeftOut(
            "there is one node", lambda value: value in (True, False, "auto")
        ),
        "compile.compiled_autograd_enabled": LeftOut(_SPEED),
        "compile.deepcompile": LeftOut(_SPEED),
        "compile.free_activation": LeftOut(_SPEED),
        "compile.offload_activation": LeftOut(_SPEED),
        "compile.offload_opt_states": LeftOut(_SPEED),
        "compile.offload_parameters": LeftOut(_SPEED),
        "compile.passes": LeftOut(_SPEED, _keeps_ranks_alike),
        "compile.schedule": LeftOut(_SPEED),
        "compile.symmetric_memory": LeftOut(_SPEED),
        "data_types.buffer_dtype": LeftOut("buffers keep their dtype", lambda v: v is None),
        "data_types.keep_in_fp32_modules": LeftOut("buffers keep the dtype that the model gives"),
        "data_types.param_dtype": LeftOut("it is null", lambda value: value is None),
        "activation_checkpointing.profile": LeftOut("use the section flops_profiler"),
        "optimizer.legacy_fusion": LeftOut(_SPEED),
        "optimizer.params.set_grad_none": LeftOut(_SPEED),
        # ZeRO
        "zero_optimization.compute_grad_norm": LeftOut("the norm is always known, at no cost"),
        "zero_optimization.cpu_offload_use_pin_memory": LeftOut(
            "deprecated, and the original ignores it; use offload_optimizer.pin_memory"
        ),
        "zero_optimization.ignore_unused_parameters": LeftOut(
            "parameters without a gradient count as zero, and are no error"
        ),
        "zero_optimization.legacy_stage1": LeftOut("there is one implementation of stage 1"),
        "zero_optimization.save_muon_momentum_buffer_in_memory": LeftOut(_SPEED),
        "zero_optimization.zero_hpz_partition_size": LeftOut(_SPEED),
    }
)

#: Of activation_checkpointing: the original's says how, and never which blocks.
HOW_NOT_WHICH = (
    "it says how deepspeed.checkpointing.checkpoint stores its inputs, once a program passes it to "
    'deepspeed.checkpointing.configure; "blocks": "repeated" here checkpoints the model\'s blocks'
)

#: Deprecated names, and names of the original's fields that its files may use too.
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        f"zero_optimization.{old}": f"zero_optimization.{new}"
        for old, new in {
            "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
            "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
            "prefetch_bucket_size": "stage3_prefetch_bucket_size",
            "param_persistence_threshold": "stage3_param_persistence_threshold",
            "model_persistence_threshold": "stage3_model_persistence_threshold",
            "max_live_parameters": "stage3_max_live_parameters",
            "max_reuse_distance": "stage3_max_reuse_distance",
            "module_granularity_threshold": "stage3_module_granularity_threshold",
            "use_all_reduce_for_fetch_params": "stage3_use_all_reduce_for_fetch_params",
            "allgather_sequential": "stage3_allgather_sequential",
        }.items()
    }
)

#: Switches that became sections: what true stands for.
SWITCHES: Mapping[str, str] = MappingProxyType(
    {
        "zero_optimization.cpu_offload": "offload_optimizer",
        "zero_optimization.cpu_offload_param": "offload_param",
    }
)

#: Sections of which the original reads the keys that it knows, and ignores the others.
READ_BY_KEY = frozenset(
    (
        *("activation_checkpointing", "aio", "autotuning", "checkpoint", "data_efficiency"),
        *("data_types", "flops_profiler", "optimizer", "scheduler", "torch_autocast"),
    )
)

#: Spellings of values that the original takes.
VALUES: Mapping[str, Mapping[Any, Any]] = MappingProxyType(
    {"communication_data_type": {"bfp16": "bf16"}}
)
