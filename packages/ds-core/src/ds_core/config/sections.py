"""The sections of the config that ds-core itself owns."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ds_core.config.section import Only, Section

if TYPE_CHECKING:
    from ds_core.engine_files import SavePolicy

_LATER = "not in ds-core 0.1"
_ALIASES = MappingProxyType(
    {
        **dict.fromkeys(("float", "float32", "torch.float32"), "fp32"),
        **dict.fromkeys(("half", "float16", "torch.float16"), "fp16"),
        **dict.fromkeys(("bfloat16", "torch.bfloat16"), "bf16"),
    }
)


def _dtype_name(value: Any) -> Any:
    return _ALIASES.get(value, value) if isinstance(value, str) else value


def _capitalized(value: Any) -> Any:
    return value.capitalize() if isinstance(value, str) else value


#: A floating-point format; "bfloat16" and "torch.bfloat16" are accepted for "bf16", and so on.
DtypeName = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_dtype_name)]
HalfName = Annotated[Literal["fp16", "bf16"], BeforeValidator(_dtype_name)]
#: Case does not matter: DeepSpeed accepts "WARN" too.
TagValidation = Annotated[Literal["Ignore", "Warn", "Fail"], BeforeValidator(_capitalized)]
Switch = bool | Literal["auto"]


class OptimizerSection(Section):
    """Which optimizer to build, and with what."""

    type: str = Field(
        description="adam, adamw, sgd, adagrad, lamb, lion, muon, or the name of any class of "
        'torch.optim in any case. As in DeepSpeed, "adam" is AdamW unless params.adam_w_mode is '
        "false."
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of that class, checked against it."
    )
    legacy_fusion: Annotated[
        bool, Only(False, because="the old fused kernels are gone; remove the key")
    ] = Field(
        default=False, description="Only false: torch's fused kernels are used where they exist."
    )


class SchedulerSection(Section):
    """Which learning-rate schedule to build, and with what."""

    type: str = Field(
        description="LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or the name "
        "of a class of torch.optim.lr_scheduler."
    )
    params: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of that class, checked against it."
    )


class Fp16Section(Section):
    """fp16 parameters and activations, fp32 master copy, scaled loss."""

    enabled: Switch = Field(
        default=False,
        description='"auto": on where the device computes fp16 fast, unless bf16 is chosen.',
    )
    loss_scale: float = Field(
        default=0.0, ge=0, description="A constant loss scale; 0 adjusts it while training."
    )
    initial_scale_power: int = Field(
        default=16, ge=0, le=126, description="The first adjusted loss scale is 2 to this power."
    )
    loss_scale_window: int = Field(
        default=1000, ge=1, description="Steps without overflow after which the loss scale doubles."
    )
    hysteresis: int = Field(
        default=2,
        ge=1,
        description="The loss scale halves at this many overflows, not at the first.",
    )
    consecutive_hysteresis: bool = Field(
        default=False, description="Whether a step without overflow resets that count."
    )
    min_loss_scale: float = Field(
        default=1.0, gt=0, description="The loss scale never falls below it."
    )
    auto_cast: bool = Field(
        default=False,
        description="Whether floating-point tensors among the model's arguments are cast to fp16.",
    )
    fp16_master_weights_and_grads: Annotated[
        bool,
        Only(
            False,
            because="fp16 weights that are updated in place overflow and underflow, and no kernel "
            "rounds fp16 stochastically; use bf16 and its bf16_master_weights_and_grads, or keep "
            "the fp32 master copy, of which zero_optimization.stage 1 or more holds 1/N",
        ),
    ] = Field(default=False, description="Only false: the master copy is fp32.")


class Bf16Section(Section):
    """bf16 parameters and activations, fp32 master copy or none; no loss scale is needed."""

    enabled: Switch = Field(
        default=False,
        description='"auto": on where the device computes bf16 fast; elsewhere the model keeps '
        "its own dtype.",
    )
    immediate_grad_update: bool = Field(
        default=False,
        description="Makes no difference: each gradient always goes to its final buffer as "
        "autograd makes it.",
    )
    check_grad_overflow: Annotated[
        bool, Only(True, because="the norm that clipping needs tells it for free; remove the key")
    ] = Field(
        default=True,
        description="Only true: gradients that are not finite never reach the weights.",
    )
    bf16_master_weights_and_grads: bool = Field(
        default=False,
        description="Whether there is no fp32 master copy: the bf16 parameters themselves are "
        "updated, and gradients accumulate in bf16 unless data_types.grad_accum_dtype says "
        "otherwise. 4 bytes per parameter less, 6 with fp32 gradients.",
    )
    stochastic_rounding: bool = Field(
        default=True,
        description="With bf16_master_weights_and_grads: whether updated parameters are rounded up "
        "or down at random, right on average, by an optimizer of ds-ops. If not, they are rounded "
        "to nearest, and an update of less than 1/512 of a weight is lost.",
    )
    bf16_optimizer_states: bool = Field(
        default=False,
        description="Whether optimizer states are bf16 in place of fp32, by an optimizer of "
        "ds-ops; torch's own keep theirs in the format of what they update. For 8 bits: "
        'optimizer.type "Adam8bit".',
    )


class TorchAutocastSection(Section):
    """torch.autocast around forward; parameters keep the dtype of the model."""

    enabled: bool = Field(default=False, description="Whether forward runs under torch.autocast.")
    dtype: HalfName = Field(
        default="bf16",
        description="The dtype of autocast; fp16 also scales the loss as `fp16` says.",
    )
    lower_precision_safe_modules: Annotated[
        tuple[str, ...] | None,
        Only(
            None,
            because="gradients of several modules travel in one message, so in one format: set "
            "communication_data_type for all of them",
        ),
    ] = Field(default=None, description="Only null: which operations autocast is torch's own list.")


class DataTypesSection(Section):
    """Number formats of what training keeps beside the parameters."""

    removed: ClassVar[Mapping[str, str]] = {
        "param_dtype": f'{_LATER}; "bf16" or "fp16" chooses it, else the model keeps its own',
        "buffer_dtype": f"{_LATER}; buffers keep the dtype that the model gives them",
        "keep_in_fp32_modules": f"{_LATER}; buffers keep the dtype that the model gives them",
    }

    grad_accum_dtype: DtypeName | None = Field(
        default=None,
        description="Format in which gradients add up over micro-batches; null: fp32 where several "
        "of them add up, else that of the parameters.",
    )


class ParallelWriteSection(Section):
    """Who writes a checkpoint."""

    pipeline_stage: bool = Field(
        default=False, description="Makes no difference: every rank always writes its own shards."
    )


_OWN_SHARE = "every rank writes its own share, and what several hold is divided among them"


class WriterSection(Section):
    """DeepSpeed's key for its fast writers; only `decoupled` and `show_statistics` matter here."""

    type: Annotated[
        Literal["FAST", "PYTHON", "MOCK"],
        Only("FAST", "PYTHON", because="a MOCK writer writes nothing; remove the key"),
    ] = Field(
        default="FAST", description="Makes no difference: there is one writer. MOCK is refused."
    )
    io_buffer_size: int = Field(
        default=64 * 1024 * 1024,
        gt=0,
        description="Makes no difference: files are written 16 MiB at a time.",
    )
    io_buffer_double: bool = Field(
        default=True,
        description="Makes no difference: an asynchronous save writes from a copy of the state.",
    )
    io_multiplier: int = Field(
        default=1, gt=0, description="Makes no difference: each rank writes one file."
    )
    show_statistics: bool = Field(
        default=False,
        description="Whether rank 0 logs (level info) bytes, times and rate of each asynchronous "
        "save.",
    )
    data_parallel: Annotated[
        Literal["REPLICA", "SOCKET", "MACHINE"] | None,
        Only(None, "REPLICA", because=f"writers cannot be chosen: {_OWN_SHARE}"),
    ] = Field(default=None, description=f'null or "REPLICA": {_OWN_SHARE}.')
    decoupled: bool = Field(
        default=False, description='The same as "asynchronous" of the section above.'
    )


class CheckpointSection(Section):
    """How checkpoints are named and written."""

    asynchronous: bool = Field(
        default=False,
        description="Whether training goes on while a checkpoint is written: it waits for a copy "
        "to host memory only. One save is in flight; the next waits for it.",
    )
    keep_last: int | None = Field(
        default=None,
        ge=1,
        description="Delete all complete checkpoints in the folder but so many of the newest, the "
        'one that "latest" names, and any that is being read or written; null: delete none.',
    )
    writer: WriterSection | None = Field(default=None, description="As DeepSpeed has it.")
    tag_validation: TagValidation = Field(
        default="Warn",
        description="What happens when ranks save under different tags: rank 0's counts, with or "
        "without a warning, or it is an error. In any case of letters.",
    )
    load_universal: bool = Field(
        default=False,
        description="Makes no difference: every checkpoint loads at any world size and stage.",
    )
    use_node_local_storage: Annotated[
        bool, Only(False, because=f"{_LATER}; save to storage that all nodes share")
    ] = Field(default=False, description="Only false: all ranks save to one directory.")
    parallel_write: ParallelWriteSection = Field(
        default_factory=ParallelWriteSection, description="Who writes."
    )
    checkpoint_serialization: Annotated[
        bool, Only(True, because="a checkpoint is always a set of files; remove the key")
    ] = Field(default=True, description="Only true.")

    def policy(self) -> SavePolicy:
        """How the engine saves."""
        from ds_core.engine_files import SavePolicy

        return SavePolicy(
            tag_validation=self.tag_validation,
            asynchronous=self.asynchronous or (self.writer is not None and self.writer.decoupled),
            keep_last=self.keep_last,
            shows_figures=self.writer is not None and self.writer.show_statistics,
        )


_DEEPCOMPILE = "belongs to DeepCompile, a later package; torch.compile's own passes are used"


class CompileSection(Section):
    """torch.compile of the model's repeated blocks, or of the whole model if it has none."""

    removed: ClassVar[Mapping[str, str]] = {
        "schedule": f"{_DEEPCOMPILE}; remove it",
        "compiled_autograd_enabled": "not supported: sharding needs autograd's hooks; remove it",
    }

    enabled: bool = Field(
        default=False, description="Whether initialize() calls engine.compile() with these values."
    )
    backend: str = Field(default="inductor", description="A backend of torch.compile, by name.")
    kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of torch.compile: mode, dynamic, fullgraph, options.",
    )
    deepcompile: Annotated[bool, Only(False, because=f"{_DEEPCOMPILE}; set enabled")] = Field(
        default=False, description="Only false."
    )
    passes: Annotated[
        tuple[str, ...] | None, Only(None, because=f"{_DEEPCOMPILE}; remove the key")
    ] = Field(default=None, description="Only null.")
    free_activation: Annotated[
        bool, Only(False, because=f"{_DEEPCOMPILE}; use activation checkpointing")
    ] = Field(default=False, description="Only false.")
    free_activation_threshold: int = Field(
        default=10 * 2**20,
        ge=0,
        json_schema_extra={"unit": "bytes"},
        description="Unused without free_activation.",
    )
    offload_activation: Annotated[bool, Only(False, because=f"{_DEEPCOMPILE}; remove the key")] = (
        Field(default=False, description="Only false.")
    )
    offload_activation_pin_memory: bool = Field(
        default=True, description="Unused without offload_activation."
    )
    offload_opt_states: Annotated[bool, Only(False, because=f"{_DEEPCOMPILE}; remove the key")] = (
        Field(default=False, description="Only false.")
    )
    offload_parameters: Annotated[bool, Only(False, because=f"{_DEEPCOMPILE}; remove the key")] = (
        Field(default=False, description="Only false.")
    )
    double_buffer: bool = Field(default=True, description="Unused without DeepCompile.")
    symmetric_memory: Annotated[bool, Only(False, because=f"{_DEEPCOMPILE}; remove the key")] = (
        Field(default=False, description="Only false.")
    )
    sync_before_reduce: bool = Field(default=False, description="Unused without DeepCompile.")
    sync_after_reduce: bool = Field(default=False, description="Unused without DeepCompile.")
    sync_before_allgather: bool = Field(default=False, description="Unused without DeepCompile.")
    sync_after_allgather: bool = Field(default=False, description="Unused without DeepCompile.")
    keep_int_input_tensors: bool = Field(default=True, description="Unused without DeepCompile.")
    keep_all_input_tensors: bool = Field(default=False, description="Unused without DeepCompile.")
    debug_log: bool = Field(default=False, description="Unused without DeepCompile.")


class MetricsSection(Section):
    """Where ds-core writes the scalars of a run."""

    jsonl: str | None = Field(
        default=None,
        description="A file that gets one JSON object per step, written by rank 0; null: none.",
    )
    every_steps: int = Field(
        default=1,
        ge=1,
        description="Steps between two records, in this file and in every dashboard; times are "
        "means over these steps.",
        json_schema_extra={"unit": "steps"},
    )
    loss_over_ranks: bool = Field(
        default=False,
        description="Whether the loss that is written and shown is the mean over data-parallel "
        "ranks, at 8 bytes sent for each record and progress line, instead of rank 0's own.",
    )
