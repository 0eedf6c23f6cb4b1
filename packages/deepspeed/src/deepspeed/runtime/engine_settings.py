"""What the configuration of an engine says, under the names of DeepSpeed's questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine_features import EngineFeatures


def _asks(path: str) -> Callable[[EngineSettings], Any]:
    """A method that returns the value at a path of the effective configuration; None beyond one."""

    def ask(self: EngineSettings) -> Any:
        return reduce(
            lambda value, name: None if value is None else getattr(value, name),
            path.split("."),
            self._config,
        )

    ask.__doc__ = f"The effective value of {path}."
    return ask


def _zero(key: str) -> Callable[[EngineSettings], Any]:
    return _asks(f"zero_config.{key}")


class EngineSettings(EngineFeatures):
    """The half of a `DeepSpeedEngine` that answers questions about its configuration."""

    _config: DeepSpeedConfig

    optimizer_name = _asks("optimizer_name")
    optimizer_params = _asks("optimizer_params")
    scheduler_name = _asks("scheduler_name")
    scheduler_params = _asks("scheduler_params")
    gradient_clipping = _asks("gradient_clipping")
    managed_gradient_accumulation = _asks("managed_gradient_accumulation")
    dataloader_drop_last = _asks("dataloader_drop_last")
    wall_clock_breakdown = _asks("wall_clock_breakdown")
    memory_breakdown = _asks("memory_breakdown")
    steps_per_print = _asks("ours.steps_per_print")
    log_level = _asks("ours.log_level")
    gradient_predivide_factor = _asks("ours.gradient_predivide_factor")

    fp16_auto_cast = _asks("float16_config.auto_cast")
    loss_scale = _asks("float16_config.loss_scale")
    fp16_master_weights_and_gradients = _asks("float16_config.fp16_master_weights_and_grads")
    bf16_master_weights_and_gradients = _asks("bfloat16_config.bf16_master_weights_and_grads")
    bf16_optimizer_states = _asks("bfloat16_config.bf16_optimizer_states")
    torch_autocast_enabled = _asks("torch_autocast_enabled")

    zero_optimization = _asks("zero_enabled")
    zero_optimization_stage = _asks("zero_optimization_stage")
    zero_allow_untested_optimizer = _asks("ours.zero_allow_untested_optimizer")
    zero_force_ds_cpu_optimizer = _asks("ours.zero_force_ds_cpu_optimizer")
    zero_reduce_scatter = _zero("reduce_scatter")
    zero_overlap_comm = _zero("overlap_comm")
    zero_offload_optimizer = _zero("offload_optimizer")
    zero_offload_param = _zero("offload_param")
    zero_sub_group_size = _zero("sub_group_size")
    zero_reduce_bucket_size = _zero("reduce_bucket_size")
    zero_multi_rank_bucket_allreduce = _zero("use_multi_rank_bucket_allreduce")
    zero_allgather_bucket_size = _zero("allgather_bucket_size")
    zero_allgather_partitions = _zero("allgather_partitions")
    zero_contiguous_gradients = _zero("contiguous_gradients")
    zero_load_from_fp32_weights = _zero("load_from_fp32_weights")
    zero_elastic_checkpoint = _zero("elastic_checkpoint")
    zero_max_live_parameters = _zero("stage3_max_live_parameters")
    zero_max_reuse_distance = _zero("stage3_max_reuse_distance")
    zero_prefetch_bucket_size = _zero("stage3_prefetch_bucket_size")
    zero_module_granularity_threshold = _zero("stage3_module_granularity_threshold")
    zero_param_persistence_threshold = _zero("stage3_param_persistence_threshold")
    zero_model_persistence_threshold = _zero("stage3_model_persistence_threshold")
    zero_gather_16bit_weights_on_model_save = _zero("stage3_gather_16bit_weights_on_model_save")
    zero_ignore_unused_parameters = _zero("ignore_unused_parameters")
    zero_round_robin_gradients = _zero("round_robin_gradients")
    zero_parameter_alignment = _zero("parameter_alignment")
    zero_hpz_partition_size = _zero("zero_hpz_partition_size")
    zero_quantized_weights = _zero("zero_quantized_weights")
    zero_quantized_nontrainable_weights = _zero("zero_quantized_nontrainable_weights")
    zero_quantized_gradients = _zero("zero_quantized_gradients")
    zero_log_trace_cache_warnings = _zero("log_trace_cache_warnings")
    zero_allgather_sequential = _zero("stage3_allgather_sequential")
    zero_compute_grad_norm = _zero("compute_grad_norm")
    is_sanity_checks_enabled = _zero("enable_sanity_checks")
    zenflow_config = _zero("zenflow")

    load_universal_checkpoint = _asks("checkpoint_config.load_universal")
    use_node_local_storage = _asks("checkpoint_config.use_node_local_storage")

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are sharded: stage 2 or 3."""
        return self._config.zero_optimization_stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are sharded: stage 3."""
        return self._config.zero_optimization_stage >= 3

    def zero_use_cpu_optimizer(self) -> bool:
        """Whether optimizer states are on the host or on disk, and step on the CPU."""
        section = self.zero_offload_optimizer()
        return section is not None and section.device != "none"

    zero_cpu_offload = zero_use_cpu_optimizer

    def zero_partial_offload(self) -> float:
        """The share of the optimizer that steps on the CPU."""
        section = self.zero_offload_optimizer()
        return 1.0 if section is None else section.ratio

    def zero_nvme_offload_optimizer(self) -> bool:
        """Whether optimizer states are on disk."""
        section = self.zero_offload_optimizer()
        return section is not None and section.device == "nvme"

    def super_offload(self) -> bool:
        """Whether the host steps before the gradient norm is known."""
        section = self.zero_offload_optimizer()
        return section is not None and section.super_offload

    def autotp_size(self) -> int:
        """Tensor-parallel ranks; there are none."""
        return 0

    def postscale_gradients(self) -> bool:
        """Whether gradients are divided after they are summed."""
        return not self._config.ours.prescale_gradients

    def data_efficiency_enabled(self) -> bool:
        """Whether the configuration asks for a curriculum or another order of the data."""
        return bool(getattr(self._config.ours.section("data_efficiency"), "enabled", False))

    def flops_profiler_enabled(self) -> bool:
        """Whether a step is profiled."""
        return bool(getattr(self._config.ours.section("flops_profiler"), "enabled", False))
