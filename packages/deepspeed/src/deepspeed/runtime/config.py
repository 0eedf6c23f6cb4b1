"""The configuration of a run under DeepSpeed's names."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch.distributed as dist

from deepspeed._names import names_of
from deepspeed.runtime import _constants, _env
from deepspeed.runtime.config_reading import read_config, translate
from deepspeed.runtime.parallel_unit import data_ranks
from ds_core import config as configuration
from ds_core.errors import ConfigError

logger = logging.getLogger("DeepSpeed")

#: What is wrong with a configuration; ds_core's own error, so that either name catches it.
DeepSpeedConfigError = ConfigError

__getattr__, __dir__ = names_of(
    __name__, {name: f"{_constants.__name__}:{name}" for name in _constants.OPTIMIZER_NAMES}
)

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]


class DeepSpeedConfig:
    """What a configuration of DeepSpeed means here; every value that is not read is not checked.

    Args:
        config: a dict, the path of a JSON file, or JSON as URL-safe base64.
        mpu: see `initialize`.
        mesh_device: of data-parallel ranks only.

    Attributes:
        ours: the same as ds_core has it, complete and consistent.
        warnings: what was accepted without effect.
        world_size: data-parallel ranks.

    Raises DeepSpeedConfigError for what would change the results of a run and cannot be honoured.
    """

    def __init__(self, config: Any, mpu: Any = None, mesh_device: Any = None) -> None:
        self._param_dict = read_config(config)
        running = dist.is_available() and dist.is_initialized()
        self.global_rank = dist.get_rank() if running else 0
        self.world_size = data_ranks(mpu, mesh_device) if running else 1
        translated, self.warnings = translate(
            self._param_dict, num_nodes=_env.num_nodes(dist.get_world_size() if running else 1)
        )
        self.ours = configuration.load(translated, world_size=self.world_size)
        if self.global_rank == 0:
            for warning in self.warnings:
                logger.warning("config: %s", warning)
        self._name_values()

    def _name_values(self) -> None:
        ours = self.ours
        self.train_batch_size = ours.train_batch_size
        self.train_micro_batch_size_per_gpu = ours.train_micro_batch_size_per_gpu
        self.gradient_accumulation_steps = ours.gradient_accumulation_steps
        self.managed_gradient_accumulation = ours.managed_gradient_accumulation
        self.gradient_clipping = ours.gradient_clipping
        self.steps_per_print = ours.steps_per_print
        self.wall_clock_breakdown = ours.wall_clock_breakdown
        self.memory_breakdown = ours.memory_breakdown
        self.dataloader_drop_last = ours.dataloader_drop_last
        self.communication_data_type = ours.communication_data_type
        self.float16_config, self.bfloat16_config = ours.fp16, ours.bf16
        self.torch_autocast_enabled = ours.torch_autocast.enabled
        self.zero_config: Any = ours.section("zero_optimization")
        zero: Any = self.zero_config
        self.zero_optimization_stage: int = 0 if zero is None else zero.stage
        self.zero_enabled = self.zero_optimization_stage > 0
        self.optimizer_name = ours.optimizer.type if ours.optimizer else None
        self.optimizer_params = dict(ours.optimizer.params) if ours.optimizer else None
        self.scheduler_name = ours.scheduler.type if ours.scheduler else None
        self.scheduler_params = dict(ours.scheduler.params) if ours.scheduler else None
        self.checkpoint_config = ours.checkpoint
        self.compile_config = ours.compile

    @property
    def param_dict(self) -> dict[str, Any]:
        """A copy of what the program wrote."""
        return copy.deepcopy(self._param_dict)

    def print_user_config(self) -> None:
        """Log what the program wrote."""
        logger.info("  json = %s", self._param_dict)

    def print(self, name: str) -> None:
        """Log every effective value, and where it comes from."""
        logger.info("%s:", name)
        for row in configuration.explain(self.ours):
            logger.info("  %s", row)
