"""DeepSpeed's interface on ds-core, ds-ops and ds-zero: programs run as they are.

    import deepspeed

    engine, optimizer, loader, _ = deepspeed.initialize(model=model, config="ds_config.json")

Nothing is done here but naming things as DeepSpeed does: README.md of this package says where each
name lives. Importing it does no work but to look whether files of the original package lie beside
its own; its parts come in on first use.
"""

from __future__ import annotations

from deepspeed import _absent, _installation
from deepspeed._names import names_of
from deepspeed.version import __version__

_installation.check(__path__)
_absent.install()

#: The same as `__version__`.
version = __version__
__version_major__, __version_minor__, __version_patch__ = 0, 19, 8
__git_hash__ = __git_branch__ = "unknown"
#: Whose package of this name it is, for programs that want to know.
__provider__ = "ds"

__getattr__, __dir__ = names_of(
    __name__,
    {
        "initialize": "deepspeed.runtime.initialize:initialize",
        "add_config_arguments": "deepspeed.runtime.arguments:add_config_arguments",
        "DeepSpeedEngine": "deepspeed.runtime.engine:DeepSpeedEngine",
        "DeepSpeedOptimizer": "deepspeed.runtime.base_optimizer:DeepSpeedOptimizer",
        "DeepSpeedOptimizerCallable": "deepspeed.runtime._constants:DeepSpeedOptimizerCallable",
        "DeepSpeedSchedulerCallable": "deepspeed.runtime._constants:DeepSpeedSchedulerCallable",
        "HAS_TRITON": "deepspeed.runtime._constants:HAS_TRITON",
        "TORCH_DISTRIBUTED_DEFAULT_PORT": (
            "deepspeed.runtime._constants:TORCH_DISTRIBUTED_DEFAULT_PORT"
        ),
        "DeepSpeedConfig": "deepspeed.runtime.config:DeepSpeedConfig",
        "DeepSpeedConfigError": "deepspeed.runtime.config:DeepSpeedConfigError",
        "DeepSpeedDataLoader": "deepspeed.runtime.dataloader:DeepSpeedDataLoader",
        "init_distributed": "deepspeed.comm:init_distributed",
        "get_accelerator": "deepspeed.accelerator:get_accelerator",
        "zero": "deepspeed.runtime.zero",
        "checkpointing": "deepspeed.runtime.activation_checkpointing.checkpointing",
        "logger": "deepspeed.utils.logging:logger",
        "log_dist": "deepspeed.utils.logging:log_dist",
        "DeepSpeedTransformerConfig": (
            "deepspeed.ops.transformer.transformer:DeepSpeedTransformerConfig"
        ),
        "DeepSpeedTransformerLayer": (
            "deepspeed.ops.transformer.transformer:DeepSpeedTransformerLayer"
        ),
        "OnDevice": "deepspeed.utils.init_on_device:OnDevice",
        "dist": "deepspeed.comm",
    },
    submodules=(
        *("accelerator", "checkpoint", "comm", "elasticity", "env_report", "launcher"),
        *("git_version_info", "monitor", "ops", "profiling", "runtime", "utils"),
    ),
    missing={
        "init_inference": "ds-inference will bring it; until then run the model itself under "
        "torch.inference_mode()",
        "tp_model_init": "ds-pipe will bring tensor parallelism; use ZeRO stage 3 for models that "
        "do not fit",
        "PipelineModule": "ds-pipe will bring pipelines; use ZeRO stage 3",
        "PipelineEngine": "ds-pipe will bring pipelines; use ZeRO stage 3",
        "InferenceEngine": "ds-inference will bring it",
        "DeepSpeedInferenceConfig": "ds-inference will bring it",
        "DeepSpeedHybridEngine": "ds-inference will bring it; generate with the module of a "
        "stage 3 engine inside deepspeed.zero.GatheredParameters",
        "default_inference_config": "ds-inference will bring it",
        "replace_transformer_layer": "ds-inference will bring it",
        "set_autotp_mode": "ds-pipe will bring tensor parallelism; use ZeRO stage 3",
        "load_ds_config": "ds-pipe will bring tensor parallelism; use ZeRO stage 3",
        "DualPipeVEngine": "ds-pipe will bring pipelines; use ZeRO stage 3",
        "DualPipeVModule": "ds-pipe will bring pipelines; use ZeRO stage 3",
    },
)

__all__ = ["__provider__", "__version__", "version"]
