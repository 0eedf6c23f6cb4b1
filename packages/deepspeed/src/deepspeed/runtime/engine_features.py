"""Questions that programs ask an engine about features, most of which are off or not there."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from deepspeed.runtime.config import DeepSpeedConfig


class EngineFeatures(nn.Module):
    """The part of a `DeepSpeedEngine` that says which features are in use."""

    _config: DeepSpeedConfig

    # Parallelism that is not there.
    pipeline_parallelism = False
    has_moe_layers = False
    num_experts: tuple[int, ...] = ()
    #: Gradients are averaged by `backward` itself.
    enable_backward_allreduce = True

    def get_sequence_parallel_group(self) -> None:
        """None: no sequence is split over ranks."""

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Whether the tags of all ranks are compared when they save."""
        return self._config.ours.checkpoint.tag_validation != "Ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Whether it is an error then if they differ."""
        return self._config.ours.checkpoint.tag_validation == "Fail"

    def dump_state(self) -> bool:
        """Whether the configuration is written at the start: `ds config check FILE` does that."""
        return bool(self._config._param_dict.get("dump_state", False))

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
        """What the model computes in, and what gradients accumulate in."""
        fp16, bf16 = self._config.float16_config.enabled, self._config.bfloat16_config.enabled
        model = torch.float16 if fp16 is True else torch.bfloat16 if bf16 is True else torch.float32
        named = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
        return model, named.get(self._config.ours.data_types.grad_accum_dtype or "", model)

    # ------------------------------------------------------------------ sections

    def _asks_for(self, *path: str) -> bool:
        """Whether a section of what the program wrote is enabled."""
        section: Any = reduce(
            lambda value, key: value.get(key, {}) if isinstance(value, Mapping) else {},
            path,
            self._config._param_dict,
        )
        return isinstance(section, Mapping) and section.get("enabled") is True

    def data_sampling_enabled(self) -> bool:
        """Whether the configuration chooses the order of the data."""
        return self._asks_for("data_efficiency", "data_sampling")

    def curriculum_learning_enabled(self) -> bool:
        """Whether easy data come first."""
        return self._asks_for("data_efficiency", "data_sampling", "curriculum_learning")

    def random_ltd_enabled(self) -> bool:
        """Whether layers leave out tokens at random."""
        return self._asks_for("data_efficiency", "data_routing", "random_ltd")

    def autotuning_enabled(self) -> bool:
        """Whether this run is a trial of the original's autotuner: never; see `ds tune`."""
        return False

    def flops_profiler_profile_step(self) -> int:
        """Optimizer steps before the one that is profiled."""
        return int(self._flops("profile_step"))

    def flops_profiler_module_depth(self) -> int:
        """Deepest level of modules that is shown."""
        return int(self._flops("module_depth"))

    def flops_profiler_top_modules(self) -> int:
        """How many of the largest modules of each level are named."""
        return int(self._flops("top_modules"))

    def flops_profiler_detailed(self) -> bool:
        """Whether the tree of all modules is shown."""
        return bool(self._flops("detailed"))

    def flops_profiler_output_file(self) -> str | None:
        """File that gets the report."""
        found: str | None = self._flops("output_file")
        return found

    def _flops(self, key: str) -> Any:
        return getattr(self._config.ours.section("flops_profiler"), key)

    # ------------------------------------------------------------------ data

    @staticmethod
    def is_map_style_dataset(obj: object) -> bool:
        """Whether samples are found by their number."""
        return hasattr(obj, "__getitem__") and hasattr(obj, "__len__")

    @staticmethod
    def is_iterable_style_dataset(obj: object) -> bool:
        """Whether samples come one after the other."""
        return isinstance(obj, IterableDataset)
