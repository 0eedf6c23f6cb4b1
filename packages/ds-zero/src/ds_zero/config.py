"""The `zero_optimization` section: each key of DeepSpeed honoured, explained or refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from ds_core.config import Auto, Only, Section, refusal
from ds_zero.host_steps.zenflow import ZenFlow
from ds_zero.offload.choice import Offload

_LATER = "not in ds-zero 0.1"
_NO_HIERARCHY = f"{_LATER}; every rank of the data-parallel group holds one shard"
_DENSE = f"{_LATER}; weights and gradients travel dense; remove the key"

#: Blocks whose experts run by the data: gathering them one by one would differ between ranks.
_MOE_BLOCKS = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_several)]


class LeafModuleSection(Section):
    """Modules that stage 3 gathers and reduces as one unit. A single string is a list of one."""

    classes: Names = Field(
        default=_MOE_BLOCKS, description="Classes, by name or by full path; absent ones do no harm."
    )
    names: Names = Field(default=(), description="Qualified names of modules in the model.")
    name_suffixes: Names = Field(default=(), description="Ends of qualified names.")


class OffloadOptimizerSection(Section):
    """Where master weights and moments live, and with them gradients, between their uses."""

    device: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description='"none": on the device. "cpu": in host memory, "nvme": on disk; the optimizer '
        "then steps on the CPU, and gradients go to the host as they are averaged.",
    )
    nvme_path: str | None = Field(
        default=None,
        description='A folder on the disk that "nvme" means. The files in it have no name and are '
        "gone when the process ends.",
    )
    buffer_count: int = Field(
        default=4,
        json_schema_extra={"unit": "buffers"},
        ge=2,
        description='With "nvme": pieces of states in memory at a time. Their size follows from '
        "sub_group_size.",
    )
    pin_memory: bool = Field(
        default=True,
        description="Whether host memory is page-locked, so that copies run beside the program.",
    )
    pipeline_read: bool = Field(
        default=False, description="Makes no difference: a piece is read while others are updated."
    )
    pipeline_write: bool = Field(
        default=False, description="Makes no difference: a piece is written while others are."
    )
    fast_init: bool = Field(
        default=False, description="Makes no difference: units are written as they are laid out."
    )
    ratio: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        default=1.0,
        description="Share of the optimizer's elements that leaves the device, in whole units; the "
        'rest is updated there at the same time. Not of DeepSpeed: "auto" measures both sides.',
    )
    super_offload: bool = Field(
        default=False,
        description='With "cpu": the host steps each unit while backward still runs, before the '
        "gradient norm is known, and takes that back, to the bit, where gradients are clipped or "
        "the step is left out. Weights and states need their memory twice, from backward to step.",
    )
    cpuadam_cores_perc: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="Makes no difference: a step uses torch's threads; set OMP_NUM_THREADS.",
    )

    @model_validator(mode="after")
    def _check_path(self) -> OffloadOptimizerSection:
        if self.super_offload and self.device != "cpu":
            raise refusal(
                f'super_offload: got true with device "{self.device}"; a step that may be taken '
                f'back needs its states in host memory: set device to "cpu"'
            )
        return _with_path(self)


class OffloadParamSection(Section):
    """Where parameter shards live while their unit is not whole. Stage 3 only."""

    device: Literal["none", "cpu", "nvme"] = Field(
        default="none",
        description='"none": on the device; "cpu": in host memory; "nvme": on disk.',
    )
    nvme_path: str | None = Field(
        default=None,
        description='A folder on the disk that "nvme" means. The files in it have no name and are '
        "gone when the process ends.",
    )
    buffer_count: int = Field(
        default=5,
        json_schema_extra={"unit": "buffers"},
        ge=2,
        description='With "nvme": shards in memory at a time, beside those of whole units.',
    )
    buffer_size: int = Field(
        default=100_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: a buffer is as large as the shard that it holds.",
    )
    max_in_cpu: int = Field(
        default=1_000_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description='With "nvme": so many elements per rank stay in host memory all the same.',
    )
    pin_memory: bool = Field(
        default=True,
        description="Whether host memory is page-locked, so that copies run beside the program.",
    )

    @model_validator(mode="after")
    def _check_path(self) -> OffloadParamSection:
        return _with_path(self)


class ZenFlowSection(Section):
    """The most important part of each shard steps at once, the rest every few steps.

    With `offload_optimizer` on "cpu". Importance is that of blocks of a flat shard, not of columns.
    """

    topk_ratio: float = Field(
        default=0.1, gt=0, le=1, description="Share of the blocks that step at once; 1.0: all."
    )
    select_strategy: Literal["auto", "step", "epoch"] = Field(
        default="auto",
        description='What select_interval counts: steps, or with "epoch" epochs of '
        "steps_per_epoch.",
    )
    select_interval: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description='From one choice of the important to the next. "auto": 4 update intervals, or '
        "1 epoch. In steps a multiple of update_interval; epochs are rounded up to one.",
    )
    update_interval: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        json_schema_extra={"unit": "steps"},
        description='From one update of the rest to the next. "auto": 4.',
    )
    overlap_step: bool = Field(
        default=False,
        description="Update the rest in a thread beside the next steps; the model sees it one "
        "update_interval later.",
    )
    full_warm_up_rounds: int = Field(
        default=0,
        ge=0,
        json_schema_extra={"unit": "steps"},
        description="Plain steps at the beginning, up to a multiple of update_interval.",
    )
    offload: bool = Field(
        default=False,
        description="Makes no difference: the important part lives on the host with the rest.",
    )
    auto_ratio: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description='Makes no difference: "auto" is a fixed interval, the same in every run.',
    )
    pt_reserved_cores_perc: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Makes no difference: the rest is stepped by a thread, not by a process with "
        "cores of its own; set OMP_NUM_THREADS.",
    )
    steps_per_epoch: int | None = Field(
        default=None, ge=1, json_schema_extra={"unit": "steps"}, description='For "epoch".'
    )

    def choice(self) -> ZenFlow:
        """What `ds_zero.shard` is told."""
        update = 4 if self.update_interval == "auto" else self.update_interval
        if self.select_strategy == "epoch":
            if self.steps_per_epoch is None:
                raise refusal(
                    'select_strategy: got "epoch" without steps_per_epoch; add it, or count in '
                    "steps"
                )
            epochs = 1 if self.select_interval == "auto" else self.select_interval
            select = -(-epochs * self.steps_per_epoch // update) * update
        else:
            select = 4 * update if self.select_interval == "auto" else self.select_interval
        if select % update:
            raise refusal(
                f"select_interval: got {select}, which is no multiple of update_interval "
                f"({update}): a block changes sides only when none of its gradients waits"
            )
        return ZenFlow(
            topk_ratio=self.topk_ratio,
            update_interval=update,
            select_interval=select,
            overlap_step=self.overlap_step,
            full_warm_up_rounds=self.full_warm_up_rounds,
        )

    @model_validator(mode="after")
    def _check(self) -> ZenFlowSection:
        self.choice()
        return self


S = TypeVar("S", OffloadOptimizerSection, OffloadParamSection)


def _with_path(section: S) -> S:
    if section.device == "nvme" and not section.nvme_path:
        raise refusal(
            'device: got "nvme" without nvme_path; add "nvme_path": a folder on that disk'
        )
    return section


class ZeroSection(Section):
    """What is sharded over the data-parallel ranks, and how shards move.

    Sizes are counts of elements, as in DeepSpeed. A unit (the parameters of a block in one flat
    buffer) is what travels here, so several of DeepSpeed's sizes have nothing left to bound; their
    descriptions say so.
    """

    removed: ClassVar[Mapping[str, str]] = {
        "cpu_offload": 'deprecated; use "offload_optimizer": {"device": "cpu"}',
        "cpu_offload_param": 'deprecated; use "offload_param": {"device": "cpu"}',
        "cpu_offload_params": 'deprecated; use "offload_param": {"device": "cpu"}',
        "cpu_offload_use_pin_memory": "deprecated; use offload_optimizer.pin_memory",
        "stage3_gather_fp16_weights_on_model_save": "deprecated; use "
        "stage3_gather_16bit_weights_on_model_save",
        "legacy_stage1": "the old implementation of stage 1 is gone; remove it",
        "grad_hooks": "documented by DeepSpeed but never a key of its code; remove it",
        "allgather_size": "renamed; use allgather_bucket_size",
        "zeropp_loco_param": f"{_LATER}; gradients travel dense, so there is no error to feed back",
    }

    # What is sharded
    stage: Literal[0, 1, 2, 3] = Field(
        default=0,
        description="0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too.",
    )

    # Reducing gradients (stages 1, 2) and gathering parameters
    reduce_scatter: bool = Field(
        default=True,
        description="Makes no difference: sharded gradients are always reduce-scattered.",
    )
    reduce_bucket_size: Annotated[int, Auto()] = Field(
        default=500_000_000,
        json_schema_extra={"unit": "elements"},
        gt=0,
        description="Makes no difference: a gradient travels with its unit.",
    )
    allgather_partitions: bool = Field(
        default=True, description="Makes no difference: updated parameters are always all-gathered."
    )
    allgather_bucket_size: Annotated[int, Auto()] = Field(
        default=500_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: a parameter travels with its unit.",
    )
    overlap_comm: Annotated[bool | None, Auto()] = Field(
        default=None,
        description="Makes no difference to results: collectives run beside the computation "
        "wherever the backend can.",
    )
    contiguous_gradients: bool = Field(
        default=True,
        description="Makes no difference: gradients are always views of one flat buffer.",
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        default=True,
        description="Makes no difference: a unit's reduction always serves all its owners.",
    )
    round_robin_gradients: bool = Field(
        default=False, description="Makes no difference: gradients leave as they are averaged."
    )
    parameter_alignment: bool = Field(
        default=False,
        description="Makes no difference to results: flat buffers have their own padding.",
    )
    ignore_unused_parameters: Annotated[
        bool,
        Only(True, because=f"{_LATER}; parameters without a gradient count as zero at every stage"),
    ] = Field(
        default=True, description="Only true: a parameter that a step does not use is no error."
    )
    compute_grad_norm: Annotated[
        bool, Only(True, because="the norm costs one pass over this rank's shard; remove the key")
    ] = Field(default=True, description="Only true: the global gradient norm is always known.")

    # Stage 3
    stage3_prefetch_bucket_size: Annotated[int, Auto()] = Field(
        default=50_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: what is gathered ahead is one unit.",
    )
    stage3_param_persistence_threshold: Annotated[int, Auto()] = Field(
        default=100_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: a small parameter travels with its unit, so sharding it "
        "costs no message of its own.",
    )
    stage3_model_persistence_threshold: Annotated[int, Auto()] = Field(
        default=sys.maxsize,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: see stage3_param_persistence_threshold.",
    )
    stage3_max_live_parameters: Annotated[int, Auto()] = Field(
        default=1_000_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: at most two units are whole at a time, and the root.",
    )
    stage3_max_reuse_distance: Annotated[int, Auto()] = Field(
        default=1_000_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: a unit is freed after its forward and its backward.",
    )
    stage3_module_granularity_threshold: int = Field(
        default=0,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description="Makes no difference: small blocks are merged into one unit.",
    )
    stage3_use_all_reduce_for_fetch_params: bool = Field(
        default=False,
        description="Makes no difference: a unit is gathered in place, without copies.",
    )
    stage3_allgather_sequential: bool = Field(
        default=False,
        description="Makes no difference: a unit is gathered in place, without copies.",
    )
    stage3_gather_16bit_weights_on_model_save: Annotated[bool, Auto()] = Field(
        default=False,
        description="Makes no difference: state_dict() and engine.save_model() always give full "
        "weights.",
    )
    sub_group_size: Annotated[int, Auto()] = Field(
        default=1_000_000_000,
        json_schema_extra={"unit": "elements"},
        ge=0,
        description='With optimizer states on "nvme": elements of one read or write, at most, '
        "unless one parameter is larger. Default there: 16777216.",
    )
    leaf_module: LeafModuleSection = Field(
        default_factory=LeafModuleSection, description="What is gathered as one unit."
    )
    memory_efficient_linear: bool = Field(
        default=True,
        description="Makes no difference: autograd saves views that a freed unit empties.",
    )
    override_module_apply: bool = Field(
        default=True, description="Makes no difference: nn.Module.apply is left alone."
    )
    log_trace_cache_warnings: bool = Field(
        default=False,
        description="Makes no difference: a changed order of use is traced again, without a loss.",
    )
    pipeline_loading_checkpoint: bool = Field(
        default=False, description="Makes no difference: every rank reads only its own part."
    )
    enable_sanity_checks: bool = Field(
        default=False, description="Makes no difference: what can go wrong is checked always."
    )

    update_in_backward: bool = Field(
        default=False,
        description="Not of DeepSpeed. Each unit is updated as soon as its averaged gradient is "
        "complete, while backward goes on, so that no gradient outlives its unit's turn. Without "
        "gradient_clipping and without a loss scale, which need all gradients first.",
    )

    check_memory: bool = Field(
        default=True,
        description="Not of DeepSpeed. What this machine cannot hold is refused before anything is "
        "allocated, with a plan of what each kind of state needs on each tier. False: it is tried.",
    )

    # Checkpoints
    load_from_fp32_weights: Annotated[
        bool, Only(True, because=f"{_LATER}; the fp32 weights of a checkpoint are always restored")
    ] = Field(default=True, description="Only true: the master copy resumes without loss.")
    elastic_checkpoint: bool = Field(
        default=False,
        description="Makes no difference: every checkpoint loads at any number of ranks.",
    )

    # Offload
    offload_optimizer: OffloadOptimizerSection | None = Field(
        default=None, description="Where optimizer states live; null: on the device."
    )
    offload_param: OffloadParamSection | None = Field(
        default=None, description="Where parameter shards live; null: on the device."
    )
    zenflow: ZenFlowSection | None = Field(
        default=None, description="Update a part of each shard less often; null: all at each step."
    )
    save_muon_momentum_buffer_in_memory: Annotated[
        bool, Only(False, because=f"{_LATER}; all states of an optimizer live in one place")
    ] = Field(default=False, description="Only false: momentum lives where the other states do.")

    # Hierarchy and quantization
    zero_hpz_partition_size: Annotated[int, Only(1, because=_NO_HIERARCHY)] = Field(
        default=1, description="Only 1: no second copy of the parameters within a node."
    )
    mics_shard_size: Annotated[int, Only(-1, because=_NO_HIERARCHY)] = Field(
        default=-1, description="Only -1: parameters are sharded over all data-parallel ranks."
    )
    mics_hierarchical_params_gather: Annotated[bool, Only(False, because=_NO_HIERARCHY)] = Field(
        default=False, description="Only false: a gather is one collective."
    )
    zero_quantized_weights: Annotated[bool, Only(False, because=_DENSE)] = Field(
        default=False, description="Only false: weights travel as they are."
    )
    zero_quantized_nontrainable_weights: Annotated[bool, Only(False, because=_DENSE)] = Field(
        default=False, description="Only false: frozen weights are stored and travel as they are."
    )
    zero_quantized_gradients: Annotated[bool, Only(False, because=_DENSE)] = Field(
        default=False, description="Only false: gradients travel as they are."
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            stage = 1 if value else 0
            raise refusal(
                f'got {str(value).lower()}, the form of 2020; use {{"stage": {stage}}} or higher'
            )
        return value

    @model_validator(mode="after")
    def _check_offload(self) -> ZeroSection:
        for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
            section: OffloadOptimizerSection | OffloadParamSection | None = getattr(self, key)
            if section is not None and section.device != "none" and self.stage < least:
                raise refusal(
                    f'{key}.device: got "{section.device}" at stage {self.stage}, where nothing of '
                    f"that is sharded; set stage to {least}" + (" or higher" if least < 3 else "")
                )
        offload = self.offload_optimizer
        if self.zenflow is not None and (offload is None or offload.device != "cpu"):
            raise refusal(
                "zenflow: it divides a step that the host takes; add "
                '"offload_optimizer": {"device": "cpu"}, or remove it'
            )
        return self

    @property
    def steps_on_host(self) -> bool:
        """Whether the optimizer steps on the CPU, whatever the device of the model."""
        section = self.offload_optimizer
        return section is not None and section.device != "none" and section.ratio == 1.0

    def offload(self) -> Offload:
        """What `ds_zero.shard` is told."""
        states = self.offload_optimizer or OffloadOptimizerSection()
        shards = self.offload_param or OffloadParamSection()
        chosen: dict[str, Any] = {}
        if "sub_group_size" in self.model_fields_set:
            chosen["piece_numel"] = max(1, self.sub_group_size)
        return Offload(
            optimizer="device" if states.device == "none" else states.device,
            parameters="device" if shards.device == "none" else shards.device,
            folder=states.nvme_path,
            parameters_folder=shards.nvme_path,
            ratio=states.ratio if states.device != "none" else 1.0,
            speculative=states.super_offload,
            pin_memory=states.pin_memory,
            buffers=states.buffer_count,
            parameter_buffers=shards.buffer_count,
            max_numel_in_cpu=shards.max_in_cpu,
            **chosen,
        )
