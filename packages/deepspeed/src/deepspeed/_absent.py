"""Modules of the original package that this one does not have, and what to use instead.

They can be imported, and names from them, or the `import` lines of a program that never uses them
would fail; whatever is done with such a name raises NotProvidedError with the reason given here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deepspeed._stand_in import not_provided

# importlib.abc costs as much to import as all the rest of this package together.
if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object

_MOE = "ds-moe will bring mixtures of experts; until then use the model's own experts"
_PIPE = "ds-pipe will bring pipelines; use ZeRO stage 3 for models that do not fit"
_TENSOR_PARALLEL = (
    "ds-pipe will bring tensor parallelism; use ZeRO stage 3 for models that do not fit"
)
_SEQUENCE = (
    "ds-pipe will bring sequence parallelism; for long sequences use ds_zero.tiled_mlp and "
    "tiled_loss, and activation checkpointing"
)
_INFERENCE = "ds-inference will bring it; until then run the model itself in torch.inference_mode()"
_COMPRESSION = "ds-compress will bring quantization, pruning and distillation"
_ELASTIC = "use compute_elastic_config of deepspeed.elasticity, or `ds elastic`"
_OFFLOAD = (
    'set "offload_optimizer" and "offload_param" in zero_optimization; device "nvme" moves them '
    "to disk"
)
_INTERNAL = "it is an inner part of the original package that nothing replaces one to one"


def _below(package: str, modules: str, reason: str) -> dict[str, str]:
    return {f"{package}.{module}": reason for module in modules.split()}


#: What to use instead of a module of the original and of all below it. Of packages that this one
#: has too, each module is named, so that a misspelt name fails as one.
ABSENT: Mapping[str, str] = {
    "deepspeed.autotuning": "run `ds tune CONFIG`, or call ds_core.tuning",
    "deepspeed.compile": "use engine.compile(), or torch.compile on the blocks of the model",
    "deepspeed.compression": _COMPRESSION,
    "deepspeed.datastates": 'set "checkpoint": {"asynchronous": true} in the config',
    "deepspeed.inference": _INFERENCE,
    "deepspeed.io": "use ds_ops.aio, which reads and writes tensors asynchronously",
    "deepspeed.linear": "use peft for LoRA, and ds_core.ops for quantized weights",
    "deepspeed.model_implementations": _INFERENCE,
    "deepspeed.module_inject": _TENSOR_PARALLEL,
    "deepspeed.moe": _MOE,
    "deepspeed.nvme": "use `ds io bench` and `ds io tune`",
    "deepspeed.pipe": _PIPE,
    "deepspeed.sequence": _SEQUENCE,
    **_below(
        "deepspeed.accelerator",
        "cpu_accelerator cuda_accelerator hpu_accelerator klxpu_accelerator mlu_accelerator "
        "mps_accelerator npu_accelerator sdaa_accelerator supa_accelerator xpu_accelerator",
        "get_accelerator() serves every kind of device that torch.accelerator knows",
    ),
    **_below(
        "deepspeed.checkpoint",
        "affine affine_transfer autoep_affine autoep_universal autoep_zero3_metadata constants "
        "deepspeed_checkpoint reshape_3d_utils reshape_meg_2d reshape_utils universal_checkpoint "
        "zero_checkpoint",
        "checkpoints are read and written by ds_core.checkpoint, which loads them at any number "
        "of ranks; `ds checkpoint import` reads those of the original",
    ),
    **_below(
        "deepspeed.comm",
        "backend ccl config constants mori pg_utils torch utils",
        "collectives are those of deepspeed.comm itself, on ds_core.comm",
    ),
    **_below(
        "deepspeed.launcher",
        "constants launch launcher_helper multinode_runner",
        "use the command `deepspeed` or `ds run`, or call ds_core.launcher",
    ),
    **_below("deepspeed.elasticity", "config constants elastic_agent utils", _ELASTIC),
    **_below(
        "deepspeed.monitor",
        "comet csv_monitor tensorboard utils wandb",
        "use the sinks of ds_core.observers, which the config sets up",
    ),
    **_below(
        "deepspeed.ops",
        "aio compile csrc gds pin_memory quantizer random_ltd triton_ops",
        "ds_ops has the kernels and optimizers, ds_ops.aio the file I/O; `ds ops report` lists "
        "them",
    ),
    "deepspeed.ops.fp_quantizer": "use ds_ops.weight_only",
    "deepspeed.ops.op_builder": "operators are built at first use: `ds ops report` lists them",
    "deepspeed.ops.transformer.inference": _INFERENCE,
    **_below(
        "deepspeed.ops.sparse_attention",
        "matmul softmax trsrc",
        "use SparseSelfAttention of deepspeed.ops.sparse_attention, which computes both in one "
        "kernel",
    ),
    **_below("deepspeed.profiling", "config constants", _INTERNAL),
    **_below(
        "deepspeed.runtime.activation_checkpointing",
        "config offload_activations",
        "use ds_core.activation_checkpointing",
    ),
    **_below(
        "deepspeed.runtime",
        "domino tensor_parallel",
        _TENSOR_PARALLEL,
    ),
    **_below(
        "deepspeed.runtime",
        "hybrid_engine hybrid_engine_graph rollout state_dict_factory weight_quantizer",
        _INFERENCE,
    ),
    **_below("deepspeed.runtime", "pipe", _PIPE),
    **_below("deepspeed.runtime", "sequence_parallel", _SEQUENCE),
    **_below("deepspeed.runtime", "quantize", _COMPRESSION),
    **_below(
        "deepspeed.runtime",
        "config_utils constants keep_in_fp32 precision_config python_gc",
        _INTERNAL,
    ),
    "deepspeed.runtime.bf16_optimizer": 'set "bf16": {"enabled": true} in the config',
    "deepspeed.runtime.checkpoint_engine": "checkpoints are written by engine.save_checkpoint; in "
    'the background with "checkpoint": {"asynchronous": true} in the config',
    "deepspeed.runtime.chunked_cross_entropy": "use ds_core.ops.linear_cross_entropy",
    "deepspeed.runtime.comm": "collectives are those of deepspeed.comm, on ds_core.comm",
    "deepspeed.runtime.compiler": "use engine.compile(), or torch.compile",
    "deepspeed.runtime.data_pipeline": "use ds_core.data (curriculum, analyzer, token files) and "
    "ds_core.efficiency (random layer-token dropping)",
    "deepspeed.runtime.eigenvalue": "use ds_core.curvature",
    "deepspeed.runtime.fp16": 'set "fp16": {"enabled": true} in the config',
    "deepspeed.runtime.model_checkpointing": "checkpoints are written by engine.save_checkpoint",
    "deepspeed.runtime.progressive_layer_drop": "use ds_core.efficiency",
    "deepspeed.runtime.sparse_tensor": 'set "sparse_gradients": true in the config',
    "deepspeed.runtime.superoffload": _OFFLOAD,
    "deepspeed.runtime.swap_tensor": _OFFLOAD,
    "deepspeed.runtime.torch_autocast": 'set "torch_autocast" in the config',
    "deepspeed.runtime.zenflow": 'set "zenflow" in zero_optimization, which ds-zero has',
    **_below(
        "deepspeed.runtime.zero",
        "contiguous_memory_allocator leaf_module_config linear partitioned_param_coordinator "
        "partitioned_param_profiler",
        "what programs call is in deepspeed.zero; the rest is inside ds_zero",
    ),
    "deepspeed.utils.bwc": _TENSOR_PARALLEL,
    "deepspeed.utils.debug": 'see `ds report`, engine.log and the section "trace" of the config',
    **_below(
        "deepspeed.utils",
        "config exceptions mixed_precision_linkage static_cache torch types",
        _INTERNAL,
    ),
    **_below(
        "deepspeed.utils", "pin_memory pin_memory_tracker", "use get_accelerator().pin_memory"
    ),
    **_below("deepspeed", "compat constants", _INTERNAL),
    "deepspeed.git_version_info_installed": "see deepspeed.__version__ and `ds report`",
}

_BUILDERS = "deepspeed.ops._builders"
_CONSTANTS = "deepspeed.runtime._constants"

#: What programs use of these modules and is there nevertheless: where it lives.
PROVIDED: Mapping[str, str] = {
    "deepspeed.compression.helper.recursive_getattr": "deepspeed.utils.module_utils",
    "deepspeed.compression.helper.recursive_setattr": "deepspeed.utils.module_utils",
    "deepspeed.constants.TORCH_DISTRIBUTED_DEFAULT_PORT": _CONSTANTS,
    "deepspeed.moe.utils.has_moe_layers": "deepspeed._experts",
    "deepspeed.moe.utils.is_moe_param": "deepspeed._experts",
    **{
        f"deepspeed.ops.op_builder.{name}": _BUILDERS
        for name in (
            *("CPUAdagradBuilder", "CPUAdamBuilder", "CPULionBuilder"),
            *("FusedAdamBuilder", "FusedLambBuilder", "FusedLionBuilder"),
        )
    },
    "deepspeed.ops.transformer.inference.bias_add.nhwc_bias_add": "ds_core.ops.nhwc_bias_add",
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": "deepspeed.runtime.base_optimizer",
    "deepspeed.runtime.constants.ROUTE_EVAL": _CONSTANTS,
    "deepspeed.runtime.constants.ROUTE_PREDICT": _CONSTANTS,
    "deepspeed.runtime.constants.ROUTE_TRAIN": _CONSTANTS,
    "deepspeed.runtime.data_pipeline.curriculum_scheduler.CurriculumScheduler": (
        "deepspeed._curriculum"
    ),
    "deepspeed.runtime.fp16.fused_optimizer.FP16_Optimizer": "deepspeed.runtime.base_optimizer",
    "deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer": (
        "deepspeed.runtime.base_optimizer"
    ),
}


def reason_for(module: str) -> str | None:
    """What to use instead of a module: by the longest prefix of its name; None if it has none."""
    name = module
    while name:
        if name in ABSENT:
            return ABSENT[name]
        name = name.rpartition(".")[0]
    return None


class AbsentFinder:
    """Finds, last of all, the modules of `ABSENT`; they have every name, and none can be used."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module without code, or None if the table does not have it."""
        if not fullname.startswith("deepspeed.") or fullname in PROVIDED:
            return None
        reason = reason_for(fullname)
        if reason is None:
            return None
        return ModuleSpec(fullname, _AbsentLoader(reason), origin="not provided", is_package=True)


class _AbsentLoader(Loader):
    def __init__(self, reason: str) -> None:
        self._reason = reason

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def getattr_(name: str) -> Any:
            # What inspection asks of every module is not use.
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            full = f"{module.__name__}.{name}"
            if full in PROVIDED:
                return getattr(importlib.import_module(PROVIDED[full]), name)
            return not_provided(full, self._reason)

        module.__doc__ = f"Not provided by this package; {self._reason}."
        vars(module)["__getattr__"] = getattr_


def install() -> None:
    """Have `import` find the modules of `ABSENT`; once."""
    if not any(isinstance(finder, AbsentFinder) for finder in sys.meta_path):
        sys.meta_path.append(AbsentFinder())
