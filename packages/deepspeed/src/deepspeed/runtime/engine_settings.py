"""What the configuration of an engine says, under the names of DeepSpeed's questions."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn
from torch.utils.data import IterableDataset

from deepspeed.runtime.config import DeepSpeedConfig


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


def _section(path: str) -> Callable[[EngineSettings], Any]:
    """A method that returns a value of a section of the configuration, or a section as a dict.

    None where the package that the section is for is not installed.
    """
    name, *rest = path.split(".")

    def ask(self: EngineSettings) -> Any:
        found = self._config.ours.section(name)
        for key in rest:
            found = getattr(found, key, None)
        return found.model_dump() if isinstance(found, BaseModel) else found

    ask.__doc__ = f"The effective value of {path}."
    return ask


class EngineSettings(nn.Module):
    """The half of a `DeepSpeedEngine` that answers questions about its configuration."""

    _config: DeepSpeedConfig

    # Parallelism that is not there.
    pipeline_parallelism = False
    has_moe_layers = False
    num_experts: tuple[int, ...] = ()
    #: Gradients are averaged by `backward` itself.
    enable_backward_allreduce = True

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
    torch_autocast_lower_precision_safe_modules = _asks(
        "ours.torch_autocast.lower_precision_safe_modules"
    )

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
    zero_save_muon_momentum_buffer_in_memory = _zero("save_muon_momentum_buffer_in_memory")

    data_efficiency_config = _section("data_efficiency")
    data_sampling_config = _section("data_efficiency.data_sampling")
    data_sampling_enabled = _section("data_efficiency.data_sampling.enabled")
    curriculum_learning_config = _section("data_efficiency.data_sampling.curriculum_learning")
    curriculum_learning_enabled = _section(
        "data_efficiency.data_sampling.curriculum_learning.enabled"
    )
    random_ltd_config = _section("data_efficiency.data_routing.random_ltd")
    random_ltd_enabled = _section("data_efficiency.data_routing.random_ltd.enabled")

    flops_profiler_enabled = _section("flops_profiler.enabled")
    flops_profiler_recompute_fwd_factor = _section("flops_profiler.recompute_fwd_factor")
    flops_profiler_profile_step = _section("flops_profiler.profile_step")
    flops_profiler_module_depth = _section("flops_profiler.module_depth")
    flops_profiler_top_modules = _section("flops_profiler.top_modules")
    flops_profiler_detailed = _section("flops_profiler.detailed")
    flops_profiler_output_file = _section("flops_profiler.output_file")

    autotuning_enabled = _section("autotuning.enabled")
    autotuning_start_profile_step = _section("autotuning.start_profile_step")
    autotuning_end_profile_step = _section("autotuning.end_profile_step")
    autotuning_metric = _section("autotuning.metric")
    autotuning_metric_path = _section("autotuning.metric_path")
    autotuning_model_info_path = _section("autotuning.model_info_path")
    aio_config = _section("aio")

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

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Whether tags of checkpoints that differ between ranks are noticed."""
        return self._config.checkpoint_config.tag_validation != "Ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Whether they are an error."""
        return self._config.checkpoint_config.tag_validation == "Fail"

    def checkpoint_serialization_enabled(self) -> bool:
        """Whether checkpoints are files of torch's own format: they never are."""
        return False

    checkpoint_writer_enabled = checkpoint_serialization_enabled

    def compile_zero_optimization_stage(self) -> bool:
        """Whether a pass of DeepCompile shards the model: there is none."""
        return False

    compile_autosp = compile_autotp = compile_zero_optimization_stage
    uses_parallelization_pass_only = compile_zero_optimization_stage

    def zero_legacy_stage1(self) -> bool:
        """Whether stage 1 is an older one: there is one only."""
        return False

    def dump_state(self) -> bool:
        """Whether the engine logs all that it holds: `ds report` and engine.log tell it."""
        return False

    def optimizer_legacy_fusion(self) -> bool:
        """Whether optimizers are fused in an older way: never."""
        return False

    def cpuadam_cores_perc(self) -> float:
        """The share of the cores that the optimizer on the host may use."""
        return float(getattr(self.zero_offload_optimizer(), "cpuadam_cores_perc", 0.9))

    def is_first_weights_partition_group(self) -> bool:
        """Whether this rank is of the first group that holds a whole model: at stage 3."""
        return self.zero_optimization_partition_weights()

    def dynamic_loss_scale_args(self) -> dict[str, Any] | None:
        """How the loss scale is adjusted, None if the configuration leaves that to the default."""
        asked: Any = self._config._param_dict.get("fp16", {})
        keys = ("initial_scale_power", "loss_scale_window", "min_loss_scale", "hysteresis")
        if not any(key in asked for key in keys):
            return None
        fp16 = self._config.float16_config
        return {
            "init_scale": 2**fp16.initial_scale_power,
            "scale_window": fp16.loss_scale_window,
            "delayed_shift": fp16.hysteresis,
            "consecutive_hysteresis": fp16.consecutive_hysteresis,
            "min_scale": fp16.min_loss_scale,
        }

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtype in which the model computes, and that in which gradients accumulate."""
        fp16, bf16 = self._config.float16_config.enabled, self._config.bfloat16_config.enabled
        model = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
        named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return model, named.get(str(self._config.ours.data_types.grad_accum_dtype), model)

    @staticmethod
    def is_map_style_dataset(obj: Any) -> bool:
        """Whether a dataset is one of items by number."""
        return hasattr(obj, "__getitem__") and hasattr(obj, "__len__")

    @staticmethod
    def is_iterable_style_dataset(obj: Any) -> bool:
        """Whether a dataset is a stream."""
        return isinstance(obj, IterableDataset)
