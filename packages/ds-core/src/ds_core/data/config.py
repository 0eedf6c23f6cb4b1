"""The config sections of the data toolbox: `curriculum_learning` and `data_efficiency`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ds_core.config.section import Only, Section, refusal
from ds_core.data.schedule import FixedDiscrete, FixedLinear, FixedRoot, Schedule, load_function
from ds_core.errors import DsError

_STEPS: dict[str, Any] = {"unit": "steps"}
_TOKENS: dict[str, Any] = {"unit": "tokens"}


class CurriculumScheduleSection(Section):
    """How difficulty grows; which keys are needed depends on `schedule_type`."""

    total_curriculum_step: int | None = Field(
        default=None,
        gt=0,
        description="fixed_linear, fixed_root: optimizer steps until the largest difficulty.",
        json_schema_extra=_STEPS,
    )
    difficulty_step: int | None = Field(
        default=None,
        gt=0,
        description="fixed_linear, fixed_root: every difficulty but the largest is a multiple of "
        "it. For sequence lengths, 8 suits tensor cores.",
    )
    root_degree: int | None = Field(
        default=None, gt=0, description="fixed_root: 2 is a square root, which grows fast at first."
    )
    difficulty: tuple[int, ...] | None = Field(
        default=None, description="fixed_discrete: the difficulties, one after the other."
    )
    max_step: tuple[int, ...] | None = Field(
        default=None,
        description="fixed_discrete: the last step of each difficulty but the last, ascending.",
        json_schema_extra=_STEPS,
    )
    function: str | None = Field(
        default=None,
        description='custom: "package.module:name" of a function from the number of the step, '
        "counted from 1, to the difficulty.",
    )


class DifficultySection(Section):
    """A difficulty that grows while training."""

    min_difficulty: int = Field(default=1, gt=0, description="The first difficulty.")
    max_difficulty: int | None = Field(default=None, gt=0, description="The last; needed.")
    schedule_type: Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"] | None = Field(
        default=None, description="How it grows; needed."
    )
    schedule_config: CurriculumScheduleSection = Field(
        default_factory=CurriculumScheduleSection, description="The particulars of that."
    )

    def check_schedule(self) -> None:
        """Refuse a schedule that lacks something, or whose values cannot be."""
        if self.schedule_type is None or self.max_difficulty is None:
            missing = "schedule_type" if self.schedule_type is None else "max_difficulty"
            raise refusal(f"{missing} is missing; a curriculum needs it")
        needed = {
            "fixed_linear": ("total_curriculum_step", "difficulty_step"),
            "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
            "fixed_discrete": ("difficulty", "max_step"),
            "custom": ("function",),
        }[self.schedule_type]
        for name in CurriculumScheduleSection.model_fields:
            given = getattr(self.schedule_config, name) is not None
            if given is not (name in needed):
                problem = "does not use" if given else "needs"
                raise refusal(
                    f'schedule_type "{self.schedule_type}" {problem} schedule_config.{name}; it '
                    f"takes {', '.join(needed)}"
                )
        if self.schedule_type != "custom":
            try:
                self.schedule("")
            except DsError as error:
                raise refusal(str(error)) from None

    def schedule(self, where: str) -> Schedule:
        """The schedule that this section describes; `where` is its key, for errors."""
        rule, lowest, highest = self.schedule_config, self.min_difficulty, self.max_difficulty or 1
        total, multiple = rule.total_curriculum_step or 1, rule.difficulty_step or 1
        if self.schedule_type == "fixed_root":
            return FixedRoot(lowest, highest, total, multiple, rule.root_degree or 1)
        if self.schedule_type == "fixed_discrete":
            return FixedDiscrete(rule.difficulty or (), rule.max_step or ())
        if self.schedule_type == "custom":
            return load_function(rule.function or "", f"{where}.schedule_config.function")
        return FixedLinear(lowest, highest, total, multiple)


class CurriculumSection(DifficultySection):
    """Short sequences first: each training input is cut to a length that grows."""

    enabled: bool = Field(default=False, description="Whether inputs are cut.")
    curriculum_type: Annotated[
        str,
        Only("seqlen", because="other difficulties are data_efficiency.data_sampling's business"),
    ] = Field(default="seqlen", description='Only "seqlen": the difficulty is a length in tokens.')

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.enabled:
            self.check_schedule()
        return self


class MetricSection(DifficultySection):
    """One metric by which samples are easy or hard."""

    index_to_sample_path: str | None = Field(
        default=None,
        description="What ds_core.data.analyze wrote for this metric (its folder, or a file in "
        "it), or the prefix of DeepSpeed's index_to_sample files.",
    )
    index_to_metric_path: str | None = Field(
        default=None,
        description="The same place, or the prefix of DeepSpeed's index_to_metric files.",
    )
    difficulty_type: Literal["value", "percentile"] = Field(
        default="value",
        description="Whether a difficulty is a value of the metric, or a share of the samples in "
        "its order, in units of max_difficulty.",
    )
    clustering_type: Literal["schedule_based", "single_cluster"] = Field(
        default="schedule_based",
        description="Whether samples above the difficulty wait, or all samples are used from the "
        "start and something else uses the difficulty: seqlen cuts inputs; for other metrics set "
        "dataloader.post_process.",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        self.check_schedule()
        if self.clustering_type == "schedule_based" and self.index_to_sample_path is None:
            raise refusal(
                "index_to_sample_path is missing; a schedule_based metric needs what "
                "ds_core.data.analyze(dataset, metrics, folder) writes"
            )
        return self


class MetricCurriculumSection(Section):
    """Samples by their difficulty: easy ones first, by one metric or several."""

    enabled: bool = Field(default=False, description="Whether harder samples wait.")
    data_cluster_path: str | None = Field(
        default=None,
        description="Makes no difference: the lists of samples that become ready together are in "
        "memory, 4 bytes per sample and rank, and found anew when a run resumes.",
    )
    curriculum_metrics: dict[str, MetricSection] = Field(
        default_factory=dict, description="The metrics by name; a sample waits for all of them."
    )

    @model_validator(mode="after")
    def _has_metrics(self) -> Self:
        if self.enabled and not self.curriculum_metrics:
            raise refusal("enabled, but curriculum_metrics names none")
        return self


class DynamicBatchingSection(Section):
    """Micro-batches of a number of tokens, not of samples, with a learning rate to match."""

    enabled: bool = Field(default=False, description="Whether samples are packed by tokens.")
    metrics_path: str | None = Field(
        default=None,
        description="A folder in which ds_core.data.analyze measured seqlen of each sample.",
    )
    lr_scaling_method: Literal["linear", "sqrt", "none"] = Field(
        default="linear",
        description="How the learning rate follows the samples of a step: it is meant for "
        "train_batch_size of them.",
    )
    min_batch_size: int = Field(
        default=1, gt=0, description="Least samples per micro-batch.",
        json_schema_extra={"unit": "samples"},
    )  # fmt: skip
    max_batch_size: int | None = Field(
        default=None, gt=0, description="Most samples per micro-batch; null: no limit.",
        json_schema_extra={"unit": "samples"},
    )  # fmt: skip
    sequence_picking_order: Literal["dataloader", "random", "seqlen", "bucketed"] = Field(
        default="dataloader",
        description="Order in which samples are packed: the dataset's; shuffled in each epoch; by "
        "length; or shuffled with neighbours of like length, so that little is padding.",
    )
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        description="Most tokens of a micro-batch, padding not counted; needed.",
        json_schema_extra=_TOKENS,
    )
    verbose: bool = Field(default=False, description="Whether each epoch's packing is logged.")

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.enabled and (self.max_tokens is None or self.metrics_path is None):
            missing = "max_tokens" if self.max_tokens is None else "metrics_path"
            raise refusal(
                f"enabled, but {missing} is missing; measure the samples once with "
                f'ds_core.data.analyze(dataset, {{"seqlen": sequence_length}}, folder)'
            )
        if self.max_batch_size is not None and self.max_batch_size < self.min_batch_size:
            raise refusal(
                f"max_batch_size {self.max_batch_size} is below min_batch_size "
                f"{self.min_batch_size}"
            )
        return self


class DataSamplingSection(Section):
    """Which samples come when, and how they are read."""

    enabled: bool = Field(default=False, description="Whether this section is used.")
    num_epochs: int = Field(
        default=1000, gt=0, description="Training data end after so many passes over the dataset."
    )
    num_workers: int = Field(
        default=0, ge=0, description="Processes per rank that read samples ahead; 0: none."
    )
    pin_memory: bool = Field(
        default=False,
        description="Whether batches are put into page-locked memory, where there is an "
        "accelerator to copy them to.",
    )
    curriculum_learning: MetricCurriculumSection = Field(
        default_factory=MetricCurriculumSection, description="Easy samples first."
    )
    dynamic_batching: DynamicBatchingSection = Field(
        default_factory=DynamicBatchingSection, description="Batches by tokens."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name in ("curriculum_learning", "dynamic_batching"):
            if getattr(self, name).enabled and not self.enabled:
                raise refusal(f"{name} is enabled, but data_sampling is not; enable both")
        if self.curriculum_learning.enabled and self.dynamic_batching.enabled:
            raise refusal(
                "curriculum_learning and dynamic_batching both decide which samples make a batch; "
                "keep one"
            )
        return self


class LayerTokenScheduleConfigSection(Section):
    """Particulars of random_ltd_schedule."""

    require_steps: int | None = Field(
        default=None,
        gt=0,
        description="Optimizer steps until layers see max_value tokens.",
        json_schema_extra=_STEPS,
    )
    seq_per_step: int | None = Field(
        default=None,
        gt=0,
        description="Every number of tokens but max_value is a multiple of it.",
        json_schema_extra=_TOKENS,
    )


class LayerTokenScheduleSection(Section):
    """How many tokens the chosen layers see."""

    min_value: int | None = Field(
        default=None, gt=0, description="Tokens at the first step.", json_schema_extra=_TOKENS
    )
    max_value: int | None = Field(
        default=None,
        gt=0,
        description="Tokens at the last; the length of the sequences, to end with all.",
        json_schema_extra=_TOKENS,
    )
    schedule_type: Literal["fixed_linear"] = Field(
        default="fixed_linear", description="How it grows."
    )
    schedule_config: LayerTokenScheduleConfigSection = Field(
        default_factory=LayerTokenScheduleConfigSection, description="The particulars of that."
    )


class LayerTokenLrSection(Section):
    """A learning rate by tokens and layers."""

    removed: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("total_layer_tokens", "warmup_type", "warmup_layer_tokens"),
        "DeepSpeed never implemented this schedule; use scheduler",
    )

    enabled: Annotated[
        bool,
        Only(False, because="DeepSpeed never implemented this schedule either; use scheduler"),
    ] = Field(default=False, description="Only false.")


class RandomLtdSection(Section):
    """Random layer-wise token dropping: middle layers see a random part of the tokens."""

    enabled: bool = Field(default=False, description="Whether layers skip tokens.")
    total_layer_num: int | None = Field(
        default=None, gt=0, description="Blocks of the model's repeated stack; needed."
    )
    random_ltd_layer_num: int | None = Field(
        default=None, gt=0, description="How many of them skip tokens; checked if given."
    )
    random_ltd_layer_id: tuple[int, ...] = Field(
        default=(), description="Which of them do, counted from 0; needed."
    )
    model_mask_name: str | None = Field(
        default=None,
        description="The argument of a block that is its attention mask, if its name does not say "
        "so; it is cut along queries and keys.",
    )
    model_type: Literal["decoder", "encoder"] = Field(
        default="decoder",
        description="Makes no difference: tokens keep their order, which a causal mask needs.",
    )
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] = Field(
        default="batch_seq_dim", description="Dimensions of what the blocks hand on."
    )
    random_ltd_schedule: LayerTokenScheduleSection = Field(
        default_factory=LayerTokenScheduleSection, description="How many tokens they see."
    )
    layer_token_lr_schedule: LayerTokenLrSection = Field(
        default_factory=LayerTokenLrSection, description="Only disabled."
    )

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if not self.enabled:
            return self
        rule, ids = self.random_ltd_schedule, self.random_ltd_layer_id
        needed = {
            "total_layer_num": self.total_layer_num,
            "random_ltd_layer_id": ids or None,
            "random_ltd_schedule.min_value": rule.min_value,
            "random_ltd_schedule.max_value": rule.max_value,
            "random_ltd_schedule.schedule_config.require_steps": rule.schedule_config.require_steps,
            "random_ltd_schedule.schedule_config.seq_per_step": rule.schedule_config.seq_per_step,
        }
        if missing := [name for name, value in needed.items() if value is None]:
            raise refusal(f"enabled, but {', '.join(missing)} missing")
        total = self.total_layer_num or 0
        if wrong := [index for index in ids if not 0 <= index < total]:
            raise refusal(f"random_ltd_layer_id names {wrong[0]}, and there are {total} layers")
        if len(set(ids)) != len(ids) or self.random_ltd_layer_num not in (None, len(ids)):
            raise refusal(
                f"random_ltd_layer_id names {len(set(ids))} different layers, and "
                f"random_ltd_layer_num is {self.random_ltd_layer_num}"
            )
        try:
            self.schedule()
        except DsError as error:
            raise refusal(str(error)) from None
        return self

    def schedule(self) -> FixedLinear:
        """Tokens that the layers see, by step."""
        rule = self.random_ltd_schedule
        total, multiple = rule.schedule_config.require_steps, rule.schedule_config.seq_per_step
        return FixedLinear(rule.min_value or 1, rule.max_value or 1, total or 1, multiple or 1)


class DataRoutingSection(Section):
    """Which tokens go through which layers."""

    enabled: bool = Field(default=False, description="Whether this section is used.")
    random_ltd: RandomLtdSection = Field(
        default_factory=RandomLtdSection, description="Random layer-wise token dropping."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.random_ltd.enabled and not self.enabled:
            raise refusal("random_ltd is enabled, but data_routing is not; enable both")
        return self


class DataEfficiencySection(Section):
    """The same quality from fewer samples, or from fewer tokens per layer."""

    enabled: bool = Field(default=False, description="Whether this section is used.")
    seed: int = Field(
        default=1234,
        ge=0,
        description="Of the order of samples, when data_sampling is enabled.",
    )
    data_sampling: DataSamplingSection = Field(
        default_factory=DataSamplingSection, description="Which samples come when."
    )
    data_routing: DataRoutingSection = Field(
        default_factory=DataRoutingSection, description="Which tokens go through which layers."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name in ("data_sampling", "data_routing"):
            if getattr(self, name).enabled and not self.enabled:
                raise refusal(f"{name} is enabled, but data_efficiency is not; enable both")
        return self
